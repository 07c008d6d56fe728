"""How a run computes: precision and compilation, by rule or by a trial, what trades time for
memory; trackers.

bf16 doubles the speed of one processor and halves that of another: `mixed_precision` auto is a rule
that looks at the machine alone. A trial (`mixed_precision` measure, `compile` auto) times some
steps of this model. RUN/run.json says what was taken, and a resumed run keeps to it.
"""

import copy
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from accelerate.utils import broadcast_object_list
from torch import nn

from jepa3d.config import RunConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.protocol import write_json
from jepa3d.models.decoder import ContextAwareBlock, ContextAwareDecoder
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.transformer import Block
from jepa3d.ops import BatchGenerator
from jepa3d.plain import log
from jepa3d.run import Run

ON_CPU = not torch.accelerator.is_available()  # Accelerate joins processes on a CPU only when told
WARM_UP, STEPS = 2, 5  # of a trial
How = tuple[str, bool]  # precision, whether compiled
Config = TypeVar("Config", bound=RunConfig)


def set_activation_checkpoints(objective: nn.Module, wanted: bool) -> None:
    """Whether blocks drop what their gradient needs and compute it again: the same numbers."""
    for module in objective.modules():
        if isinstance(module, PointEncoder | ContextAwareDecoder):
            module.checkpoints = wanted


def tracker(name: str | None, run: Path | None) -> list[Any]:
    """What Accelerate is to log with: the tracker of that name, none for a dry run.

    Raises ValueError for one that it does not know, or whose package is missing (Accelerate would
    leave it out).
    """
    if name is None:
        return []
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ValueError(f"--track {name}: one of {known}")
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
            plain = isinstance(value, (int, float, str, bool))
            out[f"{where}{key}"] = value if plain else str(value)
    return out


def compile_blocks(objective: nn.Module) -> None:
    """Each transformer block by `torch.compile`, for any number of rows; names of weights stay as
    they are.
    """
    # blocks of teacher, student, decoder, padded or not, in two precisions
    torch._dynamo.config.recompile_limit = 64
    for module in objective.modules():
        if isinstance(module, Block | ContextAwareBlock):
            module.compile(dynamic=True)


def has_fast_bf16() -> bool:
    """Whether bf16 is quicker than fp32 here: a GPU with bf16 of its own, or without a GPU a
    processor with AMX.
    """
    if not ON_CPU:
        # Apple's GPUs have no answer
        supported = getattr(torch.get_device_module(), "is_bf16_supported", None)
        return supported is not None and supported(including_emulation=False)
    # torch has no public name for it
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return amx is not None and amx()


def settle(config: Config, run: Path | None = None) -> Config:
    """The configuration with mixed_precision auto replaced by bf16 or no: as the started `run` has
    it, else by rule.
    """
    if config.mixed_precision != "auto":
        return config
    if run:
        return replace(config, mixed_precision=Run(run).config["mixed_precision"])
    state, found = PartialState(cpu=ON_CPU), ["bf16" if has_fast_bf16() else "no"]
    precision = broadcast_object_list(found)[0]  # every process as the first one
    if state.is_main_process:
        how = f"{named(precision)} on {device_name()}"
        log.info(f"computing in {how} (mixed_precision auto)")
    return replace(config, mixed_precision=precision)


def device_name() -> str:
    """What computes here, for the record: a GPU's own name, "CPU with AMX" or "CPU"."""
    if not ON_CPU:
        name_of = getattr(torch.get_device_module(), "get_device_name", None)
        return name_of() if name_of else str(torch.accelerator.current_accelerator())
    return "CPU with AMX" if has_fast_bf16() else "CPU"


def choose(task: Any, clouds: PointClouds, config: RunConfig, run: Path | None) -> How:
    """Precision and whether to compile: those that the run began with, else those of its settings,
    or of a trial.
    """
    is_main, device = PartialState(cpu=ON_CPU).is_main_process, device_name()
    found: dict[str, Any] | None = Run(run).engine if run else None
    if found is None:
        config = settle(config)
        precision, compiled = config.mixed_precision, config.compile == "yes"
        found = {"mixed_precision": precision, "compile": compiled}
        if precision == "measure" or config.compile == "auto":
            found = _measured(task, clouds, config)
        if run and is_main:
            record = Run(run).record | {"engine": found | {"device": device}}
            write_json(run / "run.json", record)
    elif is_main and (before := found.get("device", device)) != device:
        how = named(found["mixed_precision"], found["compile"])
        log.info(f"{run}: begun in {how} on {before}; goes on in {how} on {device}")
    return found["mixed_precision"], found["compile"]


def _measured(task: Any, clouds: PointClouds, config: RunConfig) -> dict[str, Any]:
    """What a trial finds quickest, and the seconds of everything tried; the first process says so."""
    precision, measured = config.mixed_precision, config.mixed_precision == "measure"
    ways = {"no": (False,), "yes": (True,), "auto": (False, True)}[config.compile]
    hows = list(product(("no", "bf16") if measured else (precision,), ways))
    seconds = trial(task, clouds, config, hows)
    # every process as the first one
    choice = broadcast_object_list([min(seconds, key=seconds.__getitem__)])
    precision, compiled = choice[0]
    tried = {named(*how): value for how, value in seconds.items()}
    if PartialState(cpu=ON_CPU).is_main_process:
        text = ", ".join(f"{how} {1000 * value:.0f}" for how, value in tried.items())
        log.info(f"trial, ms a pass: {text}; taken: {named(precision, compiled)}")
    return {"mixed_precision": precision, "compile": compiled, "seconds": tried}


def trial(task: Any, clouds: PointClouds, config: RunConfig, hows: list[How]) -> dict[How, float]:
    """Median seconds of a forward and backward pass of a copy of the task, in turns; every process
    takes part.
    """
    state = PartialState(cpu=ON_CPU)
    device = cast(torch.device, state.device)
    share = task.schedule.batch_size // state.num_processes // config.accumulate
    index = np.arange(share) % len(clouds)
    points = clouds.batch(index).to(device)
    targets = [t.to(device) for t in task.targets(index)] if task.targets else ()
    copies = {how: copy.deepcopy(task.objective).to(device).train() for how in hows}
    for how in hows:
        if how[1]:
            compile_blocks(copies[how])
    times: dict[How, list[float]] = {how: [] for how in hows}
    for step in range(WARM_UP + STEPS):
        for how, objective in list(copies.items()):
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how[0])
            start = time.perf_counter()
            try:
                draws = BatchGenerator(config.seed, step)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = objective(points, draws, 0.0, *targets).loss
                loss.backward()
                loss.item()  # wait for the device
            # no compiler, say, or no kernel of that precision
            except RuntimeError as error:
                # The others would wait for this one.
                if len(copies) == 1 or state.num_processes > 1:
                    raise
                log.info(f"trial of {named(*how)}: {str(error).splitlines()[0]}")
                del copies[how]
            objective.zero_grad()
            times[how].append(time.perf_counter() - start)
    return {how: median(times[how][WARM_UP:]) for how in copies}


def named(precision: str, compiled: bool = False) -> str:
    """A precision and whether compiled, in words."""
    name = "fp32" if precision == "no" else precision
    return f"{name}, compiled" if compiled else name
