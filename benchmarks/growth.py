"""Measure how time and memory grow with the numbers of points, of tokens, of clouds in a batch and
of shapes in a store, and how many clouds per second an encoder embeds.

    python benchmarks/growth.py                                            # some 5 minutes on two cores
    python benchmarks/growth.py --figure docs/growth.png --json numbers.json

The encoder is the paper's (preset small) with random weights, in fp32, on clouds of normally
distributed points. Times are medians of 3 rounds after a warm-up round. Slopes are least-squares
fits of log cost against log size: a slope of 1 means linear growth, and 0 means no growth. The row
"slope, larger half" omits the small sizes, where constant costs dominate.

- Points: the cost of `encoder.embed`. It first reduces a cloud to 2,048 points (num_points), so the
  numbers of tokens and neighbours stay the same.
- Tokens: the cost of a forward and backward pass of 3D-JEPA with an EMA teacher, with 16 points and
  32 neighbours per token. FLOPs are counted for matrix products, including attention, but not for
  the neighbour search.
- Batch: the cost of whole steps of the training loop. The batch sizes run one after another, each
  in its own process. Peak memory is the largest resident set of this process, with its libraries.
- Shapes: the cost of reading from a store. The index has its full size (650 MB of temporary disk
  for ten million shapes), but all shards are links to one file of 32 MiB. So points are read from
  memory, and no disk is measured. Costs of a batch are medians over 30 batches.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import count_flops, machine, random_clouds
from safetensors.numpy import save_file
from store import PER_SHARD, POINTS, make_index
from torch import Tensor

from jepa3d import config as settings
from jepa3d.allocator import keep_large_blocks
from jepa3d.data.datasets import PointClouds
from jepa3d.data.store import Store, StoredPoints
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.tokenizer import group
from jepa3d.ops import BatchGenerator
from jepa3d.training.loop import Task, batch_index, epoch_order, fit
from jepa3d.training.pretrain import make_task

ROUNDS = 3
CLOUD_SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 100_000)
TOKENS = (64, 128, 256, 512, 1024)
BATCHES = (1, 4, 16, 32, 64, 128)
SHAPES = (10**3, 10**4, 10**5, 10**6, 10**7)
CLOUDS = 4  # number of clouds per call in the measurements of points and of tokens
PRESETS, EMBED_SIZES, EMBED_BATCHES = ("tiny", "small"), (1024, 2048), (1, 32, 128)

Growth = dict[str, dict[int, list[float]]]  # name of a cost -> size -> the cost in every round


def interleaved(
    actions: dict[tuple, Callable[[], object]], rounds: int = ROUNDS, clouds: int = 1
) -> dict:
    """Time actions in turn. Returns the milliseconds per cloud in every round but the first.

    actions: (name of the cost, size) -> action. clouds: number of clouds per action.
    """
    found: dict = {cost: {} for cost, _ in actions}
    for i in range(rounds + 1):
        for (cost, work), action in actions.items():
            began = time.perf_counter()
            action()
            if i:
                found[cost].setdefault(work, []).append(
                    (time.perf_counter() - began) * 1000 / clouds
                )
    return found


def make_encoder(preset: str, **sizes: int) -> PointEncoder:
    """Make the encoder of a preset, with some of its sizes replaced."""
    config = settings.resolve(settings.preset(preset), {"encoder": sizes})
    return PointEncoder(**vars(config.encoder)).eval()


def make_pretraining(batch: int) -> tuple[Task, PointClouds, settings.PretrainConfig]:
    """Make the paper's pretraining task, random clouds for one batch, and the settings."""
    config = settings.resolve({"teacher": ["ema"], "batch_size": batch, "mixed_precision": "no"})
    clouds = PointClouds("random", "", random_clouds(batch, config.encoder.num_points).numpy())
    return make_task(config, "jepa", clouds, {}), clouds, config


@torch.no_grad()
def grow_points() -> Growth:
    """Measure `encoder.embed` and, alone, the `encoder.prepare` in it.

    `prepare` scales clouds to the unit sphere and reduces those of more than 2,048 points by
    farthest point sampling.
    """
    encoder, actions = make_encoder("small"), {}
    for size in CLOUD_SIZES:
        points = random_clouds(CLOUDS, size)
        actions["embed, ms a cloud", size] = partial(encoder.embed, points)
        actions["prepare alone", size] = partial(encoder.prepare, points)
    return interleaved(actions, clouds=CLOUDS)


