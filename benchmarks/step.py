"""Compare the pretraining step of jepa3d with the steps of three peers: Point-MAE, Point-JEPA and
point2vec, which run with their own code (see peers.py).

    pip install -e '.[view,fast]'            # Point-MAE imports matplotlib
    python benchmarks/step.py --point-mae DIR --point-jepa DIR --point2vec DIR --json step.json  # checkouts, optional
    python benchmarks/step.py --size tiny    # the objectives of jepa3d alone, preset tiny
    python benchmarks/step.py --mixed-precision bf16 --point-mae DIR --point-jepa DIR  # as `auto` chooses with AMX

Each contender has its own process. All contenders are built and warmed up. Then, in each round,
they take some steps in turn on the same random clouds; the peers always use fp32. So all contenders
must fit into memory together; each takes 1.5 to 3 GiB at batch 32. Loading data is not measured.

A sample is a cloud with one mask: with 2 masks per cloud, a batch has half as many clouds. In the
table, samples/s is the median over rounds; ratios and shares are computed within each round, and
then their median is taken. "tuned" means that glibc keeps large blocks of memory, as in all
commands of jepa3d. GFLOP/sample counts the operations of the forward and backward pass (matrix
products, convolutions and attention), averaged over the warm-up steps, since Point-JEPA and jepa3d
sample the sizes of their target blocks. The GEMM peak is the speed of the fastest product of two
2048 x 2048 fp32 matrices in the same process and round, with the same number of threads.
"""

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import peers
import torch
from common import Training, count_flops, gemm_peak, machine, random_clouds
from torch import nn

from jepa3d import config as settings
from jepa3d.allocator import keep_large_blocks

POINTS = {"small": 1024, "tiny": 512}
WARM_UP = 3


@dataclass(frozen=True)
class Contender:
    """An implementation; `build(*arguments)` returns a model and its step(points) -> loss."""

    build: Callable[..., tuple[nn.Module, peers.Step]]
    arguments: tuple
    tuned: bool = True
    masks: int = 1  # number of masks per cloud


@dataclass(frozen=True)
class Setting:
    """The sizes that are the same for all contenders."""

    batch: int
    points: int
    threads: int


def contenders(arguments: argparse.Namespace) -> dict[str, Contender]:
    """Return all contenders by name."""
    shared: dict = {"mixed_precision": arguments.mixed_precision}
    suffix = "" if arguments.mixed_precision == "no" else f", {arguments.mixed_precision}"
    if arguments.size == "tiny":
        return {
            f"jepa3d tiny, {name}{suffix}": Contender(ours, ("tiny", name, shared))
            for name in ("jepa", "generative", "invariance")
        }
    teachers: dict[str, dict] = {
        "EMA teacher": {"teacher": ["ema"]},
        "EMA teacher, 2 masks a cloud": {"teacher": ["ema"], "sampler": {"masks": 2}},
        "cached frozen teacher": {"teacher": ["untrained"], "target": {"cache": True}},
    }
    shared["encoder"] = {"num_points": POINTS["small"]}
    found = {
        f"jepa3d small, {name}{suffix}": Contender(
            ours,
            ("small", "jepa", shared | overrides),
            masks=overrides.get("sampler", {}).get("masks", 1),
        )
        for name, overrides in teachers.items()
    }
    given = {
        "Point-MAE": (peers.point_mae, arguments.point_mae),
        "Point-JEPA": (peers.point_jepa, arguments.point_jepa),
        "point2vec": (peers.point2vec, arguments.point2vec),
    }
    for name, (build, folder) in given.items():
        if folder:
            found[f"{name}, as shipped"] = Contender(build, (folder.resolve(),), tuned=False)
            found[f"{name}, tuned"] = Contender(build, (folder.resolve(),))
    return found


def ours(preset: str, objective: str, overrides: dict) -> tuple[nn.Module, peers.Step]:
    """Make the model and the step of jepa3d."""
    training = Training(settings.resolve(settings.preset(preset), overrides), objective)
    return training.model, training


