"""Pictures: sampled blocks (the paper's Fig. 4), a run's curves, accuracy against time (Fig. 1); `view` extra."""

import json
from pathlib import Path

import numpy as np
import torch

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.curve import Arm
from jepa3d.models.tokenizer import group
from jepa3d.objectives.jepa import make_sampler
from jepa3d.ops import BatchGenerator


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'jepa3d[view]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_blocks(clouds: PointClouds, config: PretrainConfig, path: Path, shapes: int = 4) -> None:
    """One row a shape: the cloud, the context the encoder sees, and each target block, as the sampler draws them."""
    plt = _pyplot()
    points = clouds.batch(np.linspace(0, len(clouds) - 1, shapes).astype(int))
    generator = BatchGenerator(config.seed)
    grouped = group(points, config.encoder.num_groups, config.encoder.group_size)
    sample = make_sampler(config)(grouped.centers, generator.stream("sampler"))
    blocks = sample.target.shape[1]
    figure = plt.figure(figsize=(1.7 * (2 + blocks), 1.6 * shapes))
    for row in range(shapes):
        chosen = [sample.context[row][sample.mask[row]], *sample.target[row]]
        titles = ["cloud", "context", *(f"target {i + 1}" for i in range(blocks))]
        for column, title in enumerate(titles):
            axes = figure.add_subplot(shapes, 2 + blocks, row * (2 + blocks) + column + 1, projection="3d")
            color = "0.25" if column == 0 else "tab:blue" if column == 1 else "tab:red"
            inside = torch.ones(len(points[row]), dtype=torch.bool)
            if column:
                inside[:] = False
                inside[grouped.index[row, chosen[column - 1]].flatten()] = True
            axes.scatter(*points[row, ~inside].T, s=1, color="0.85", depthshade=False)
            axes.scatter(*points[row, inside].T, s=3, color=color, depthshade=column == 0)
            axes.set_axis_off()
            axes.set_box_aspect((1, 1, 1), zoom=1.25)
            axes.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), zlim=(-0.7, 0.7))
            if row == 0:
                axes.set_title(title, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.96, 0, 0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(run: Path, path: Path) -> None:
    """Loss beside what positions alone and the best constant score, and effective ranks, by step."""
    plt = _pyplot()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    steps = [line["step"] for line in lines]
    for axes, names in (
        (left, ("loss", "position_loss", "constant_loss")),
        (right, ("prediction_rankme", "target_rankme")),
    ):
        for name in names:
            if name in lines[0]:
                axes.plot(steps, [line[name] for line in lines], label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_learning_curves(arms: list[Arm], path: Path, title: str) -> None:
    """Probe accuracy against CPU-minutes, mean and one standard deviation over seeds, one line a configuration."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for arm in arms:
        minutes, accuracy = arm.minutes.mean(0), arm.accuracy.mean(0)
        (line,) = axes.plot(minutes, accuracy, marker=".", label=f"{arm.name} ({len(arm.seeds)} seeds)")
        if len(arm.seeds) > 1:
            std = arm.accuracy.std(0, ddof=1)
            axes.fill_between(minutes, accuracy - std, accuracy + std, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel="CPU-minutes, stage I included", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_contact_sheet(clouds: list[np.ndarray], titles: list[str], path: Path) -> None:
    """Clouds N 3, z up, side by side, seen from the front right."""
    plt = _pyplot()
    columns = min(6, len(clouds))
    rows = -(-len(clouds) // columns)
    figure = plt.figure(figsize=(1.7 * columns, 1.8 * rows))
    for i, (points, title) in enumerate(zip(clouds, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1, projection="3d")
        points = points - points.mean(0)
        points = points[: 2**13] / np.linalg.norm(points, axis=1).max()
        axes.scatter(*points.T, s=1, c=points[:, 2], cmap="viridis", depthshade=False)
        axes.set_axis_off()
        axes.set_box_aspect((1, 1, 1), zoom=1.3)
        axes.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(-0.8, 0.8))
        axes.set_title(title[-24:], fontsize=7, pad=0)
    figure.subplots_adjust(0, 0, 1, 0.97, 0, 0.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)