def grow_tokens() -> Growth:
    """Measure the forward and backward pass of a pretraining step and, alone, the grouping in it.

    Grouping consists of farthest point sampling and the neighbour search.
    """
    objective, actions, flops = make_pretraining(CLOUDS)[0].objective.train(), {}, {}

    def step(points: Tensor, tokens: int) -> None:
        objective.encoder.num_groups = tokens
        objective.zero_grad()
        objective(points, BatchGenerator(0)).loss.backward()

    for tokens in TOKENS:
        points = random_clouds(CLOUDS, 16 * tokens)
        actions["step, ms a cloud", tokens] = partial(step, points, tokens)
        actions["grouping alone", tokens] = partial(group, points, tokens, 32)
        with count_flops() as counter:
            step(points, tokens)
        flops[tokens] = [counter.get_total_flops() / CLOUDS / 1e9]
    return interleaved(actions, clouds=CLOUDS) | {"GFLOP a cloud": flops}


def grow_batch() -> Growth:
    """Measure the time and peak memory of whole training steps."""
    found: Growth = {"ms a step": {}, "ms a cloud": {}, "peak MiB": {}}
    for batch in BATCHES:
        with get_context("spawn").Pool(1) as pool:
            times, found["peak MiB"][batch] = pool.apply(pretraining_steps, (batch,))
        found["ms a step"][batch], found["ms a cloud"][batch] = (
            times,
            [taken / batch for taken in times],
        )
    return found


def pretraining_steps(batch: int) -> tuple[list[float], list[float]]:
    """Run some training steps; returns their milliseconds, and the peak MiB of this process."""
    keep_large_blocks()
    task, clouds, config = make_pretraining(batch)
    task = replace(task, schedule=replace(task.schedule, max_steps=ROUNDS + 2))
    after, ends = task.objective.after_step, []
    task.objective.after_step = lambda progress: (after(progress), ends.append(time.perf_counter()))
    with contextlib.redirect_stdout(io.StringIO()):  # hides the loop's progress
        fit(task, clouds, config, None)
    # Not by getrusage: on Linux, ru_maxrss survives exec and would include the parent's memory.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return (1000 * np.diff(ends)[1:]).tolist(), [
        peak / 2**10
    ]  # the first time is omitted, since it includes the logging of the first step


def grow_shapes() -> Growth:
    """Measure a store: opening it, ordering an epoch, and reading batches in the order of training.

    A batch has 128 clouds of 2,048 points.
    """
    found: Growth = {}
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "points.safetensors"
        save_file({"points": random_clouds(PER_SHARD, POINTS).flatten(0, 1).half().numpy()}, shard)
        for count in SHAPES:
            path = Path(folder) / str(count)
            make_index(path, count)
            store = Store(path)
            for record in store.header["shards"]:
                (path / record["file"]).symlink_to(shard)
            points = StoredPoints(store, np.arange(count), POINTS)
            order = 128, count, points.shard_sizes
            once = {
                ("open", count): partial(Store, path),
                ("order of an epoch", count): partial(epoch_order.__wrapped__, 0, 0, *order[1:]),
            }
            batches = iter([batch_index(0, step, *order) for step in range(31)])
            steps = itertools.count()
            often = {
                ("indices of a batch", count): lambda order=order, steps=steps: batch_index(
                    0, next(steps), *order
                ),
                ("reading a batch", count): lambda points=points, batches=batches: points[
                    next(batches)
                ],
            }
            for cost, of_count in (interleaved(once) | interleaved(often, rounds=30)).items():
                found.setdefault(cost, {}).update(of_count)
    return found


@torch.no_grad()
def throughput() -> dict[int, dict[tuple[str, int, int], list[float]]]:
    """Measure the clouds per second of `encoder.embed` in every round.

    Returns a dict: number of threads -> (preset, points, batch) -> clouds per second.
    """
    everything, actions = torch.get_num_threads(), {}

    def embed(encoder: PointEncoder, points: Tensor, threads: int) -> None:
        torch.set_num_threads(threads)
        encoder.embed(points)

    cases = list(itertools.product((1, everything), PRESETS, EMBED_SIZES, EMBED_BATCHES))
    for threads, preset, size, batch in reversed(
        cases
    ):  # reversed, so that the call that starts further threads is a long one
        encoder, points = make_encoder(preset, num_points=size), random_clouds(batch, size)
        actions[threads, (preset, size, batch)] = partial(embed, encoder, points, threads)
    found = interleaved(actions)
    torch.set_num_threads(everything)
    return {
        threads: {case: [1000 * case[2] / ms for ms in times] for case, times in of.items()}
        for threads, of in found.items()
    }