def work(pipe: Connection, contender: Contender, setting: Setting) -> None:
    """Run a contender in this process; `pipe` leads to the parent process.

    After the warm-up, send the FLOPs per sample and the number of parameters. Then, for each
    received number of steps, take these steps, and send their seconds and the GEMM peak in FLOP/s.
    The number 0 ends the loop; then send the peak memory.
    """
    if contender.tuned:
        keep_large_blocks()
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    points = random_clouds(setting.batch // contender.masks, setting.points)
    model, step = contender.build(*contender.arguments)
    with count_flops() as counter:
        losses = [step(points).item() for _ in range(WARM_UP)]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"losses {losses}: this is no training step")
    parameters = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    pipe.send(
        {"flop": counter.get_total_flops() / WARM_UP / setting.batch, "parameters": parameters}
    )
    while steps := pipe.recv():
        peak = gemm_peak()
        began = time.perf_counter()
        for _ in range(steps):
            step(points)
        pipe.send((time.perf_counter() - began, peak))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # in GiB, on Linux


def measure(
    found: dict[str, Contender], setting: Setting, rounds: int, steps: int
) -> dict[str, dict]:
    """Measure every contender. In the results, rates and peaks have one entry per round."""
    spawn = multiprocessing.get_context("spawn")
    pipes, figures = {}, {}
    for (
        name,
        contender,
    ) in found.items():  # one after another, so that each contender is built on an idle machine
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, contender, setting), daemon=True).start()
        theirs.close()  # otherwise, this process would wait for a contender that died
        figures[name] = pipes[name].recv() | {"rates": [], "peaks": []}
        print(f"{name}: ready", file=sys.stderr)
    names = list(found)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            pipes[name].send(steps)
            seconds, peak = pipes[name].recv()
            figures[name]["rates"].append(steps * setting.batch / seconds)
            figures[name]["peaks"].append(peak)
    for name, pipe in pipes.items():
        pipe.send(0)
        figures[name]["rss_gib"] = pipe.recv()
    return figures


def print_table(figures: dict[str, dict]) -> None:
    """Print a row per contender.

    Ratios are relative to each contender with a teacher in its name, or to the first contender if
    no name has one.
    """
    bases = [name for name in figures if "teacher" in name] or list(figures)[:1]
    ratios = [f"{name}: times as fast" for name in bases]
    columns = [
        "samples/s (min-max)",
        *ratios,
        "GFLOP/sample",
        "% of GEMM peak",
        "peak RSS, GiB",
        "M parameters trained",
    ]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, part in figures.items():
        rates, flop = part["rates"], part["flop"]
        pairs = [zip(figures[base]["rates"], rates, strict=True) for base in bases]
        times = " | ".join(
            f"{median(ours / theirs for ours, theirs in pair):.2f}" for pair in pairs
        )
        share = median(rate * flop / peak for rate, peak in zip(rates, part["peaks"], strict=True))
        print(
            f"| {name} | {median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}) | {times} | {flop / 1e9:.2f} "
            f"| {100 * share:.0f} | {part['rss_gib']:.2f} | {part['parameters'] / 1e6:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--point-mae", type=Path, help="folder of a checkout of Point-MAE")
    parser.add_argument("--point-jepa", type=Path)
    parser.add_argument("--point2vec", type=Path)
    parser.add_argument("--size", choices=POINTS, default="small")
    parser.add_argument(
        "--mixed-precision", choices=("no", "bf16"), default="no", help="precision of jepa3d"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--json", type=Path, help="write the numbers of every round to this file")
    arguments = parser.parse_args()
    setting = Setting(arguments.batch, POINTS[arguments.size], arguments.threads)
    torch.set_num_threads(setting.threads)
    figures = measure(contenders(arguments), setting, arguments.rounds, arguments.steps)
    print(
        f"\nA pretraining step, {setting.points:,} points, batch {setting.batch}: {machine()}; ",
        end="",
    )
    print(f"median of {arguments.rounds} rounds of {arguments.steps} steps\n")
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), **vars(setting), "contenders": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
