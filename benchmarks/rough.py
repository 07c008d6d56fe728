"""Test rough handling hundreds of times: killed commands, two writers at once, damaged files.
Finished results must survive, and later commands must work.

    python benchmarks/rough.py --count 100                    # number of tries per part
    python benchmarks/rough.py --part kills --count 30 --seed 1 --commands pretrain embed

The tests have three parts:

- kills: A command that writes is stopped at a random moment, by SIGKILL or by Ctrl-C to its process
  group. Sometimes it is started and stopped again. Then it runs to its end, and must give the same
  result as an undisturbed command.
- two-writers: A command runs twice at the same time with the same output, and then once more.
- damage: A file of a run, a store, vectors or an index gets a flipped bit, is cut in half, emptied
  or removed. Then every command that reads the result runs.

Try i depends only on --seed and i. The script prints one table, also after Ctrl-C. The first three
columns count tries, tries in which a command was stopped or failed, and tries in which every
command ended normally. The other columns count faults: "lost" means that a result cannot be read,
"blocked" that a command cannot succeed any more, and "unnoticed" that a run continued with a
damaged file and gave another result. If there is any fault, the exit status is 1.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import jepa3d.demo
import jepa3d.inference.embed_files
import jepa3d.inference.label
import jepa3d.inference.predicting
import jepa3d.inference.scene
import jepa3d.info
import jepa3d.report
import jepa3d.training.fewshot
import jepa3d.training.finetune
import jepa3d.training.pretrain  # noqa: F401
from jepa3d.cli import main
from jepa3d.data.store import Store
from jepa3d.inference.vectors import Vectors, to_numpy

UNREADABLE = "cannot be read: "
LIMIT = 120  # seconds after which a command counts as hanging
FAULTS = (
    "lost",
    "blocked",
    "traceback",
    "processes left",
    "files left",
    "differs",
    "unnoticed",
    "hangs",
)
SIZES = {
    "embed-dim": 16,
    "depth": 2,
    "num-heads": 2,
    "num-groups": 8,
    "group-size": 8,
    "num-points": 56,
    "tokenizer-dim": 8,
}
ENCODER = [word for name, value in SIZES.items() for word in (f"--encoder.{name}", str(value))]
STEPS = ["--batch-size", "8", "--checkpoint-every", "3", "--log-every", "2"]


@dataclass(frozen=True)
class Job:
    """A command that writes to a path, and a function that reads its result for a comparison."""

    words: Callable[[Path], list[str]]  # path of the output -> words of the command
    suffix: str  # suffix of the path of the output
    result: Callable[[Path], object]
    resumes: bool = False

    def again(self, out: Path) -> list[str]:
        """Return the words that repeat the command, with --resume if it can continue a run."""
        resume = self.resumes and (out / "config.json").exists()
        return [self.words(out)[0], "--out", str(out), "--resume"] if resume else self.words(out)


# ------------------------------------------------------------------------------- material, commands


def make_shapes(folder: Path) -> None:
    """Make 48 clouds in three classes, and a scene.

    The clouds are written twice: as files in the splits train and test, and as a bundle with part
    labels.
    """
    rng, labels = np.random.default_rng(0), np.arange(48) % 3
    points = (
        rng.normal(size=(48, 96, 3)) * np.array([[1, 1, 1], [1, 1, 6], [1, 6, 6]])[labels][:, None]
    )
    for i, cloud in enumerate(points):
        file = (
            folder
            / "shapes"
            / ("test" if i % 4 == 3 else "train")
            / f"kind{labels[i]}"
            / f"{i}.npy"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, cloud)
    np.savez(
        folder / "parts.npz",
        points=points.astype(np.float32),
        labels=labels,
        split=np.int8(np.arange(48) % 4 // 3),
        seg=(2 * labels[:, None] + (points[..., 0] > 0)).astype(np.int16),
        class_names=[f"kind{i}" for i in range(3)],
    )
    np.save(folder / "scan.npy", rng.normal(size=(4000, 3)) * [3, 3, 0.3])
    files = sorted((folder / "shapes").rglob("*.npy"))
    rows = [f"{file},{file.parent.name}" for file in files[::4]]
    (folder / "names.csv").write_text("\n".join(["path,name", *rows]) + "\n")


def jobs(base: Path) -> dict[str, Job]:
    """Return the jobs of all commands that write. base: folder of their input."""
    shapes, store, run = str(base / "shapes"), str(base / "prepare"), str(base / "pretrain")
    data = ["--data", store, "--max-steps", "12", *STEPS]

    def job(suffix, result, *words, resumes=False) -> Job:
        return Job(lambda out: [*words, "--out", str(out)], suffix, result, resumes)

    masks = ["--sampler.name", "random", "--sampler.mask-ratio", "0.5", "--teacher", "ema"]
    parts = ["--data", str(base / "parts.npz"), "--max-steps", "8", *STEPS]
    few = [
        "--ways",
        "2",
        "--shots",
        "3",
        "--queries",
        "3",
        "--folds",
        "2",
        "--max-steps",
        "6",
        *STEPS,
    ]
    return {
        "prepare": job("", clouds_in, "prepare", shapes, "--points", "64", "--workers", "2"),
        "pretrain": job("", weights_in, "pretrain", *masks, *data, *ENCODER, resumes=True),
        "classify": job("", weights_in, "classify", *data, *ENCODER, resumes=True),
        "segment": job("", weights_in, "segment", *parts, *ENCODER, resumes=True),
        "fewshot": job("", folds_in, "fewshot", "--data", store, *few, "--init", run, resumes=True),
        "embed": job(".parquet", vectors_in, "embed", shapes, "--model", run, "--workers", "2"),
        "index": job(".lancedb", rows_in, "index", str(base / "embed.parquet")),
        "label": job(
            "", labels_in, "label", shapes, "--model", run, "--names", str(base / "names.csv")
        ),
        "scene": job(".ply", Path.read_bytes, "scene", str(base / "scan.npy"), "--model", run),
        "export": job("", weights_in, "export", run),
    }


def weights_in(out: Path) -> dict[str, bytes]:
    folder = next(
        f
        for f in (out / "encoder", out / "model", out / "hub", out)
        if (f / "model.safetensors").is_file()
    )
    return {
        name: values.tobytes() for name, values in load_file(folder / "model.safetensors").items()
    }


def folds_in(out: Path) -> list[float]:
    return json.loads((out / "results.json").read_text())["details"]["folds"]


def clouds_in(out: Path) -> dict[str, bytes]:
    store = Store(out)
    store.verify()
    return {store.key(row): store.points(row).tobytes() for row in range(len(store))}


def vectors_in(out: Path) -> dict[str, bytes]:
    vectors = Vectors(out)
    rows = np.concatenate([to_numpy(batch.column(0)) for batch in vectors.batches(["vector"])])
    return {
        path: row.round(3).tobytes() for path, row in zip(vectors.column("path"), rows, strict=True)
    }


def rows_in(out: Path) -> int:
    from jepa3d.inference.lance import VectorStore

    return len(VectorStore(out))


def labels_in(out: Path) -> list[str]:
    return sorted(line.split(",")[0] for line in (out / "labels.csv").read_text().splitlines())


# ---------------------------------------------------------------------------------------- processes


def start(words: list[str], log: Path) -> int:
    """Start a command in a new process with its own session; returns the number of the process.

    The process is forked from this one, so that it need not import anything.
    """
    process = os.fork()
    if process:
        return process
    os.setsid()
    # otherwise, the end of the child would delete temporary folders of its parent
    weakref.finalize._registry.clear()  # pyrefly: ignore
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyrefly: ignore
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def finish(process: int, seconds: float = LIMIT) -> int | None:
    """Wait for a process.

    Returns its exit status, or minus the number of the signal that ended it, or None if it hung.
    """
    end, done = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end and not done:
            done, status = os.waitpid(process, os.WNOHANG)
            time.sleep(0 if done else 0.005)
    finally:
        if not done:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) if done else None


def left(session: int, patience: float = 60) -> list[str]:
    """Return the processes of a session that still exist after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        there = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    there.append(stat.parent.name)
        if not there or time.monotonic() > end:
            return there
        time.sleep(0.05)