def medians(figures: dict[int, list[float]]) -> dict[int, float]:
    return {work: median(every) for work, every in figures.items()}


def slope(points: Iterable[tuple[int, float]]) -> float:
    """Return the slope of a line fitted to log cost against log size."""
    return float(np.polyfit(*np.log(list(points)).T, 1)[0])


def formatted(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def print_growth(work: str, growth: Growth) -> None:
    """Print a table with a row per size, a column per cost, and the slopes below."""
    columns = [list(medians(figures).items()) for figures in growth.values()]
    print(f"| {work} | {' | '.join(growth)} |\n|{'---|' * (len(growth) + 1)}")
    for row in zip(*columns, strict=True):
        print(f"| {row[0][0]:,} | {' | '.join(formatted(cost) for _, cost in row)} |")
    for name, first in {"slope": 0, "slope, larger half": len(columns[0]) // 2}.items():
        print(
            f"| {name} | {' | '.join(f'{slope(column[first:]):.2f}' for column in columns)} |",
            flush=True,
        )


def print_throughput(found: dict[int, dict[tuple[str, int, int], list[float]]]) -> None:
    """Print a table: rows are presets and cloud sizes, columns are batch sizes and threads."""
    columns = list(itertools.product(EMBED_BATCHES, found))
    heads = (f"batch {batch}, {threads} thread{'s' * (threads > 1)}" for batch, threads in columns)
    print(f"| clouds/s | {' | '.join(heads)} |\n|{'---|' * (len(columns) + 1)}")
    for preset, size in itertools.product(PRESETS, EMBED_SIZES):
        rates = (median(found[threads][preset, size, batch]) for batch, threads in columns)
        print(f"| {preset}, {size:,} points | {' | '.join(map(formatted, rates))} |", flush=True)


def draw(panels: dict[str, tuple[str, Growth]], path: Path) -> None:
    """Plot costs against size, with one panel per kind of size.

    In each panel, a dashed line of slope 1 goes through the first cost at its largest size.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (work, (unit, growth)) in zip(
        drawing.subplots(1, len(panels)), panels.items(), strict=True
    ):
        for cost, figures in growth.items():
            middle = medians(figures)
            axes.loglog(list(middle), list(middle.values()), "o-", markersize=4, label=cost)
        axes.set_ylim(axes.get_ylim())  # limits are fixed here, since the line may leave the panel
        (*_, (most, highest)) = medians(next(iter(growth.values()))).items()
        axes.loglog(
            [most / 1e5, most],
            [highest / 1e5, highest],
            "--",
            color="gray",
            zorder=0,
            label="slope 1",
        )
        axes.set(xlabel=work, ylabel=unit, xlim=(min(middle) / 1.3, most * 1.3))
        axes.set_xticks(list(middle)[::2], [f"{size:,}" for size in list(middle)[::2]])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        axes.grid(alpha=0.3)
    drawing.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, help="write the plots to this file")
    parser.add_argument("--json", type=Path, help="write the numbers of every round to this file")
    arguments = parser.parse_args()
    keep_large_blocks()  # the command line does this too

    panels = {}
    for work, title, unit, measure in (
        ("points a cloud", "From points to vectors", "ms", grow_points),
        (
            "tokens a cloud",
            "Forward and backward of a pretraining step",
            "ms or GFLOP",
            grow_tokens,
        ),
        ("clouds a batch", "Pretraining steps, 2,048 points", "ms or MiB", grow_batch),
        ("shapes in the store", "Store and epoch order, batch 128; ms", "ms", grow_shapes),
    ):
        growth = measure()
        panels[work] = unit, growth
        print(f"\n{title}: {machine()}\n")
        print_growth(work, growth)
    if arguments.figure:
        draw(panels, arguments.figure)
    rates = throughput()
    print(f"\nEncoder, from points to vectors: {machine()}\n")
    print_throughput(rates)
    if arguments.json:
        figures = {work: growth for work, (_, growth) in panels.items()}
        cases = {
            of: {", ".join(map(str, case)): every for case, every in found.items()}
            for of, found in rates.items()
        }
        arguments.json.write_text(
            json.dumps({"machine": machine(), **figures, "clouds/s, by threads": cases}, indent=1)
        )


if __name__ == "__main__":
    main()
