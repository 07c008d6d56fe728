"""Compare `jepa3d prepare` with the script that people usually write, on many generated meshes.

    python benchmarks/prepare.py                            # 800 meshes, 3 rounds: some minutes
    python benchmarks/prepare.py --count 4899 --rounds 1    # as many meshes as ModelNet10 has

The meshes have sizes like those of ModelNet. The script is prepare_baseline.py, the baseline. Whole
processes are timed, including their start; the programs run in turn, and times are medians over
rounds. The baseline samples 2,048 points. jepa3d does more: it samples 4,096 points, puts 2,048 of
them into farthest point order, computes hashes, and checks the result. Memory is measured in
separate runs, on two and on eight hard links to each mesh, so that only the number of files
differs. Finally, the speed of loading clouds from files and from a store is compared with the speed
of a training step.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
import trimesh

from jepa3d import config as settings
from jepa3d.data import synthetic
from jepa3d.data.datasets import load
from jepa3d.data.lofts import triangles_of
from jepa3d.data.prepare import Preparation, convert
from jepa3d.data.sources import discover
from jepa3d.training.loop import fit
from jepa3d.training.pretrain import make_task

CLASSES = (
    "bathtub",
    "bed",
    "chair",
    "desk",
    "dresser",
    "lamp",
    "sofa",
    "table",
    "vase",
    "airplane",
)
FACES = (300, 60_000)  # range of the number of faces of a mesh, sampled log-uniformly
BASELINE = Path(__file__).with_name("prepare_baseline.py")
# For loading: points per cloud and clouds per batch as in preset tiny; training steps that are not
# timed, and all training steps.
POINTS, BATCH, SKIP, STEPS = 512, 32, 20, 60


def make_meshes(folder: Path, count: int, seed: int = 0) -> int:
    """Make meshes in files CLASS/train/CLASS_00001.off and CLASS/test/CLASS_00041.off.

    In every second mesh, faces share no vertices. Returns the number of all faces.
    """
    total = 0
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        name = CLASSES[i % len(CLASSES)]
        faces = [
            triangles_of(loft)
            for _, *lofts in synthetic._CLASSES[name][1](rng, rng.uniform)
            for loft in lofts
        ]
        soup = np.concatenate(faces).reshape(-1, 3) * 40
        vertices, faces = soup, np.arange(len(soup)).reshape(-1, 3)
        if i % 2:
            vertices, index = np.unique(soup.round(5), axis=0, return_inverse=True)
            faces = index.reshape(-1, 3)
        target = int(np.exp(rng.uniform(*np.log(FACES))))
        while len(faces) + 3 <= target:  # cutting a face into four adds three
            some = rng.permutation(len(faces))[: (target - len(faces)) // 3]
            vertices, faces = trimesh.remesh.subdivide(vertices, faces, some)
        path = (
            folder
            / name
            / ("test" if i // len(CLASSES) % 5 == 4 else "train")
            / f"{name}_{i:05d}.off"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "OFF",
            f"{len(vertices)} {len(faces)} 0",
            *("{:.6f} {:.6f} {:.6f}".format(*v) for v in vertices),
        ]
        path.write_text(
            "\n".join([*lines, *("3 {} {} {}".format(*f) for f in faces.tolist())]) + "\n"
        )
        total += len(faces)
    return total


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """Return a dict from the names of the compared programs to their commands."""
    ours = [
        sys.executable,
        "-c",
        "from jepa3d.cli import main; main()",
        "prepare",
        str(folder),
        "--points",
        "2048",
    ]
    return {
        "baseline": [sys.executable, str(BASELINE), str(folder), str(out)],
        "jepa3d, 1 worker": [*ours, "--out", str(out), "--workers", "1"],
        "jepa3d, 2 workers": [*ours, "--out", str(out), "--workers", "2"],
    }


def run(command: list[str], sample: bool = False) -> tuple[float, float, float]:
    """Run a command; returns its seconds and two numbers of MiB.

    The numbers of MiB are the peak of its largest process, and the peak of all its processes
    together. They are sampled every 20 ms if `sample` is True, else they are 0. getrusage isn't
    used, because on Linux ru_maxrss survives exec and would include the memory of this process.
    """
    began, largest, together = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while sample and process.poll() is None:
        high, now = _memory(process.pid)
        largest, together = max(largest, high), max(together, now)
        time.sleep(0.02)
    if process.wait():
        raise RuntimeError(f"{command} failed")
    return time.perf_counter() - began, largest / 2**10, together / 2**10


def _memory(pid: int) -> tuple[int, int]:
    """Return two numbers of KiB for a process and its descendants: the largest peak (VmHWM) of one
    process, and the sum of their current sizes (VmRSS), in which shared pages count several times.
    """
    high, total = 0, 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(OSError):  # the process may have ended meanwhile
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                fields = {
                    line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")
                }
                high, total = (
                    max(high, int(fields.get("VmHWM", 0))),
                    total + int(fields.get("VmRSS", 0)),
                )
    return high, total


def loader(folder: Path, store: Path, rounds: int) -> dict[str, list[float]]:
    """Measure clouds per second in every round.

    The three rates are those of training steps of preset tiny, of one worker of `prepare` that
    reads files, and of reading batches from a store.
    """
    config = settings.resolve(settings.preset("tiny"), {"mixed_precision": "no"})
    synthetic_clouds, stored = load(("synthetic:512",), POINTS), load((str(store),), POINTS, "all")
    entries, options = discover(folder).entries, Preparation(points=POINTS)
    rates: dict[str, list[float]] = {"step": [], "files": [], "store": []}
    threads = torch.get_num_threads()
    for i in range(rounds):
        times: list[float] = []
        task = make_task(config, "jepa", synthetic_clouds, {})
        task = replace(task, schedule=replace(task.schedule, max_steps=STEPS))
        after = task.objective.after_step
        task.objective.after_step = lambda at, after=after, times=times: (
            after(at),
            times.append(time.perf_counter()),
        )
        fit(task, synthetic_clouds, replace(config, log_every=STEPS), None)
        rates["step"].append((STEPS - SKIP) * BATCH / (times[-1] - times[SKIP - 1]))

        torch.set_num_threads(1)  # as in a worker process of prepare
        some = entries[i::rounds]
        began = time.perf_counter()
        for entry in some:
            convert(entry, options)
        rates["files"].append(len(some) / (time.perf_counter() - began))
        torch.set_num_threads(threads)

        order = np.random.default_rng(i).integers(len(stored), size=(200, BATCH))
        began = time.perf_counter()
        for index in order:
            stored.batch(index)
        rates["store"].append(order.size / (time.perf_counter() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        few = scratch / "few"
        faces = make_meshes(few, arguments.count)
        for path in sorted(few.rglob("*.off")):
            for copies in (2, 8):
                for copy in range(copies):
                    link = (
                        scratch
                        / str(copies)
                        / path.relative_to(few).with_stem(f"{path.stem}_{copy}")
                    )
                    link.parent.mkdir(parents=True, exist_ok=True)
                    os.link(path, link)
        size = sum(path.stat().st_size for path in few.rglob("*.off")) / 2**20
        print(
            f"{arguments.count} meshes, {faces:,} faces, {size:.0f} MiB; {os.cpu_count()} cores\n",
            flush=True,
        )

        names = list(commands(few, scratch))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for i in range(arguments.rounds):
            for name in names[i % 3 :] + names[: i % 3]:
                out = scratch / f"out-{i}-{names.index(name)}"
                seconds[name].append(run(commands(few, out)[name])[0])
        print("| | seconds, each round | median | times as fast |\n|---|---|---|---|")
        for name in names:
            ratio = median(b / s for b, s in zip(seconds["baseline"], seconds[name], strict=True))
            every = " ".join(f"{s:.1f}" for s in seconds[name])
            print(f"| {name} | {every} | {median(seconds[name]):.1f} | {ratio:.2f} |", flush=True)
        print(
            "\n| jepa3d, 2 workers | largest process, MiB | all processes (shared pages count in each) |\n|---|---|---|"
        )
        for copies in (2, 8):
            out = scratch / f"memory-{copies}"
            _, own, tree = run(
                commands(scratch / str(copies), out)["jepa3d, 2 workers"], sample=True
            )
            print(f"| {copies * arguments.count:,} files | {own:.0f} | {tree:.0f} |", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):  # hides the loop's progress
            rates = loader(few, scratch / "out-0-2", arguments.rounds)
        print(
            f"\n| {POINTS} points | clouds/s, each round | median | relative to the step |\n|---|---|---|---|"
        )
        names = {
            "step": "step of preset tiny",
            "files": "files, one worker",
            "store": "batches of a store",
        }
        for name, what in names.items():
            ratio = median(r / s for r, s in zip(rates[name], rates["step"], strict=True))
            every = " ".join(f"{r:,.0f}" for r in rates[name])
            print(f"| {what} | {every} | {median(rates[name]):,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
