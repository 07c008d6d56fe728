"""Compare the speed of `jepa3d embed` with the script that people usually write.

    python benchmarks/embed.py                 # 1,600 meshes of ModelNet's sizes, 3 rounds: some minutes
    python benchmarks/embed.py --folder DIR    # your own .off files

That script is embed_baseline.py: one process, batches of 32, the same encoder. Whole processes are
measured, including their start, and the programs run in turn. Times are medians over rounds; ratios
of times are computed within each round, and then their median is taken. `jepa3d embed` is also
measured on a store of the same shapes, and in a second call, when no file is new.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import machine
from prepare import make_meshes

BASELINE = Path(__file__).with_name("embed_baseline.py")


def seconds(command: list[str]) -> float:
    """Run a command and return its seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    jepa3d = [sys.executable, "-c", "from jepa3d.cli import main; main()"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = options.folder or work / "meshes"
        if not options.folder:
            make_meshes(folder, options.count)
        count = len(list(folder.rglob("*.off")))
        subprocess.run(
            [*jepa3d, "prepare", str(folder), "--out", str(work / "store")],
            check=True,
            capture_output=True,
        )
        out = work / "v.parquet"
        ways = {
            "baseline": [sys.executable, str(BASELINE), str(folder), str(work / "v.npy")],
            "jepa3d embed": [*jepa3d, "embed", str(folder), "--out", str(out)],
            "jepa3d embed --workers 1": [
                *jepa3d,
                "embed",
                str(folder),
                "--out",
                str(out),
                "--workers",
                "1",
            ],
            "jepa3d embed, of a store": [*jepa3d, "embed", str(work / "store"), "--out", str(out)],
        }
        times: dict[str, list[float]] = {way: [] for way in ways} | {
            "jepa3d embed, nothing new": []
        }
        for _ in range(options.rounds):
            for way, command in ways.items():
                out.unlink(missing_ok=True)
                times[way].append(seconds(command))
                if way == "jepa3d embed":
                    times["jepa3d embed, nothing new"].append(seconds(command))
    print(f"\n{count:,} meshes: {machine()}; medians of {options.rounds} rounds\n")
    print("| | s | clouds/s | times as fast as the baseline |\n|---|---|---|---|")
    for way, values in times.items():
        ratio = median(base / value for base, value in zip(times["baseline"], values, strict=True))
        print(f"| {way} | {median(values):.1f} | {count / median(values):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    os.environ.pop("OMP_NUM_THREADS", None)
    main()
