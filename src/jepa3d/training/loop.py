"""The training loop: the same for every objective, on one process or many.

A resumed run repeats an uninterrupted one bit for bit on one CPU with one number of threads.
"""

import math
import signal
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from jepa3d.config import RunConfig, Schedule
from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import PointClouds
from jepa3d.data.transforms import augment
from jepa3d.ops import BatchGenerator
from jepa3d.plain import log, to_dict
from jepa3d.run import Run
from jepa3d.training import checkpoint, engine
from jepa3d.training.graphs import Repeated, can_repeat
from jepa3d.training.optim import adamw, learning_rate, total_steps
from jepa3d.training.progress import Progress, clock

BAD_CLOUD = "restore the file as it was (jepa3d info DATA --verify finds it), then --resume"
WINDOW = 32  # shards of a store that an epoch mixes, 1 GiB: fewer than a `Store` holds open


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


class Diverged(ValueError):
    """The loss is no finite number any more."""


@dataclass(frozen=True)
class Task:
    """What the loop trains: an objective, its schedule, and the name of what it exports."""

    # A module with forward(points, generator, progress, *targets), after_step(progress) and
    # metrics(output): docs/extending.md.
    objective: Any
    schedule: Schedule
    export: str  # encoder, dvae or model
    module: Any  # what is exported: PointEncoder, DVAE, Classifier or Segmenter
    augments: bool = True  # False: the objective augments its views itself
    targets: Callable[[np.ndarray], tuple[Tensor, ...]] | None = None  # of the shapes at an index
    look: Callable[[], float] | None = None  # score after each epoch; RUN/best keeps the best
    looks_at: str = "validation"  # or test: the part that it scores
    layer_decay: float = 1.0
    looks_first: bool = False  # look also before the first step: the head is fitted already


