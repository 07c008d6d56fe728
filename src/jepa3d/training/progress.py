"""Progress of a run: a line or a bar for people, metrics.jsonl for programs, and what the run has
cost.
"""

import json
import logging
import sys
import time
from pathlib import Path

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from jepa3d.plain import log, naming, write_bytes
from jepa3d.run import Run

SHOWN = (  # of a step's figures, on the line
    "loss accuracy validation test constant_loss prediction_std prediction_rankme reconstruction "
    "perplexity"
).split()


def cpu_seconds() -> float:
    """CPU time of this process, all threads."""
    return time.process_time()


def peak_memory() -> int:
    """Bytes: the accelerator's peak where one is used, else the process's peak resident set."""
    if torch.accelerator.is_available() and hasattr(
        torch.get_device_module(), "max_memory_allocated"
    ):
        return torch.get_device_module().max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """Shows and records a run from `state["step"]` to `total`; metrics after a resumed step are
    dropped.
    """

    def __init__(
        self,
        path: Path | None,
        state: dict,
        total: int,
        batch_size: int,
        shown: bool,
        began: tuple[float, float],
    ):
        self.path, self.total, self.batch_size, self.shown = path, total, batch_size, shown
        self.base = dict(state)
        self.cpu, self.wall = began  # CPU and wall clock, before any trial
        self.last: dict[str, float] = {}
        self.step_seconds = self.step_cpu_seconds = 0.0  # of a step, since the line before
        self.before = state["step"], time.perf_counter(), cpu_seconds()
        self.bar = Bar(
            BarColumn(12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            disable=not (shown and sys.stderr.isatty() and log.isEnabledFor(logging.INFO)),
        )
        self.task = self.bar.add_task("", total=total, completed=state["step"])
        if path and shown and path.exists():
            kept = [line for line in Run(path.parent).metrics if line["step"] <= state["step"]]
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.last = kept[-1] if kept else {}

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def stamp(self, state: dict) -> dict:
        """`state` with the cost so far, over all sessions of the run."""
        return state | {
            "cpu_seconds": self.base["cpu_seconds"] + cpu_seconds() - self.cpu,
            "wall_seconds": self.base["wall_seconds"] + time.perf_counter() - self.wall,
            "peak_memory": max(self.base["peak_memory"], peak_memory()),
        }

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of a step."""
        now = step, time.perf_counter(), cpu_seconds()
        steps, wall, cpu = (after - before for after, before in zip(now, self.before, strict=True))
        self.step_seconds, self.step_cpu_seconds = wall / max(1, steps), cpu / max(1, steps)
        self.before = now
        if not self.shown:
            return
        cost = self.stamp({})
        done = step - self.base["step"]
        here = cost["wall_seconds"] - self.base["wall_seconds"]
        rate = done * self.batch_size / here
        left = (self.total - step) * here / done
        self.last = {"step": step, **figures, "samples_per_second": rate, **cost}
        if self.path:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(self.last) + "\n")
        text = " ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
        if self.bar.disable:
            log.info(
                f"step {step:,}/{self.total:,} {text} | {rate:.0f} samples/s, {left / 60:.1f} min left"
            )
        else:
            self.bar.update(self.task, completed=step, description=f"{rate:.0f} samples/s {text}")
