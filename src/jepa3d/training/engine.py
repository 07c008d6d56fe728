"""How a run computes: precision and compilation, by a trial where wanted, what trades time for memory; trackers.

bf16 doubles the speed of one processor and halves that of another; `torch.compile` gains a fifth, or costs two
minutes for nothing. So `auto` times some steps of this model on this machine, and writes down what it found.
"""

import copy
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from accelerate.utils import broadcast_object_list
from torch import nn

from jepa3d.config import RunConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.models.decoder import ContextAwareBlock, ContextAwareDecoder
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.transformer import Block
from jepa3d.ops import BatchGenerator
from jepa3d.plain import read_checked, write_checked

ON_CPU = not torch.accelerator.is_available()  # Accelerate joins processes on a CPU only when told
WARM_UP, STEPS = 2, 5  # of a trial
How = tuple[str, bool]  # precision, whether compiled


def set_activation_checkpoints(objective: nn.Module, wanted: bool) -> None:
    """Whether blocks drop what their gradient needs and compute it again: the same numbers."""
    for module in objective.modules():
        if isinstance(module, PointEncoder | ContextAwareDecoder):
            module.checkpoints = wanted


def tracker(name: str | None, run: Path | None) -> list[Any]:
    """What Accelerate is to log with: the tracker of that name, none for a dry run.

    Raises ValueError for one that it does not know, or whose package is missing (Accelerate would leave it out).
    """
    if name is None:
        return []
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"--track {name}: one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if not filter_trackers([name], str(run)):
        package = "tensorboardX" if name == "tensorboard" else name.replace("_", "-")
        raise ValueError(f"--track {name}: pip install {package}")
    return [name] if run else []


def plain_settings(values: dict, where: str = "") -> dict[str, Any]:
    """Nested settings as trackers take them: dotted names, numbers and texts."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= plain_settings(value, f"{where}{key}.")
        else:
            out[f"{where}{key}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out


def compile_blocks(objective: nn.Module) -> None:
    """Each transformer block by `torch.compile`, for any number of rows; names of weights stay as they are."""
    torch._dynamo.config.recompile_limit = 64  # blocks of teacher, student, decoder, padded or not, in two precisions
    for module in objective.modules():
        if isinstance(module, Block | ContextAwareBlock):
            module.compile(dynamic=True)


def choose(task: Any, clouds: PointClouds, config: RunConfig, run: Path | None) -> How:
    """Precision and whether to compile; what is `auto` by a trial, whose result RUN/engine.json keeps for a resume."""
    if "auto" not in (config.mixed_precision, config.compile):
        return config.mixed_precision, config.compile == "yes"
    file = run and run / "engine.json"
    if file and file.exists():
        found = read_checked(file)
        return found["mixed_precision"], found["compile"]
    precisions = ("no", "bf16") if config.mixed_precision == "auto" else (config.mixed_precision,)
    ways = {"no": (False,), "yes": (True,), "auto": (False, True)}[config.compile]
    seconds = trial(task, clouds, config, [(precision, compiled) for precision in precisions for compiled in ways])
    choice = [min(seconds, key=seconds.__getitem__)]
    precision, compiled = broadcast_object_list(choice)[0]  # every process as the first one
    if PartialState(cpu=ON_CPU).is_main_process:
        tried = ", ".join(f"{_named(*how)} {1000 * value:.0f}" for how, value in seconds.items())
        print(f"trial, ms a pass: {tried}; taken: {_named(precision, compiled)}", flush=True)
        if file:
            measured = {_named(*how): value for how, value in seconds.items()}
            found = {"mixed_precision": precision, "compile": compiled, "seconds": measured}
            write_checked(file, found)
    return precision, compiled


def trial(task: Any, clouds: PointClouds, config: RunConfig, hows: list[How]) -> dict[How, float]:
    """Median seconds of a forward and backward pass of a copy of the task, in turns; every process takes part."""
    state = PartialState(cpu=ON_CPU)
    device = cast(torch.device, state.device)
    share = task.schedule.batch_size // state.num_processes // config.accumulate
    index = np.arange(share) % len(clouds)
    points = clouds.batch(index).to(device)
    targets = [t.to(device) for t in task.targets(index)] if task.targets else ()
    copies: dict[How, nn.Module] = {}
    for how in hows:
        copies[how] = copy.deepcopy(task.objective).to(device).train()
        if how[1]:
            compile_blocks(copies[how])
    times: dict[How, list[float]] = {how: [] for how in hows}
    for step in range(WARM_UP + STEPS):
        for how, objective in list(copies.items()):
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how[0])
            start = time.perf_counter()
            try:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = objective(points, BatchGenerator(config.seed, step), 0.0, *targets).loss
                loss.backward()
                loss.item()  # wait for the device
            except RuntimeError as error:  # no compiler, say, or no kernel of that precision
                if len(copies) == 1 or state.num_processes > 1:  # the others would wait for this one
                    raise
                print(f"trial of {_named(*how)}: {str(error).splitlines()[0]}", flush=True)
                del copies[how]
            objective.zero_grad()
            times[how].append(time.perf_counter() - start)
    return {how: median(times[how][WARM_UP:]) for how in copies}


def _named(precision: str, compiled: bool) -> str:
    return ("fp32" if precision == "no" else precision) + (", compiled" if compiled else "")