def fit(
    task: Task, clouds: PointClouds, config: RunConfig, run: Path | None, stop_at: int | None = None
) -> dict:
    """Train; resume from the newest checkpoint in `run`; None writes nothing (dry run).

    Returns the final state: step, cpu_seconds, wall_seconds, peak_memory (bytes), best, the last
    metrics, step_seconds, step_cpu_seconds, mixed_precision (as used). Raises Interrupted on Ctrl-C
    or SIGTERM, or at `stop_at`, after saving, and Diverged.
    """
    began = clock()
    # cuDNN plans anew for every length of a context, which takes most of a step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    engine.set_activation_checkpoints(task.objective, config.checkpoint_activations)
    precision, compiled = engine.choose(task, clouds, config, run)
    # Stage I, a run before this one in the same process, may have chosen another precision.
    AcceleratorState._reset_state()
    tracked = engine.tracker(config.track, run)
    accelerator = Accelerator(
        cpu=engine.ON_CPU, mixed_precision=precision, log_with=tracked or None, project_dir=run
    )
    if tracked:
        accelerator.init_trackers("jepa3d", engine.plain_settings(to_dict(config)))
    schedule, objective = task.schedule, task.objective.to(accelerator.device)
    if compiled:
        engine.compile_blocks(objective)
    optimizer = adamw(objective, schedule, task.layer_decay)
    total = total_steps(schedule, len(clouds))
    state: dict[str, Any] = {"step": 0, "best": None}
    state |= dict.fromkeys(("cpu_seconds", "wall_seconds", "peak_memory"), 0)
    if run and Run(run).checkpoint:
        state, damaged = checkpoint.restore(run / "checkpoints", objective, optimizer)
        for line in damaged if accelerator.is_main_process else ():
            log.info(line)
    elif run and not (run / task.export).exists() and _has_saved(run, config):
        gone = f"{run}/checkpoints: gone, though the run had begun"
        raise ValueError(f"{gone}: begin again with another --out")
    model, optimizer = accelerator.prepare(objective, optimizer)
    if accelerator.scaler and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    share = schedule.batch_size // accelerator.num_processes // config.accumulate
    rank = accelerator.process_index
    shown, metrics = accelerator.is_main_process, run and run / "metrics.jsonl"
    progress = Progress(metrics, state, total, schedule.batch_size, shown, began)

    def check_finite(loss: float) -> float:
        if not math.isfinite(loss):
            found = f"the loss is {loss} at step {state['step']}"
            raise Diverged(f"{found}: lower --lr (now {schedule.lr})")
        return loss

    def save(loss: float) -> None:
        check_finite(loss)  # never replace a good checkpoint by a spoilt one
        if run and accelerator.is_main_process:
            scaler, folder = accelerator.scaler, run / "checkpoints"
            state["scaler"] = scaler.state_dict() if scaler else {}
            stamped = progress.stamp(state)
            checkpoint.save(folder, objective, optimizer.optimizer, stamped)
        accelerator.wait_for_everyone()

    def read(step: int) -> list:
        """Of every pass of a step: the place of this process's first row in the batch, its shapes
        and their points.
        """
        sizes = schedule.batch_size, len(clouds), clouds.shard_sizes
        batch = batch_index(config.seed, step, *sizes)
        passes: list[tuple[int, np.ndarray, Tensor]] = []
        for part in range(config.accumulate):
            first = (part * accelerator.num_processes + rank) * share
            rows = batch[first : first + share]
            points = to_device(clouds.batch(rows), accelerator.device)
            passes.append((first, rows, points))
        return passes

    def one_pass(
        points: Tensor, generator: BatchGenerator, progress: float = 0.0, *targets: Tensor
    ) -> Any:
        """Forward and backward on one process's share of a pass."""
        if task.augments:
            how = config.scale, config.rotate, config.translate
            points = augment(points, *how, generator)
        output = model(points, generator, progress, *targets)
        accelerator.backward(output.loss / config.accumulate)
        return output

    def look(step: int) -> float:
        """The network's score now; its weights are kept where none so far was better."""
        assert task.look
        score = task.look()
        model.train()
        if state["best"] is None or score > state["best"]["score"]:
            state["best"] = {"step": step, "score": score}
            if run and accelerator.is_main_process:
                checkpoint.replace_folder(run / "best", task.module.save_pretrained)
        return score

    begun = state["step"]
    model.train()
    if task.look and task.looks_first and begun == 0:
        score = look(0)
        if accelerator.is_main_process:
            log.info(f"step 0/{total:,}, the head fitted: {task.looks_at} {score:.4g}")
    repeatable = can_repeat(config, accelerator.num_processes, accelerator.device)
    repeated = Repeated(one_pass, objective) if repeatable else None
    batches = read_ahead(read, range(begun, total))
    with _stop_signals() as stop, progress, ExitStack() as at_end:
        at_end.callback(batches.close)
        for tracking in accelerator.trackers:
            at_end.callback(tracking.finish)  # also when interrupted
        # ------------------------------------------------------------------------ the training loop
        while (step := state["step"]) < total:
            loss, output = torch.zeros((), device=accelerator.device), None
            try:
                passes = next(batches)
            except ReadError as error:  # not the learning rate's fault
                if step > begun and accelerator.num_processes == 1:
                    save(0.0)
                where = f"read at step {step + 1}"
                raise ReadError(f"{error}, {where}; {BAD_CLOUD}") from error
            for part, (first, index, points) in enumerate(passes):
                generator = BatchGenerator(config.seed, step, first, schedule.batch_size)
                targets = task.targets(index) if task.targets else ()
                targets = [target.to(accelerator.device) for target in targets]
                last = part == config.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    if repeated:
                        output = repeated(points, generator)
                    else:
                        output = one_pass(points, generator, step / total, *targets)
                loss += output.loss.detach() / config.accumulate

            rate = learning_rate(schedule, step, total, len(clouds))
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * rate
            norm = accelerator.clip_grad_norm_(model.parameters(), schedule.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step(step / total)

            state["step"] = step = step + 1
            snapshot = config.snapshot_every and step % config.snapshot_every == 0
            epochs = [at * schedule.batch_size // len(clouds) for at in (step - 1, step)]
            looked = task.look and (step == total or epochs[1] > epochs[0])
            if step % config.log_every == 0 or step in (1, total) or snapshot or looked:
                figures = {
                    "loss": check_finite(accelerator.reduce(loss, "mean").item()),
                    "epoch": step * schedule.batch_size / len(clouds),
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": 0.0 if norm is None else norm.item(),
                }
                figures |= objective.metrics(cast(Any, output))
                if looked:
                    figures[task.looks_at] = look(step)
                progress.log(step, figures)
                accelerator.log(figures, step)
            if run and snapshot and accelerator.is_main_process:
                folder = run / "snapshots" / f"step-{step:07d}"
                checkpoint.replace_folder(folder, task.module.save_pretrained)
            stopping = stopped(accelerator, stop, step) or step == stop_at
            if step % config.checkpoint_every == 0 or step == total or stopping:
                save(loss.item())
            if stopping and step < total:
                raise Interrupted(f"stopped at step {step:,} of {total:,}, saved")
        # ------------------------------------------------------------------------------------------
    found = {"metrics": progress.last, "mixed_precision": precision}
    found |= {"step_seconds": progress.step_seconds, "step_cpu_seconds": progress.step_cpu_seconds}
    return progress.stamp(state) | found


def read_ahead(read: Callable[[int], Any], steps: range) -> Generator[Any]:
    """read(step) for every step, in a thread, one step ahead of its use."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(read, step) for step in steps[:1]]
        for step in steps:
            found = waiting.pop().result()
            if step + 1 < steps.stop:
                waiting.append(pool.submit(read, step + 1))
            yield found


def to_device(points: Tensor, device: torch.device) -> Tensor:
    """Points on the device; to a GPU without waiting for it."""
    if torch.get_device_module(device).__name__ != "torch.cuda":
        return points.to(device)
    return points.pin_memory().to(device, non_blocking=True)


def _has_saved(run: Path, config: RunConfig) -> bool:
    """Whether a run came farther than its first checkpoint."""
    return any(line["step"] > config.checkpoint_every for line in Run(run).metrics)


def batch_index(
    seed: int, step: int, batch_size: int, num_samples: int, shard_sizes: tuple[int, ...] = ()
) -> np.ndarray:
    """Sample indices of one global batch: the stream of epochs, each its own order, cut into
    batches.

    Depends on nothing but its arguments: the order is the same after a resume and for any number of
    processes.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // num_samples):
        order = epoch_order(seed, int(epoch), num_samples, shard_sizes)
        here = positions // num_samples == epoch
        out[here] = order[positions[here] % num_samples]
    return out


@lru_cache(maxsize=2)
def epoch_order(
    seed: int, epoch: int, num_samples: int, shard_sizes: tuple[int, ...] = ()
) -> np.ndarray:
    """The samples of an epoch, shuffled; of a store, within windows of random shards, so that few
    are open at once.
    """
    rng = np.random.default_rng([seed, epoch])
    if len(shard_sizes) <= WINDOW:
        return rng.permutation(num_samples)
    first = np.cumsum((0, *shard_sizes))
    shards = rng.permutation(len(shard_sizes))
    order = []
    for at in range(0, len(shards), WINDOW):
        rows = [np.arange(first[i], first[i + 1]) for i in shards[at : at + WINDOW]]
        order.append(rng.permutation(np.concatenate(rows)))
    return np.concatenate(order)


def stopped(accelerator: Accelerator, stop: list, step: int) -> bool:
    """Whether any process was asked to stop; processes agree every 10 steps."""
    if accelerator.num_processes == 1:
        return bool(stop)
    if step % 10:
        return False
    flag = torch.tensor(float(bool(stop)), device=accelerator.device)
    return accelerator.reduce(flag, "sum").item() > 0


@contextmanager
def _stop_signals():
    """A list that SIGINT or SIGTERM fills; a second signal ends the process the usual way."""
    received: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def receive(number, frame) -> None:
        received.append(number)
        print("stopping after this step", file=sys.stderr, flush=True)
        signal.signal(number, before[number])

    try:
        for name in names:
            signal.signal(name, receive)
        yield received
    finally:
        for name in names:
            signal.signal(name, before[name])
