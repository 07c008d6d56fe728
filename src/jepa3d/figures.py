"""Pictures, the paper's Fig.

1, 4, 6 and 7 among them (`view` extra); a `path` may also be an open binary file.
"""

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.data.errors import shortened
from jepa3d.evaluation.curve import Arm
from jepa3d.evaluation.fitting import one_thread
from jepa3d.evaluation.outcomes import METRICS
from jepa3d.evaluation.paired import Row
from jepa3d.models.tokenizer import group
from jepa3d.objectives.jepa import make_sampler
from jepa3d.ops import BatchGenerator
from jepa3d.run import Run

Target = Path | BinaryIO
_MARKERS = "osD^vP*X"  # one for every 20 classes
_DOTS = 4096  # of a cloud in a contact sheet
# Rows: to the right, up and towards the one who looks, from 30 degrees above and 60 to the left of
# x.
_FRONT_RIGHT = np.array(
    [[3**0.5 / 2, 0.5, 0], [-0.25, 3**0.5 / 4, 3**0.5 / 2], [3**0.5 / 4, -0.75, 0.5]]
)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'jepa3d[view]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _text(name: str) -> str:
    """A name from data as matplotlib draws it: no formula between two $, not hidden from legends
    for a leading _.
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _cloud_axes(axes, reach: float, zoom: float) -> None:
    """No axes, equal units, room for `reach` in every direction."""
    axes.set_axis_off()
    axes.set_box_aspect((1, 1, 1), zoom=zoom)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))


def _save(figure, path: Target) -> None:
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


def draw_blocks(clouds: PointClouds, config: PretrainConfig, path: Target, shapes: int = 4) -> None:
    """One row a shape: the cloud, the context the encoder sees, and each target block, as the
    sampler draws them.
    """
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
            axes = figure.add_subplot(
                shapes, 2 + blocks, row * (2 + blocks) + column + 1, projection="3d"
            )
            color = "0.25" if column == 0 else "tab:blue" if column == 1 else "tab:red"
            inside = torch.ones(len(points[row]), dtype=torch.bool)
            if column:
                inside[:] = False
                inside[grouped.index[row, chosen[column - 1]].flatten()] = True
            axes.scatter(*points[row, ~inside].T, s=1, color="0.85", depthshade=False)
            axes.scatter(*points[row, inside].T, s=3, color=color, depthshade=column == 0)
            _cloud_axes(axes, 0.7, 1.25)
            if row == 0:
                axes.set_title(title, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.96, 0, 0)
    _save(figure, path)


def draw_curves(run: Path, path: Target) -> None:
    """Loss beside what positions alone and the best constant score, and effective ranks, by step.

    ValueError where the run has logged nothing.
    """
    ranks = ("prediction_rankme", "target_rankme", "embedding_rankme", "encoded_rankme")
    losses = ("loss", "position_loss", "constant_loss", "reconstruction")
    _draw_by_step(run, path, (("", losses), ("effective rank", (*ranks, "perplexity"))))


def draw_supervised(run: Path, path: Target, selected: str = "validation") -> None:
    """Loss; accuracy on the training batches beside the score the epoch is chosen by, `selected`
    its name; by step.

    ValueError where the run has logged nothing.
    """
    _draw_by_step(
        run,
        path,
        (("loss", ("loss",)), ("%", ("accuracy", "validation", "test"))),
        {"validation": selected, "test": selected},
    )


def _draw_by_step(
    run: Path,
    path: Target,
    panels: Sequence[tuple[str, Sequence[str]]],
    names: dict[str, str] | None = None,
) -> None:
    """One panel (its unit, its figures) beside the other; figures that were not logged are left
    out.
    """
    if not (lines := Run(run).metrics):
        raise ValueError(f"{run}: no step has been logged")
    plt = _pyplot()
    shown = {"accuracy": "training batches, accuracy"} | (names or {})
    logged = [
        (unit, [name for name in wanted if any(name in line for line in lines)])
        for unit, wanted in panels
    ]
    logged = [(unit, found) for unit, found in logged if found]
    figure, grid = plt.subplots(1, len(logged), figsize=(4.5 * len(logged), 3.2), squeeze=False)
    for axes, (unit, found) in zip(grid[0], logged, strict=True):
        for name in found:
            at = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            label = shown.get(name, name.replace("_rankme", "").replace("_", " "))
            axes.plot(
                *zip(*at, strict=True),
                label=_text(label),
                marker="." if len(at) < 40 else None,
                lw=1.4,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def draw_learning_curves(arms: list[Arm], path: Target, title: str) -> None:
    """Probe accuracy against CPU-minutes, mean and one standard deviation over seeds, one line a
    configuration.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for arm in arms:
        minutes, accuracy = arm.minutes.mean(0), arm.accuracy.mean(0)
        (line,) = axes.plot(
            minutes, accuracy, marker=".", label=f"{arm.name} ({len(arm.seeds)} seeds)"
        )
        if len(arm.seeds) > 1:
            std = arm.accuracy.std(0, ddof=1)
            axes.fill_between(
                minutes, accuracy - std, accuracy + std, color=line.get_color(), alpha=0.15, lw=0
            )
    axes.set(xlabel="CPU-minutes, stage I included", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def draw_differences(rows: Sequence[Row], path: Target, title: str) -> None:
    """Differences with their 95 % intervals, a panel a metric, a line for every set and arm or
    baseline.
    """
    plt = _pyplot()
    shown = [(row, row.difference) for row in rows if row.difference]
    lines = list(dict.fromkeys((row.data, row.name) for row, _ in shown))
    figure, grid = plt.subplots(
        1,
        len(METRICS),
        figsize=(3 + 2.4 * len(METRICS), 1.4 + 0.28 * len(lines)),
        sharey=True,
        layout="constrained",
    )
    colors = {"better": "tab:green", "worse": "tab:red", "undecided": "0.5"}
    for axes, (metric, name) in zip(grid, METRICS.items(), strict=True):
        for row, gain in shown:
            if row.metric == metric:
                at, color = lines.index((row.data, row.name)), colors[gain.verdict]
                axes.plot([gain.low, gain.high], [at, at], color=color, lw=2)
                axes.plot(gain.mean, at, "o", color=color, ms=5)
        axes.axvline(0, color="0.3", lw=0.8)
        axes.set_title(name, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    grid[0].set_yticks(
        range(len(lines)), [_text(f"{name}, {data}") for data, name in lines], fontsize=8
    )
    grid[0].invert_yaxis()
    figure.suptitle(_text(f"{title}, points"), fontsize=10)
    _save(figure, path)


def draw_contact_sheet(clouds: list[np.ndarray], titles: list[str], path: Target) -> None:
    """Clouds N 3, z up, side by side, seen from the front right, as a PNG of few colours; titles
    are wrapped.
    """
    plt = _pyplot()
    dpi, cell, caption = 110, 190, 46  # pixels
    columns = min(6, len(clouds))
    rows = -(-len(clouds) // columns)
    width, height = columns * cell, rows * (cell + caption)
    figure = plt.figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    for i, (points, title) in enumerate(zip(clouds, titles, strict=True)):
        left, top = cell * (i % columns), height - (cell + caption) * (i // columns)
        figure.figimage(_pixels(points, cell), left, top - cell, origin="upper")
        x, y = (left + cell / 2) / width, (top - cell) / height
        figure.text(x, y, _caption(title), fontsize=7, ha="center", va="top", linespacing=1.1)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a letter that the font lacks is drawn as a box
        figure.savefig(drawn, format="png", dpi=dpi)
    plt.close(figure)
    from PIL import Image  # matplotlib brings it

    Image.open(drawn).convert("RGB").quantize(32).save(path, "PNG", optimize=True)


def even_sample(points: np.ndarray) -> np.ndarray:
    """At most as many of points N 3 as are drawn, from all of the cloud whatever the order in its
    file.
    """
    return points[np.sort(np.random.default_rng(0).permutation(len(points))[:_DOTS])]


def _pixels(points: np.ndarray, size: int) -> np.ndarray:
    """A cloud as an image [size, size, 3] uint8: an even sample of all its points, the nearer
    hiding the farther.
    """
    points = even_sample(points).astype(np.float64)
    points -= points.mean(0)
    points /= max(np.linalg.norm(points, axis=1).max(), 1e-30)
    across, up, towards = _FRONT_RIGHT @ points.T
    nearest_last = np.argsort(towards, kind="stable")
    height = points[nearest_last, 2]
    colors = _pyplot().get_cmap("viridis")((height - height.min()) / max(np.ptp(height), 1e-30))[
        :, :3
    ]
    x, y = ((1 + 0.94 * at[nearest_last]) * size / 2 for at in (across, -up))
    image = np.full((size, size, 3), 255, np.uint8)
    side = int(np.clip(0.5 * size / np.sqrt(len(points)), 2, 6))  # of a dot
    shifts = np.indices((side, side)).reshape(2, -1) - side // 2
    at = np.stack([y, x], 1).astype(int)[:, :, None] + shifts  # points, 2, pixels of a dot
    at = at.transpose(0, 2, 1).reshape(-1, 2).clip(0, size - 1)
    image[at[:, 0], at[:, 1]] = np.repeat((255 * colors).astype(np.uint8), side * side, axis=0)
    return image


def _caption(title: str, width: int = 28, lines: int = 3) -> str:
    """A title on few lines, its middle cut out where it is too long."""
    return _text("\n".join(textwrap.wrap(shortened(title, width * lines * 3 // 4), width)[:lines]))


def draw_parts(
    points: np.ndarray, truth: np.ndarray, predicted: np.ndarray, titles: list[str], path: Target
) -> None:
    """Shapes (n N 3, z up) in pairs, two pairs a row: the true parts (n N) and the predicted ones
    (Fig. 6).

    A part has one colour in both pictures of a pair.
    """
    plt = _pyplot()
    pairs = min(2, len(points))
    rows = -(-len(points) // pairs)
    figure = plt.figure(figsize=(4.2 * pairs, 2.1 * rows))
    for i, title in enumerate(titles):
        cloud = points[i].astype(np.float32)
        cloud = cloud - cloud.mean(0)
        cloud /= np.linalg.norm(cloud, axis=1).max()
        present = np.unique([truth[i], predicted[i]])
        for side, (parts, name) in enumerate(((truth[i], "true"), (predicted[i], "predicted"))):
            axes = figure.add_subplot(rows, 2 * pairs, 2 * i + side + 1, projection="3d")
            colors = plt.get_cmap("tab10")(np.searchsorted(present, parts) % 10)
            axes.scatter(*cloud.T, s=2, c=colors, depthshade=False)
            _cloud_axes(axes, 0.75, 1.3)
            axes.set_title(
                f"{_text(title[-20:])}, {name}" if side == 0 else name, fontsize=8, pad=0
            )
    figure.subplots_adjust(0, 0, 1, 0.97, 0, 0.06)
    _save(figure, path)


def draw_tsne(
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: Target,
) -> None:
    """Features (n E each) of the same shapes before and after fine-tuning in the plane, coloured by
    class (Fig. 7).

    t-SNE of the first 50 principal components, its seed fixed. ValueError for fewer than 5 shapes.
    """
    if len(labels) < 5:
        raise ValueError(f"{len(labels)} shapes, and t-SNE needs at least 5")
    plt = _pyplot()
    present = np.unique(labels)
    columns = min(5, len(present))
    legend = 0.19 * -(-len(present) // columns) + 0.15  # inches
    figure, grid = plt.subplots(1, 2, figsize=(9, 4.4 + legend))
    for axes, features, title in zip(
        grid, (before, after), ("before fine-tuning", "after fine-tuning"), strict=True
    ):
        rows = features.astype(np.float64)
        with one_thread():
            rows = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
            plane = TSNE(
                perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0
            ).fit_transform(rows)
        for i, label in enumerate(present):
            color = plt.get_cmap("tab10" if len(present) <= 10 else "tab20")(i % 20)
            marker = _MARKERS[i // 20 % len(_MARKERS)]
            at = plane[labels == label]
            axes.scatter(
                *at.T, s=9, lw=0, color=color, marker=marker, label=_text(class_names[label][:22])
            )
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="lower center", ncols=columns, fontsize=8, frameon=False, markerscale=2
    )
    figure.subplots_adjust(0.01, legend / (4.4 + legend), 0.99, 0.94, 0.03)
    _save(figure, path)


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Target) -> None:
    """Shapes of a true class (row) given each class (column): colour is the share of the row, the
    number a count.
    """
    plt = _pyplot()
    confusion = np.asarray(confusion)
    count = len(class_names)
    names = [_text(name[:22]) for name in class_names]
    size = min(3 + 0.33 * count, 14)
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    font = 8 if count <= 25 else 5
    axes.set_xticks(range(count), names, rotation=90, fontsize=font)
    axes.set_yticks(range(count), names, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true")
    for row, column in np.argwhere(confusion):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(
            column,
            row,
            str(confusion[row, column]),
            ha="center",
            va="center",
            fontsize=font,
            color=color,
        )
    _save(figure, path)
