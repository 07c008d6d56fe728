"""Compare the speed of `examples/ray_embed.py` and `jepa3d embed` on one machine, without the time
that they take to start.

    python benchmarks/embed_ray.py             # 1,600 meshes of ModelNet's sizes, 2 rounds: some minutes

Each command runs as a whole process, first on 64 meshes and then on all meshes. The difference
between the two times gives the time per cloud; the remaining time is the start-up. CPU seconds
include all processes, also Ray's own, and are sampled five times a second. They change little if
other programs keep the machine busy, whereas clouds per second then drop. The second table splits
the CPU time of one process into reading, preparing and encoding.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from common import machine
from prepare import make_meshes

from jepa3d import load
from jepa3d.inference.clouds import find_clouds
from jepa3d.inference.embedding import see

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_embed.py"
FEW, PARTITIONS = 64, 16


def measured(command: list[str]) -> np.ndarray:
    """Run a command; returns its wall-clock seconds, and the CPU seconds of all its processes."""
    begun, used = time.perf_counter(), {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            for process in [
                psutil.Process(running.pid),
                *psutil.Process(running.pid).children(recursive=True),
            ]:
                with suppress(psutil.NoSuchProcess):
                    used[process.pid] = sum(process.cpu_times()[:2])
            time.sleep(0.2)
    if running.returncode:
        raise SystemExit(f"failed: {' '.join(command)[:200]}")
    return np.array([time.perf_counter() - begun, sum(used.values())])


def parts(folder: Path) -> str:
    """Measure reading, preparing and encoding in one process with one thread.

    Returns the CPU milliseconds per cloud as cells of a table.
    """
    torch.set_num_threads(1)
    encoder, spent = load(), np.zeros(3)
    items = find_clouds(folder)[0][:512]
    for at in range(-32, len(items), 32):  # the first batch is a warm-up
        some = items[max(at, 0) : max(at, 0) + 32]
        times = [time.process_time()]
        clouds = [item.read() for item in some]
        times.append(time.process_time())
        ready = [
            see(encoder, replace(item, read=lambda cloud=cloud: cloud), "z").frame.points
            for cloud, item in zip(clouds, some, strict=True)
        ]
        times.append(time.process_time())
        with torch.inference_mode():
            encoder.vectors(torch.from_numpy(np.stack(ready)))
        times.append(time.process_time())
        spent += np.diff(times) * (at >= 0)
    return " | ".join(f"{1000 * each / len(items):.1f}" for each in (*spent, spent.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    jepa3d = [sys.executable, "-c", "from jepa3d.cli import main; main()"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_meshes(work / "all", options.count)
        files = sorted(str(file) for file in (work / "all").rglob("*.off"))
        for kind, some in (("few", files[:FEW]), ("all", files)):
            (work / kind / "lists").mkdir(parents=True, exist_ok=True)
            for part in range(PARTITIONS):
                (work / kind / "lists" / f"{part:02d}").write_text(
                    "\n".join(some[part::PARTITIONS])
                )
        ways = {
            "jepa3d embed --workers 1": [
                *jepa3d,
                "embed",
                "--workers",
                "1",
                "--out",
                str(work / "v.parquet"),
            ],
            "jepa3d embed --workers 2": [
                *jepa3d,
                "embed",
                "--workers",
                "2",
                "--out",
                str(work / "v.parquet"),
            ],
            "examples/ray_embed.py": [sys.executable, str(EXAMPLE)],
        }
        found: dict[str, list[np.ndarray]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, command in ways.items():
                spent = []
                for kind, some in (("few", files[:FEW]), ("all", files)):
                    (work / "v.parquet").unlink(missing_ok=True)
                    shutil.rmtree(work / "vectors", ignore_errors=True)
                    ray = way.startswith("examples")
                    spent.append(
                        measured(
                            [
                                *command,
                                *(
                                    [str(work / kind / "lists"), str(work / "vectors")]
                                    if ray
                                    else some
                                ),
                            ]
                        )
                    )
                each = (spent[1] - spent[0]) / (len(files) - FEW)
                found[way].append(np.concatenate([each, spent[0] - FEW * each]))
        clouds = work / "clouds"
        clouds.mkdir()
        for i in range(512):
            np.save(
                clouds / f"{i}.npy",
                np.random.default_rng(i).normal(size=(2048, 3)).astype(np.float32),
            )
        split = {".npy of 2,048 points": parts(clouds), "meshes": parts(work / "all")}
    print(
        f"\n{len(files):,} meshes: {machine()}, load {os.getloadavg()[2]:.1f}; medians of {options.rounds} rounds\n"
    )
    print(
        "| | clouds/s | CPU ms per cloud | start-up, s | start-up, CPU s |\n|---|---|---|---|---|"
    )
    for way in ways:
        wall, cpu, start, start_cpu = np.median(found[way], 0)
        print(f"| `{way}` | {1 / wall:.0f} | {1000 * cpu:.1f} | {start:.0f} | {start_cpu:.0f} |")
    print(
        "\n| CPU ms per cloud, in one process | read | prepare | encode | all |\n|---|---|---|---|---|"
    )
    for kind, row in split.items():
        print(f"| {kind} | {row} |")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
