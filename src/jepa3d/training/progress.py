"""Progress of a run: a line or a bar for people, metrics.jsonl for programs, and what the run has
cost.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from jepa3d.plain import log, naming, progress_bar, write_bytes
from jepa3d.run import Run

SHOWN = (  # of a step's figures, on the line
    "loss accuracy validation test constant_loss prediction_std prediction_rankme reconstruction "
    "perplexity"
).split()
BAR = "{l_bar}{bar:12}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def clock() -> dict[str, float]:
    """CPU time of this process, all threads, and wall time, to be compared with a later one."""
    return {"cpu_seconds": time.process_time(), "wall_seconds": time.perf_counter()}


def spent_since(began: dict[str, float]) -> dict[str, float]:
    """CPU and wall seconds since `began`, an earlier `clock()`."""
    return {name: now - began[name] for name, now in clock().items()}


def peak_memory() -> int:
    """Bytes: the accelerator's peak where one is used, else the process's peak resident set."""
    measure = getattr(torch.get_device_module(), "max_memory_allocated", None)
    if torch.accelerator.is_available() and measure:
        return measure()
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
        began: dict[str, float],
    ):
        self.path, self.total = path, total
        self.batch_size, self.shown = batch_size, shown
        self.base, self.began = dict(state), began  # the clock before any trial
        self.last: dict[str, float] = {}
        self.step_seconds = self.step_cpu_seconds = 0.0  # of a step, since the line before
        self.before = {"step": state["step"]} | clock()
        look: dict[str, Any] = {"total": total, "initial": state["step"], "bar_format": BAR}
        look |= {"leave": True, "delay": 0} if shown else {"disable": True}
        self.bar = progress_bar(**look)
        if path and shown and path.exists():
            lines = Run(path.parent).metrics
            kept = [line for line in lines if line["step"] <= state["step"]]
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.last = kept[-1] if kept else {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def stamp(self, state: dict) -> dict:
        """`state` with the cost so far, over all sessions of the run."""
        spent, peak = spent_since(self.began), max(self.base["peak_memory"], peak_memory())
        total = {name: self.base[name] + value for name, value in spent.items()}
        return state | total | {"peak_memory": peak}

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of a step."""
        spent, steps = spent_since(self.before), max(1, step - self.before["step"])
        self.step_seconds = spent["wall_seconds"] / steps
        self.step_cpu_seconds = spent["cpu_seconds"] / steps
        self.before = {"step": step} | clock()
        if not self.shown:
            return
        cost, base = self.stamp({}), self.base
        step_seconds = (cost["wall_seconds"] - base["wall_seconds"]) / (step - base["step"])
        rate, left = self.batch_size / step_seconds, (self.total - step) * step_seconds
        self.last = {"step": step, **figures, "samples_per_second": rate, **cost}
        if self.path:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(self.last) + "\n")
        text = " ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
        if self.bar.disable:
            speed = f"{rate:.0f} samples/s, {left / 60:.1f} min left"
            log.info(f"step {step:,}/{self.total:,} {text} | {speed}")
        else:
            self.bar.set_postfix_str(f"{rate:.0f} samples/s {text}", refresh=False)
            self.bar.update(step - self.bar.n)
