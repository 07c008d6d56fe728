"""Progress of a run: a line or a bar on the terminal, the file metrics.jsonl, and the time and
memory that the run has used.
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

SHOWN = (  # metrics shown on the progress line
    "loss accuracy validation test constant_loss prediction_std prediction_rankme reconstruction "
    "perplexity"
).split()
BAR = "{l_bar}{bar:12}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def clock() -> dict[str, float]:
    """Return the CPU time (of all threads) and the wall time, in seconds. Only differences between
    two calls have a meaning.
    """
    return {"cpu_seconds": time.process_time(), "wall_seconds": time.perf_counter()}


def spent_since(start: dict[str, float]) -> dict[str, float]:
    """Return the CPU and wall seconds since `start`, an earlier `clock()`."""
    return {name: now - start[name] for name, now in clock().items()}


def peak_memory() -> int:
    """Return the peak memory in bytes: of the accelerator if there is one, else of the process.

    Torch does not measure the peak memory of some accelerators, such as Apple's. The peak memory of
    the process is then returned.
    """
    measure = getattr(torch.get_device_module(), "max_memory_allocated", None)
    if torch.accelerator.is_available() and measure:
        return measure()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """Show and record a run's progress from `state["step"]` to step `total`. If the run is resumed,
    metrics that were logged after `state["step"]` are deleted.

    path: the file metrics.jsonl, or None for a dry run. state: the state of `loop.py::fit` at the
    start. shown: whether this process shows and records the progress; only the first process does.
    """

    def __init__(
        self,
        path: Path | None,
        state: dict,
        total: int,
        batch_size: int,
        shown: bool,
        start_clock: dict[str, float],
    ):
        self.path, self.total = path, total
        self.batch_size, self.shown = batch_size, shown
        # start_clock: `clock()` at the start of `loop.py::fit`, before engine.py tries which
        # precision is faster and whether compiling helps
        self.start_state, self.start_clock = dict(state), start_clock
        self.last_metrics: dict[str, float] = {}
        # wall and CPU seconds per step, averaged over the steps since the previous log
        self.step_cost = {"step_seconds": 0.0, "step_cpu_seconds": 0.0}
        self.last_log = {"step": state["step"]} | clock()
        look: dict[str, Any] = {"bar_format": BAR, "leave": True, "delay": 0}
        if not shown:
            look["disable"] = True
        self.bar = progress_bar(total=total, initial=state["step"], **look)
        if path and shown and path.exists():
            lines = Run(path.parent).metrics
            kept = [line for line in lines if line["step"] <= state["step"]]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_bytes(path, text.encode())
            self.last_metrics = kept[-1] if kept else {}

    def stamp(self, state: dict) -> dict:
        """Return `state` with the run's time and peak memory so far, including the time and memory
        before it was resumed.
        """
        spent = spent_since(self.start_clock)
        peak = max(self.start_state["peak_memory"], peak_memory())
        total = {name: self.start_state[name] + value for name, value in spent.items()}
        return state | total | {"peak_memory": peak}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics of a step, and append them to metrics.jsonl."""
        spent, steps = spent_since(self.last_log), max(1, step - self.last_log["step"])
        self.step_cost["step_seconds"] = spent["wall_seconds"] / steps
        self.step_cost["step_cpu_seconds"] = spent["cpu_seconds"] / steps
        self.last_log = {"step": step} | clock()
        if not self.shown:
            return
        cost, start = self.stamp({}), self.start_state
        elapsed = cost["wall_seconds"] - start["wall_seconds"]
        step_seconds = elapsed / (step - start["step"])
        rate, left = self.batch_size / step_seconds, (self.total - step) * step_seconds
        throughput = {"samples_per_second": rate}
        self.last_metrics = {"step": step} | metrics | throughput | cost
        if self.path:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(self.last_metrics) + "\n")
        text = " ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        if self.bar.disable:
            speed = f"{rate:.0f} samples/s, {left / 60:.1f} min left"
            log.info(f"step {step:,}/{self.total:,} {text} | {speed}")
        else:
            self.bar.set_postfix_str(f"{rate:.0f} samples/s {text}", refresh=False)
            self.bar.update(step - self.bar.n)
