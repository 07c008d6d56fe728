"""The training loop, which is the same for every objective, and for one process or many.

On one CPU with a fixed number of threads, the result of a resumed run is bit for bit that of an
uninterrupted run.
"""

import math
import signal
import sys
import threading
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

BAD_CLOUD = (
    "restore the damaged file (jepa3d info DATA --verify finds damaged clouds), then use --resume"
)
# Number of shards (files of a store, data/store.py) whose clouds are shuffled together; these
# shards have about 1 GiB in all. The number must be below 64, the number of files that a `Store`
# keeps open; otherwise the same files would be closed and opened again and again.
WINDOW = 32


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


class Diverged(ValueError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class Task:
    """What the loop trains: an objective, its schedule, and the module to save at the end."""

    # A module with forward(points, generator, progress, *targets), after_step(progress) and
    # metrics(output): docs/extending.md.
    objective: Any
    schedule: Schedule
    # the sub-folder of the run that gets the module: encoder, dvae or model
    export: str
    # the module to save: PointEncoder, DVAE, Classifier, LinearClassifier or Segmenter
    module: Any
    # whether the loop augments the points; False if the objective augments its views itself
    augments: bool = True
    # a function of shape indices that returns these shapes' labels or cached teacher targets
    targets: Callable[[np.ndarray], tuple[Tensor, ...]] | None = None
    # computes the score after each epoch; the weights with the best score go to RUN/best
    scorer: Callable[[], float] | None = None
    # the split that `scorer` scores: validation or test
    scored_split: str = "validation"
    layer_decay: float = 1.0
    # whether to score also before the first step; True if the head is fitted before training
    scores_first: bool = False


def fit(
    task: Task, clouds: PointClouds, config: RunConfig, run: Path | None, stop_at: int | None = None
) -> dict:
    """Train, resuming from the newest checkpoint in `run` if there is one.

    run: the run's folder; if None, nothing is written (dry run). stop_at: step at which the run
    stops early. Returns the final state: step, cpu_seconds, wall_seconds, peak_memory (bytes), best
    (the step and score of the best epoch, or None if the task has no scorer), metrics (those logged
    last), step_seconds and step_cpu_seconds (wall and CPU seconds per step, averaged over the steps
    between the last two logs), and mixed_precision (the precision that was used).

    On Ctrl-C, on SIGTERM, or at step `stop_at`, saves a checkpoint and raises Interrupted. Raises
    Diverged if the loss is NaN or infinite, and ReadError for unreadable data. Raises ValueError if
    the run's checkpoints are missing, are all damaged or do not fit the objective, or if the
    tracker cannot be used.
    """
    start_clock = clock()
    # cuDNN attention is off, since it makes a new plan for every context length. Making a plan
    # takes most of a step's time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    engine.set_activation_checkpoints(task.objective, config.checkpoint_activations)
    precision, compiled = engine.choose(task, clouds, config, run)
    # Accelerate keeps the precision globally. Stage I (the training of a network that a run needs
    # first, such as its teacher; see pretrain.py) may have run in this process before, with another
    # precision.
    AcceleratorState._reset_state()
    # None, since Accelerate warns if it gets an empty list
    tracked = engine.tracker(config.track, run) or None
    accelerator = Accelerator(
        cpu=engine.ON_CPU, mixed_precision=precision, log_with=tracked, project_dir=run
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
        problem = f"{run}/checkpoints is missing, although the run had saved them"
        raise ValueError(f"{problem}: start again with another --out")
    model, optimizer = accelerator.prepare(objective, optimizer)
    if accelerator.scaler and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    local_size = schedule.batch_size // accelerator.num_processes // config.accumulate
    rank = accelerator.process_index
    is_main, file = accelerator.is_main_process, run and run / "metrics.jsonl"
    reporter = Progress(file, state, total, schedule.batch_size, is_main, start_clock)

    def check_finite(loss: float) -> float:
        if not math.isfinite(loss):
            problem = f"the loss is {loss} at step {state['step']}"
            raise Diverged(f"{problem}: lower --lr (now {schedule.lr})")
        return loss

    def save(loss: float) -> None:
        check_finite(loss)  # never replace a good checkpoint by a diverged one
        if run and accelerator.is_main_process:
            scaler, folder = accelerator.scaler, run / "checkpoints"
            state["scaler"] = scaler.state_dict() if scaler else {}
            stamped = reporter.stamp(state)
            checkpoint.save(folder, objective, optimizer.optimizer, stamped)
        accelerator.wait_for_everyone()

    def read(step: int) -> list:
        """Read a step's data. Returns for each micro-batch of this process: the index of its first
        row in the global batch, the indices of its clouds, and their points.
        """
        sizes = schedule.batch_size, len(clouds), clouds.shard_sizes
        batch = batch_index(config.seed, step, *sizes)
        micro_batches: list[tuple[int, np.ndarray, Tensor]] = []
        for i in range(config.accumulate):
            first = (i * accelerator.num_processes + rank) * local_size
            rows = batch[first : first + local_size]
            points = to_device(clouds.batch(rows), accelerator.device)
            micro_batches.append((first, rows, points))
        return micro_batches

    def forward_backward(
        points: Tensor, generator: BatchGenerator, progress: float = 0.0, *targets: Tensor
    ) -> Any:
        """Run the forward and backward pass on this process's part of a micro-batch."""
        if task.augments:
            ranges = config.scale, config.rotate, config.translate
            points = augment(points, *ranges, generator)
        output = model(points, generator, progress, *targets)
        accelerator.backward(output.loss / config.accumulate)
        return output

    def score_network(step: int) -> float:
        """Score the network; save its weights if the score is the best so far."""
        assert task.scorer
        score = task.scorer()
        model.train()
        if state["best"] is None or score > state["best"]["score"]:
            state["best"] = {"step": step, "score": score}
            if run and accelerator.is_main_process:
                checkpoint.replace_folder(run / "best", task.module.save_pretrained)
        return score

    first_step = state["step"]
    model.train()
    if task.scorer and task.scores_first and first_step == 0:
        score = score_network(0)
        if accelerator.is_main_process:
            found = f"{task.scored_split} {score:.4g}"
            log.info(f"step 0/{total:,}, head fitted, no training yet: {found}")
    repeatable = can_repeat(config, accelerator.num_processes, accelerator.device)
    graphs = Repeated(forward_backward, objective) if repeatable else None
    batches = read_ahead(read, range(first_step, total))
    with _stop_signals() as signals, ExitStack() as cleanup:
        cleanup.callback(reporter.bar.close)
        cleanup.callback(batches.close)
        for tracking in accelerator.trackers:
            cleanup.callback(tracking.finish)  # also when interrupted
        # ------------------------------------------------------------------------ the training loop
        while (step := state["step"]) < total:
            loss, output = torch.zeros((), device=accelerator.device), None
            try:
                micro_batches = next(batches)
            except ReadError as error:
                # The data is unreadable, but the weights are good: save them (a loss of 0.0 passes
                # the check of the loss).
                if step > first_step and accelerator.num_processes == 1:
                    save(0.0)
                found = f"{error}, read at step {step + 1}"
                raise ReadError(f"{found}; {BAD_CLOUD}") from error
            for i, (first, index, points) in enumerate(micro_batches):
                generator = BatchGenerator(config.seed, step, first, schedule.batch_size)
                targets = task.targets(index) if task.targets else ()
                targets = [target.to(accelerator.device) for target in targets]
                last = i == config.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    if graphs:
                        output = graphs(points, generator)
                    else:
                        output = forward_backward(points, generator, step / total, *targets)
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
            # an epoch ended in this step if less than a batch has been drawn since its end
            epoch_ended = step * schedule.batch_size % len(clouds) < schedule.batch_size
            scored = task.scorer and (step == total or epoch_ended)
            if step % config.log_every == 0 or step in (1, total) or snapshot or scored:
                metrics = {
                    "loss": check_finite(accelerator.reduce(loss, "mean").item()),
                    "epoch": step * schedule.batch_size / len(clouds),
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": 0.0 if norm is None else norm.item(),
                }
                metrics |= objective.metrics(cast(Any, output))
                if scored:
                    metrics[task.scored_split] = score_network(step)
                reporter.log(step, metrics)
                accelerator.log(metrics, step)
            if run and snapshot and accelerator.is_main_process:
                folder = run / "snapshots" / f"step-{step:07d}"
                checkpoint.replace_folder(folder, task.module.save_pretrained)
            stopping = stop_requested(accelerator, signals, step) or step == stop_at
            if step % config.checkpoint_every == 0 or step == total or stopping:
                save(loss.item())
            if stopping and step < total:
                raise Interrupted(f"stopped at step {step:,} of {total:,}, saved")
        # ------------------------------------------------------------------------------------------
    final = {"metrics": reporter.last_metrics, "mixed_precision": precision}
    return reporter.stamp(state) | reporter.step_cost | final


def read_ahead(read: Callable[[int], Any], steps: range) -> Generator[Any]:
    """Yield read(step) for every step. Meanwhile, a thread reads the data of the next step."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(read, step) for step in steps[:1]]
        for step in steps:
            batch = waiting.pop().result()
            if step + 1 < steps.stop:
                waiting.append(pool.submit(read, step + 1))
            yield batch


def to_device(points: Tensor, device: torch.device) -> Tensor:
    """Move points to the device; do not wait for the end of the copy if `device` is a CUDA GPU."""
    if torch.get_device_module(device).__name__ != "torch.cuda":
        return points.to(device)
    return points.pin_memory().to(device, non_blocking=True)


def _has_saved(run: Path, config: RunConfig) -> bool:
    """Return whether the run must have saved a checkpoint. The first checkpoint is saved at step
    `config.checkpoint_every` at the latest, so the answer is yes if a later step was logged.
    """
    return any(line["step"] > config.checkpoint_every for line in Run(run).metrics)


def batch_index(
    seed: int, step: int, batch_size: int, num_samples: int, shard_sizes: tuple[int, ...] = ()
) -> np.ndarray:
    """Return the sample indices of one global batch.

    The shuffled epochs are joined and cut into batches, so a batch may span two epochs. The result
    depends on the arguments alone: it is the same after a resume and for any number of processes.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // num_samples):
        order = epoch_order(seed, int(epoch), num_samples, shard_sizes)
        in_epoch = positions // num_samples == epoch
        out[in_epoch] = order[positions[in_epoch] % num_samples]
    return out


@lru_cache(maxsize=2)
def epoch_order(
    seed: int, epoch: int, num_samples: int, shard_sizes: tuple[int, ...] = ()
) -> np.ndarray:
    """Return the sample indices of an epoch in random order.

    A store of more than `WINDOW` shards is shuffled within groups of `WINDOW` random shards, so
    that few files are open at once.
    """
    rng = np.random.default_rng([seed, epoch])
    if len(shard_sizes) <= WINDOW:
        return rng.permutation(num_samples)
    first = np.cumsum((0, *shard_sizes))
    shards = rng.permutation(len(shard_sizes))
    order = []
    for i in range(0, len(shards), WINDOW):
        rows = [np.arange(first[s], first[s + 1]) for s in shards[i : i + WINDOW]]
        order.append(rng.permutation(np.concatenate(rows)))
    return np.concatenate(order)


def stop_requested(accelerator: Accelerator, signals: list, step: int) -> bool:
    """Return whether any process received a signal to stop. If there are several processes, they
    check this only every 10 steps.
    """
    if accelerator.num_processes == 1:
        return bool(signals)
    if step % 10:
        return False
    flag = torch.tensor(float(bool(signals)), device=accelerator.device)
    return accelerator.reduce(flag, "sum").item() > 0


@contextmanager
def _stop_signals():
    """Yield a list that collects SIGINT and SIGTERM. A second signal of the same kind has its usual
    effect. In other threads than the main one, all signals have their usual effect.
    """
    received: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows only the main thread to handle signals
        return
    handlers = {name: signal.getsignal(name) for name in names}

    def receive(number, frame) -> None:
        received.append(number)
        print("stopping after this step", file=sys.stderr, flush=True)
        signal.signal(number, handlers[number])

    try:
        for name in names:
            signal.signal(name, receive)
        yield received
    finally:
        for name in names:
            signal.signal(name, handlers[name])
