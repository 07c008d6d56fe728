"""Choose how a run computes: its precision, compilation and activation checkpoints. This file also
checks the tracker (such as TensorBoard) to which a run logs its metrics.

bf16 is faster than fp32 on some processors and slower on others. The setting mixed_precision=auto
chooses by the kind of processor, without a trial. The settings mixed_precision=measure and
compile=auto choose by a trial, which times a few forward and backward passes of the model.
RUN/run.json records the choice, and a resumed run keeps it.
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

# Whether the machine has no GPU. Accelerate must be told this, since otherwise it does not connect
# the processes on such a machine.
ON_CPU = not torch.accelerator.is_available()
# A trial takes WARM_UP + STEPS steps with each combination of precision and compilation. All steps
# are timed, but the times of the first WARM_UP are not used, since they include the compilation.
WARM_UP, STEPS = 2, 5
How = tuple[str, bool]  # precision, and whether blocks are compiled
Config = TypeVar("Config", bound=RunConfig)


def set_activation_checkpoints(objective: nn.Module, wanted: bool) -> None:
    """Set whether blocks recompute their activations in the backward pass, instead of storing them.
    Recomputation needs less memory and gives the same result.
    """
    for module in objective.modules():
        if isinstance(module, PointEncoder | ContextAwareDecoder):
            module.checkpoints = wanted


def tracker(name: str | None, run: Path | None) -> list[Any]:
    """Return the value of Accelerate's argument `log_with` for a tracker name: [name], or [] if the
    name or the run is None (a dry run has no folder).

    Raises ValueError if the tracker is unknown. Also raises it if the tracker's package is missing,
    since Accelerate would ignore the tracker in this case.
    """
    if name is None:
        return []
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ValueError(f"--track {name} is unknown: use one of {known}")
    if not filter_trackers([name], str(run)):
        package = "tensorboardX" if name == "tensorboard" else name.replace("_", "-")
        raise ValueError(f"--track {name} needs a package: pip install {package}")
    return [name] if run else []


def plain_settings(values: dict, where: str = "") -> dict[str, Any]:
    """Flatten nested settings for trackers: dotted names, and numbers or strings as values."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= plain_settings(value, f"{where}{key}.")
        else:
            plain = isinstance(value, (int, float, str, bool))
            out[f"{where}{key}"] = value if plain else str(value)
    return out


def compile_blocks(objective: nn.Module) -> None:
    """Compile each transformer block with `torch.compile`. A compiled block takes batches and
    token sequences of any size. The names of the weights stay the same.
    """
    # The number of times that torch may compile the same code. All blocks of a class share their
    # code, so 64 is enough for the blocks of teacher, student and decoder, for padded and unpadded
    # inputs, in two precisions.
    torch._dynamo.config.recompile_limit = 64
    for module in objective.modules():
        if isinstance(module, Block | ContextAwareBlock):
            module.compile(dynamic=True)


def has_fast_bf16() -> bool:
    """Return whether bf16 is expected to be faster than fp32 on this machine. If there is a GPU,
    it must support bf16 natively; if there is none, the processor must have AMX.
    """
    if not ON_CPU:
        # torch has no is_bf16_supported for Apple's GPUs, so bf16 is not used there
        supported = getattr(torch.get_device_module(), "is_bf16_supported", None)
        return supported is not None and supported(including_emulation=False)
    # This calls a private function, since torch has no public function that detects AMX.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return amx is not None and amx()


def settle(config: Config, run: Path | None = None) -> Config:
    """Replace the mixed_precision "auto" of a configuration by "bf16" or "no" (fp32).

    run: a run to continue, whose precision is kept. If `run` is None, `has_fast_bf16` decides.
    """
    if config.mixed_precision != "auto":
        return config
    if run:
        return replace(config, mixed_precision=Run(run).config["mixed_precision"])
    state, choice = PartialState(cpu=ON_CPU), ["bf16" if has_fast_bf16() else "no"]
    # every process takes the choice of the first process
    precision = broadcast_object_list(choice)[0]
    if state.is_main_process:
        how = f"{named(precision)} on {device_name()}"
        log.info(f"computing in {how} (mixed_precision auto)")
    return replace(config, mixed_precision=precision)


def device_name() -> str:
    """Return the name of the GPU; if there is none, "CPU with AMX" or "CPU"."""
    if not ON_CPU:
        name_of = getattr(torch.get_device_module(), "get_device_name", None)
        return name_of() if name_of else str(torch.accelerator.current_accelerator())
    return "CPU with AMX" if has_fast_bf16() else "CPU"


def choose(task: Any, clouds: PointClouds, config: RunConfig, run: Path | None) -> How:
    """Return the precision, and whether blocks are compiled.

    A resumed run keeps its first choice. A new run follows its settings, or makes a trial if the
    settings ask for one, and records the choice in run.json.
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
    elif is_main and (old_device := found.get("device", device)) != device:
        how = named(found["mixed_precision"], found["compile"])
        log.info(f"{run}: started in {how} on {old_device}; continues in {how} on {device}")
    return found["mixed_precision"], found["compile"]


def _measured(task: Any, clouds: PointClouds, config: RunConfig) -> dict[str, Any]:
    """Time all combinations of precision and compilation that the settings allow, and choose the
    fastest. Returns the record of this choice, with the seconds of every combination.
    """
    precision, measured = config.mixed_precision, config.mixed_precision == "measure"
    ways = {"no": (False,), "yes": (True,), "auto": (False, True)}[config.compile]
    hows = list(product(("no", "bf16") if measured else (precision,), ways))
    seconds = trial(task, clouds, config, hows)
    # every process takes the choice of the first process
    choice = broadcast_object_list([min(seconds, key=seconds.__getitem__)])
    precision, compiled = choice[0]
    tried = {named(*how): value for how, value in seconds.items()}
    if PartialState(cpu=ON_CPU).is_main_process:
        text = ", ".join(f"{how} {1000 * value:.0f}" for how, value in tried.items())
        log.info(f"trial, forward and backward in ms: {text}; chosen: {named(precision, compiled)}")
    return {"mixed_precision": precision, "compile": compiled, "seconds": tried}


def trial(task: Any, clouds: PointClouds, config: RunConfig, hows: list[How]) -> dict[How, float]:
    """Time forward and backward passes on copies of the task, one copy per combination in `hows`.

    Only the task's objective (the module that computes the loss) is copied. The combinations take
    turns. Returns the median seconds of each combination. A combination that fails is left out. But
    if there are several processes, or if no other combination is left, its RuntimeError is raised.
    All processes must call this function.
    """
    state = PartialState(cpu=ON_CPU)
    device = cast(torch.device, state.device)
    rows = task.schedule.batch_size // state.num_processes // config.accumulate
    index = np.arange(rows) % len(clouds)
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
            # There may be no compiler, or no kernel for this precision.
            except RuntimeError as error:
                # The passes exchange statistics of the batch between processes. If one process left
                # out a combination that works in the others, the others would wait for it forever.
                if len(copies) == 1 or state.num_processes > 1:
                    raise
                log.info(f"trial of {named(*how)} failed: {str(error).splitlines()[0]}")
                del copies[how]
            objective.zero_grad()
            times[how].append(time.perf_counter() - start)
    return {how: median(times[how][WARM_UP:]) for how in copies}


def named(precision: str, compiled: bool = False) -> str:
    """Return a readable name, such as "bf16, compiled"."""
    name = "fp32" if precision == "no" else precision
    return f"{name}, compiled" if compiled else name
