"""Run every command of the README on small data, first alone and then while another process keeps a
core busy. Print the seconds of each command, its processor seconds, and the ratio of seconds.

    python benchmarks/readme.py [--steps 50] [--only embed probe] [--demo]

All commands run in order in a temporary folder, and then again in a new folder beside a loop that
keeps one core busy at lower priority (nice 10). Training is shortened to --steps steps. A command
whose threads wait actively for each other takes many times as long beside the loop as alone. The
exit status is 1 if any command takes more than twice as long as alone. `view` is omitted, since it
waits for the user. --demo adds `jepa3d demo` with as many steps.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jepa3d.data.synthetic import make_shapes

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-c", "from jepa3d.cli import main; main()"]
# command -> prefixes of its settings max-steps, one for each stage of training
STAGES = {"pretrain": ("", "generative.", "invariance."), "classify": ("",), "segment": ("",)}


def commands(steps: int) -> list[list[str]]:
    """Return the jepa3d commands of the README as lists of words, with shortened training."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    found = [words[1:] for words in lines if words[:1] == ["jepa3d"] and words[1] != "view"]
    for words in found:
        for stage in STAGES.get(words[0], ()) if "--out" in words else ():
            words += [f"--{stage}max-steps", str(steps)]
    return found


def write_data(folder: Path) -> None:
    """Write the input of the commands: a folder of clouds, a scan, labelled shapes, and shapes with
    part labels.
    """
    made = make_shapes(300, 2048, seed=1)
    (folder / "scans").mkdir()
    for i, points in enumerate(made["points"][:100]):
        np.save(folder / "scans" / f"{i}.npy", points)
    np.savetxt(folder / "scan.xyz", made["points"][0])
    labels, split = np.arange(300) // 3 % 5, (np.arange(300) % 3 > 0).astype(np.int8)
    common = {
        "points": made["points"],
        "labels": labels,
        "split": split,
        "class_names": [f"kind{i}" for i in range(5)],
    }
    np.savez(folder / "labelled.npz", **common)
    np.savez(folder / "parts.npz", **common, seg=2 * labels[:, None] + (made["points"][..., 2] > 0))
    (folder / "recipes").symlink_to(ROOT / "recipes")


@contextmanager
def busy_core(wanted: bool):
    """Keep one core busy until the block ends, if `wanted`."""
    loop = (
        subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", "while True: pass"])
        if wanted
        else None
    )
    try:
        yield
    finally:
        if loop:
            loop.kill()
            loop.wait()


def run(words: list[str], folder: Path) -> tuple[float, float]:
    """Run a command; returns its wall-clock seconds and its processor seconds.

    Processor seconds include the processes for which the command waited.

    Raises SystemExit if the command fails.
    """
    with (folder / "said.txt").open("w+") as said:
        began = time.perf_counter()
        started = subprocess.Popen(
            [*PROGRAM, *words], cwd=folder, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        if started.returncode:
            said.seek(0)
            sys.exit(
                f"jepa3d {shlex.join(words)}: exit status {started.returncode}\n{said.read()[-2000:]}"
            )
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--only", nargs="+", help="report only these commands; the commands before them run too"
    )
    parser.add_argument("--demo", action="store_true")
    options = parser.parse_args()
    todo = commands(options.steps)
    if options.demo:
        todo.append(["demo", "--max-steps", str(options.steps), "--out", "demo"])
    if options.only:
        todo = todo[: 1 + max(i for i, words in enumerate(todo) if words[0] in options.only)]
    times: dict[bool, list[tuple[float, float]]] = {}
    for beside in (False, True):
        with tempfile.TemporaryDirectory() as name, busy_core(beside):
            write_data(Path(name))
            times[beside] = [run(words, Path(name)) for words in todo]
    print(f"{os.cpu_count()} cores; seconds (processor seconds)\n")
    print("| command | alone | beside a busy core | ratio |\n|---|---|---|---|")
    slow = 0
    for words, alone, beside in zip(todo, times[False], times[True], strict=True):
        if options.only and words[0] not in options.only:
            continue
        ratio = beside[0] / alone[0]
        slow += ratio > 2
        cells = (f"{wall:.1f} ({cpu:.1f})" for wall, cpu in (alone, beside))
        print(f"| `{shlex.join(words[:2])}` | {' | '.join(cells)} | {ratio:.2f} |")
    sys.exit(f"{slow} commands take more than twice as long as alone" if slow else 0)


if __name__ == "__main__":
    main()