class Rough:
    """A folder with the input of commands, the results of undisturbed commands, and counts."""

    def __init__(self, base: Path, seed: int, commands: list[str] | None = None):
        self.base, self.seed = base, seed
        self.counts: dict[tuple[str, str], Counter] = {}
        self.shown: list[str] = []
        make_shapes(base)
        self.jobs, self.whole, self.seconds = jobs(base), {}, {}
        wanted = {"prepare", "pretrain", *(commands or self.jobs)}
        wanted |= {"embed"} & ({"embed"} if "index" in wanted else set())
        for name in (name for name in self.jobs if name in wanted):
            began, out = time.monotonic(), self.place(name, base)
            if code := self.run(name, self.jobs[name].words(out)):
                self.fault("undisturbed", name, "blocked", f"exit {code}: {self.said()}")
                continue
            self.whole[name], self.seconds[name] = self.result(name, out), time.monotonic() - began
        self.tried = [name for name in self.whole if name in (commands or self.jobs)]

    def result(self, name: str, out: Path) -> str:
        """Return a checksum of a command's result, or a text that says why it cannot be read.

        The result is read in a separate process.
        """
        there, process = self.base / "result", os.fork()
        if not process:
            try:
                found = self.jobs[name].result(out)
                found = sorted(found.items()) if isinstance(found, dict) else found
                there.write_text(hashlib.sha256(repr(found).encode()).hexdigest())
            except (OSError, ValueError, StopIteration, KeyError) as error:
                there.write_text(f"{UNREADABLE}{error!r}")
            os._exit(0)
        finish(process)
        return there.read_text()

    def place(self, name: str, folder: Path) -> Path:
        return folder / f"{name}{self.jobs[name].suffix}"

    def run(self, name: str, words: list[str]) -> int | None:
        return self.check(name, finish(start(words, self.base / "log")))

    def said(self) -> str:
        return (self.base / "log.err").read_text(errors="replace")[-2000:]

    def check(self, row: str, code: int | None, log: str = "log", part: str = "") -> int | None:
        """Count a fault if a command hung, printed a traceback or had a strange exit status."""
        text = (self.base / f"{log}.err").read_text(errors="replace")
        if code is None:
            self.fault(part, row, "hangs", text)
        elif "Traceback" in text or code not in (0, 2, 130, -signal.SIGKILL, -signal.SIGINT):
            self.fault(part, row, "traceback", f"exit {code}: {text[-1500:]}")
        return code

    def count(self, part: str, row: str, what: str) -> None:
        self.counts.setdefault((part, row), Counter())[what] += 1

    def fault(self, part: str, row: str, what: str, history: str) -> None:
        self.count(part, row, what)
        self.shown.append(f"{part} {row}: {what}: {history}")

    def compare(self, part: str, name: str, out: Path, history: str = "") -> None:
        """Count a fault if a result differs from that of the undisturbed command, or cannot be
        read, or if temporary files are left beside it.
        """
        found = self.result(name, out)
        if found.startswith(UNREADABLE):
            self.fault(part, name, "lost", f"{found} {history}")
        elif found != self.whole[name]:
            self.fault(part, name, "differs", history)
        beside = [
            path.name
            for path in out.parent.rglob(".*")
            if path.suffix in (".partial", ".old", ".parts")
        ]
        if beside or any("unpacked" in path.name for path in out.parent.iterdir()):
            self.fault(part, name, "files left", f"{beside} {history}")

    # ---------------------------------------------------------------------------------------- kills

    def kill(self, number: int) -> None:
        """Run one try of the part kills."""
        draw = random.Random(f"{self.seed} kill {number}")
        name = self.tried[number % len(self.tried)]
        job, part = self.jobs[name], "kills"
        with tempfile.TemporaryDirectory(dir=self.base) as folder:
            out = self.place(name, Path(folder))
            history = []
            for _ in range(draw.choice((1, 1, 2))):
                sign, after = (
                    draw.choice((signal.SIGKILL, signal.SIGINT)),
                    draw.uniform(0, self.seconds[name]),
                )
                process = start(job.again(out), self.base / "log")
                time.sleep(after)
                with contextlib.suppress(ProcessLookupError):
                    (os.kill if sign == signal.SIGKILL else os.killpg)(process, sign)
                code = self.check(name, finish(process, 20), part=part)
                history.append(f"{sign.name} after {after:.2f} s")
                self.count(part, name, "tries")
                self.count(part, name, "ended before" if code == 0 else "stopped")
                if there := left(process):
                    self.fault(part, name, "processes left", f"{there} {history}")
            code = self.check(name, finish(start(job.again(out), self.base / "log")), part=part)
            if code:
                self.fault(part, name, "blocked", f"{history}: {self.said()}")
            else:
                self.compare(part, name, out, str(history))

    # ---------------------------------------------------------------------------------- two writers

    def twice(self, number: int) -> None:
        """Run one try of the part two-writers."""
        draw = random.Random(f"{self.seed} twice {number}")
        name = self.tried[number % len(self.tried)]
        job, part = self.jobs[name], "two writers"
        with tempfile.TemporaryDirectory(dir=self.base) as folder:
            out = self.place(name, Path(folder))
            first = start(job.again(out), self.base / "log1")
            time.sleep(draw.choice((0, draw.uniform(0, self.seconds[name]))))
            second = start(job.again(out), self.base / "log")
            codes = [
                self.check(name, finish(p), log, part)
                for p, log in ((first, "log1"), (second, "log"))
            ]
            self.count(part, name, "tries")
            self.count(part, name, "stopped" if any(codes) else "ended before")
            if all(codes):
                self.fault(part, name, "blocked", f"both end with {codes}: {self.said()}")
            code = 0 if job.resumes or name == "export" else self.run(name, job.again(out))
            if code:
                self.fault(part, name, "blocked", self.said())
            self.compare(part, name, out, f"{codes}")

    # --------------------------------------------------------------------------------------- damage

    def damage(self, number: int) -> None:
        """Run one try of the part damage."""
        draw = random.Random(f"{self.seed} damage {number}")
        kinds = [kind for kind in self.readers() if kind.split(",")[0] in self.tried]
        kind = kinds[number % len(kinds)]
        part, name = "damage", kind.split(",")[0]
        with tempfile.TemporaryDirectory(dir=self.base) as folder:
            out = self.place(name, Path(folder))
            source = self.place(name, self.base)
            if kind.endswith("unfinished"):
                source = self.unfinished(name)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, out)
            files = sorted(
                path for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file()
            )
            file = draw.choice([path for path in files if path.suffix != ".md"])
            how = draw.choice(("flip", "flip", "cut off", "emptied", "removed"))
            spoil(file, how, draw)
            for words in self.readers()[kind]:
                words = [word.replace("OUT", str(out)).replace("DIR", folder) for word in words]
                code = self.check(kind, finish(start(words, self.base / "log")), part=part)
                history = f"{file.relative_to(folder)} {how}, {words[0]}"
                self.count(part, kind, "tries")
                self.count(part, kind, "stopped" if code else "ended before")
                if code == 2 and self.said().count("\n") != 1:
                    self.fault(
                        part, kind, "traceback", f"{history}: more than a line: {self.said()}"
                    )
                if code == 0 and "--resume" in words and self.result(name, out) != self.whole[name]:
                    self.fault(part, kind, "unnoticed", history)

    def readers(self) -> dict[str, list[list[str]]]:
        """Return a dict: name of a command, perhaps ",unfinished" -> commands that read its output."""
        shapes = str(self.base / "shapes")
        query = [sorted(map(str, (self.base / "shapes").rglob("*.npy")))[0]]
        train = [
            "pretrain",
            "--data",
            "OUT",
            "--teacher",
            "ema",
            *ENCODER,
            *STEPS,
            "--max-steps",
            "2",
            "--out",
            "DIR/new",
        ]
        masks = ["--sampler.name", "random", "--sampler.mask-ratio", "0.5"]
        return {
            "pretrain,unfinished": [["info", "OUT"], ["pretrain", "--out", "OUT", "--resume"]],
            "classify,unfinished": [["info", "OUT"], ["classify", "--out", "OUT", "--resume"]],
            "pretrain": [
                ["info", "OUT"],
                ["report", "OUT"],
                ["embed", shapes, "--model", "OUT", "--out", "DIR/v.parquet"],
            ],
            "classify": [
                ["info", "OUT"],
                ["report", "OUT"],
                ["predict", "OUT", *query, "--out", "DIR/p.csv"],
            ],
            "fewshot": [["info", "OUT"], ["results", "OUT"]],
            "prepare": [["info", "OUT"], ["info", "OUT", "--verify"], [*train, *masks]],
            "embed": [
                ["search", "OUT", *query],
                ["embed", shapes, "--model", str(self.base / "pretrain"), "--out", "OUT"],
            ],
            "index": [
                ["search", "OUT", *query],
                ["index", str(self.base / "embed.parquet"), "--out", "OUT"],
            ],
        }

    def unfinished(self, name: str) -> Path:
        """Start a run, and kill it soon after its second checkpoint. Returns its folder."""
        out = self.base / f"{name}-unfinished"
        while not out.exists():
            process = start(self.jobs[name].words(out), self.base / "log")
            end = time.monotonic() + LIMIT
            while len(list(out.glob("checkpoints/step-*"))) < 2 and time.monotonic() < end:
                time.sleep(0.002)
            os.kill(process, signal.SIGKILL)
            finish(process)
            if not (out / "checkpoints").is_dir():  # the run ended before it was killed
                shutil.rmtree(out)
        return out

    # ------------------------------------------------------------------------------------ the table

    def show(self) -> int:
        """Print the table. Returns the number of faults."""
        names = ("tries", "stopped", "ended before", *FAULTS)
        table = Table("part", "of", *names)
        total: Counter = Counter()
        for (part, row), counts in sorted(self.counts.items()):
            table.add_row(part, row, *(str(counts[name]) for name in names))
            total += counts
        table.add_row("all", "", *(str(total[name]) for name in names))
        for line in self.shown:
            print(line)
        Console(width=170).print(table)
        return sum(total[name] for name in FAULTS)


def spoil(file: Path, how: str, draw: random.Random) -> None:
    """Damage a file. how: flip (a bit), cut off, emptied or removed."""
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    else:
        os.truncate(file, len(content) // 2 if how == "cut off" else 0)


def rough(seed: int, count: int, parts: list[str], commands: list[str] | None = None) -> int:
    """Run `count` tries of each part. Returns the number of faults."""
    with tempfile.TemporaryDirectory(prefix="rough-") as folder:
        base = Path(folder).resolve()
        made = Rough(base, seed, commands)
        tries = {"kills": made.kill, "two-writers": made.twice, "damage": made.damage}
        with contextlib.suppress(KeyboardInterrupt):
            for number, part in ((number, part) for number in range(count) for part in parts):
                tries[part](number)
        return made.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--part", nargs="*", default=["kills", "two-writers", "damage"])
    parser.add_argument("--commands", nargs="*")
    given = parser.parse_args()
    sys.exit(bool(rough(given.seed, given.count, given.part, given.commands)))
