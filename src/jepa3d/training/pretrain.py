"""Pretraining: from settings and data to a run folder (`run.py`). Some settings need a network that
must be trained first: a teacher, such as a dVAE, or a network that gives the initial weights. The
training of such a network is stage I.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa3d import config as settings
from jepa3d.config import STAGE_ONE, TEACHERS, PretrainConfig
from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import PointClouds, load
from jepa3d.models.backbone import reference
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm, standardise_vectors
from jepa3d.models.hub import Pretrained
from jepa3d.models.sampling import check_sample
from jepa3d.models.teacher import Teacher, load_module
from jepa3d.models.tokenizer import group
from jepa3d.objectives.autoencoding import Autoencoding
from jepa3d.objectives.generative import Generative
from jepa3d.objectives.invariance import Invariance
from jepa3d.objectives.jepa import JEPA, make_sampler
from jepa3d.ops import BatchGenerator
from jepa3d.plain import is_code, load_code, log
from jepa3d.training import cache, checkpoint, runs
from jepa3d.training.engine import settle, tracker
from jepa3d.training.loop import Task, fit
from jepa3d.training.optim import total_steps
from jepa3d.training.progress import clock, spent_since
from jepa3d.training.runs import count_parameters, is_main, wait_for_everyone
from jepa3d.validate import departures, validate

Network = DVAE | PointEncoder
# number of steps taken to measure the CPU time per step of a stage; the first step is not timed
TIMED_STEPS = 9


def make_task(
    config: PretrainConfig, objective: str, clouds: PointClouds, networks: dict[str, Network]
) -> Task:
    """Build the task that `fit` (loop.py) trains for an objective.

    networks: name -> network, for the networks of stage I and for those that the settings give by
    folder, Hub id or function.
    """
    torch.manual_seed(config.seed)
    schedule = config.schedule(objective)
    if objective == "dvae":
        dvae = make_dvae(config)
        return Task(Autoencoding(config.dvae, dvae), schedule, "dvae", dvae)
    encoder = PointEncoder(**vars(config.encoder))
    # An EMA teacher uses these BatchNorm statistics from step 1.
    calibrate_batchnorm(encoder, clouds.batch(_some(config.seed, len(clouds))))
    if objective == "jepa":
        # The teacher "untrained" is a copy of the encoder before `warm_start`. The teacher "ema" is
        # a copy after it.
        networks = networks | {"untrained": copy.deepcopy(encoder)}
        if config.init:
            warm_start(encoder, networks[config.init], config.init)
        networks["ema"] = copy.deepcopy(encoder)
        trained: Any = JEPA(config, encoder, make_teacher(config, networks))
    else:
        others = {"generative": Generative, "invariance": Invariance}
        trained = (others.get(objective) or load_code(objective))(config, encoder)
    return Task(trained, schedule, "encoder", encoder, augments=objective != "invariance")


def _some(seed: int, count: int) -> np.ndarray:
    """Choose up to 512 random shapes; returns their indices. The statistics of BatchNorm, and those
    that standardise vectors, are computed over these shapes.
    """
    return np.random.default_rng(seed).permutation(count)[:512]


def _export(network: Network, clouds: PointClouds, seed: int, folder: Path) -> None:
    """Save a network. If it is an encoder, the saved copy also has the statistics that standardise
    its vectors.
    """
    if isinstance(network, PointEncoder):
        network = copy.deepcopy(network).eval()
        standardise_vectors(network, clouds.batch(_some(seed, len(clouds))))
    checkpoint.replace_folder(folder, network.save_pretrained)


def make_dvae(config: PretrainConfig) -> DVAE:
    """Create the dVAE of stage I, with the student's settings `num_groups` and `group_size`."""
    names = "width num_codes num_points tokenizer_dim dgcnn_dim folding_dim".split()
    sizes = {name: getattr(config.dvae, name) for name in names}
    encoder = config.encoder
    sizes |= {"num_groups": encoder.num_groups, "group_size": encoder.group_size}
    backbone = reference(config.dvae.backbone) if config.dvae.backbone else ""
    return DVAE(backbone=backbone, **sizes)


def make_teacher(config: PretrainConfig, networks: dict[str, Network]) -> Teacher | None:
    """Combine all teachers of the configuration into one; returns None if `teacher` is "none".
    Raises ValueError if an encoder has fewer blocks than `target.layers`.
    """
    if config.teacher == ("none",):
        return None
    teachers, target = [networks[name] for name in config.teacher], config.target
    for name, teacher in zip(config.teacher, teachers, strict=True):
        if isinstance(teacher, PointEncoder) and (depth := teacher.depth) < target.layers:
            found = f"exceeds the depth {depth} of teacher {name}"
            raise ValueError(f"target.layers {target.layers} {found}")
    average = config.teacher.index("ema") if "ema" in config.teacher else None
    return Teacher(teachers, target.norm, target.layers, average)


def warm_start(encoder: PointEncoder, source: Network, name: str) -> None:
    """Copy weights and BatchNorm statistics from `source` to `encoder`. Raises ValueError if their
    architectures differ.
    """
    try:
        encoder.load_weights(source)
    except RuntimeError as error:
        hint = "compare the settings encoder.*; encoders of old versions need encoder.qkv_bias"
        found = f"is not an encoder of this run's sizes: {hint}"
        raise ValueError(f"init {name} {found}") from error


@runs.exclusive
def pretrain(
    config: PretrainConfig,
    out: Path,
    resume: bool = False,
    stop_at: int | None = None,
    clouds: PointClouds | None = None,
    stage_one: Iterable[Path] = (),
) -> Path:
    """Train the networks of stage I, if the settings need any. Then pretrain with the settings
    `config`, in the folder `out`.

    resume: continue the run in `out`, which must have the same settings and data. stop_at: step at
    which the run stops early. clouds: the data, if it is loaded already. stage_one: earlier runs of
    stage I; if a finished one has the settings that this run needs, it is copied, and its network
    is not trained again. Returns `out`. Raises ValueError for settings or data that cannot work,
    before anything is written. Also raises the errors of `fit` (training/loop.py), such as
    Interrupted if the run is stopped, and Diverged if the loss is NaN or infinite.
    """
    started = runs.begin(out, resume)
    config = settle(config, out if started else None)
    check(config)
    if started:
        runs.check_unchanged(config, out)
        if runs.close_if_finished(out):
            return out
    networks = load_given(config, out if started else None)
    clouds = clouds_of(config, config.objective, clouds)
    stage_clouds = {}
    if started:
        runs.check_same_data(clouds, out)
    else:
        stage_clouds = {name: clouds_of(config, name, clouds) for name in config.stages}
        task = rehearse(config, clouds, networks)
        if teacher := teacher_to_cache(config, task):
            cache.check_space(config, len(clouds), teacher.width, out)
        parameters = {
            task.export: count_parameters(task.module),
            "trained": count_parameters(task.objective, True),
        }
        different = departures(config, len(clouds))
        created: dict[str, Any] = {"departures": different, "parameters": parameters}
        if task.export == "dvae" and (backbone := task.module.backbone):
            created["backbone"] = {"name": backbone.name, "sha256": backbone.sha256}
        named = ((f"given/{i}", network) for i, network in enumerate(networks.values()))
        given = {name: found for name, found in named if isinstance(found, Pretrained)}
        runs.create(out, settings.to_dict(config), clouds, created, given)
    wait_for_everyone()
    for name in config.stages:
        folder = out / "stage1" / name
        if is_main() and not folder.exists():
            runs.copy_twin(config.stage(name), folder, stage_one)
        wait_for_everyone()
        clouds_of_stage = stage_clouds.get(name, clouds)
        pretrain(config.stage(name), folder, folder.exists(), clouds=clouds_of_stage)
        networks[name] = load_module(str(folder))
    task = make_task(config, config.objective, clouds, networks)
    if task.export == "encoder" and is_main() and not (out / "untrained").exists():
        untrained, cold = task, replace(config, init=None)
        if config.init:
            untrained = make_task(cold, config.objective, clouds, networks)
        _export(untrained.module, clouds, config.seed, out / "untrained")
    state = fit(with_cache(task, clouds, config, out), clouds, config, out, stop_at)
    if is_main():
        _export(task.module, clouds, config.seed, out / task.export)
        runs.finish(out, runs.cost_of(out, state), state["metrics"])
    wait_for_everyone()
    return out


def teacher_to_cache(config: PretrainConfig, task: Task) -> Teacher | None:
    """Return the frozen teacher whose targets are cached, or None if no targets are cached."""
    cached = config.target.cache and isinstance(task.objective, JEPA)
    return task.objective.teacher if cached else None


def with_cache(task: Task, clouds: PointClouds, config: PretrainConfig, out: Path | None) -> Task:
    """If `target.cache` is True, compute the teacher's targets, and return the task that uses them.
    Otherwise return the task unchanged.

    out: the run's folder, where the targets are stored; None keeps the targets in memory.
    """
    teacher = teacher_to_cache(config, task)
    if teacher is None:
        return task
    folder = out and out / "cache"
    targets = cache.CachedTargets(config, len(clouds), teacher.width, folder)
    targets.fill(teacher, clouds, config)
    return replace(task, targets=targets)


def load_given(config: PretrainConfig, started: Path | None) -> dict[str, Network]:
    """Load the networks that the configuration names by folder, Hub id or function.

    started: the run's folder, or None for a new run. The folder given/ of a started run has copies
    of the networks from folders and the Hub. These copies are read instead of the originals.
    """
    if config.objective != "jepa":
        return {}
    names = dict.fromkeys([*config.teacher, config.init] if config.init else config.teacher)
    given = [name for name in names if name not in (*STAGE_ONE, *TEACHERS)]
    networks = {}
    for i, name in enumerate(given):
        if is_code(name):
            networks[name] = load_code(name)(config)
        elif started:
            networks[name] = load_module(str(started / "given" / str(i)))
        else:
            networks[name] = load_module(name, (*STAGE_ONE, *TEACHERS))
    return networks


def clouds_of(
    config: PretrainConfig,
    objective: str,
    loaded: PointClouds | None = None,
    limit: int | None = None,
) -> PointClouds:
    """Load the data, with as many points per cloud as an objective needs.

    If 3D-JEPA also trains on views (damaged copies of the clouds; `target.view` > 0), it gets twice
    as many points, if the data has them. loaded: clouds to return unchanged if they already have
    the correct number of points. limit: the largest number of clouds to read.
    """
    sizes_of = config.dvae if objective == "dvae" else config.encoder
    num_points = sizes_of.num_points
    viewed = objective == "jepa" and config.target.view > 0
    # Views cut points away, so twice as many points are read; some data does not have so many.
    sizes = (2 * num_points, num_points) if viewed else (num_points,)
    if loaded is not None and loaded.points.shape[1] in sizes:
        return loaded
    for size in sizes[:-1]:
        with suppress(ReadError):
            return load(config.data, size, config.split, config.up_axis, limit=limit)
    return load(config.data, num_points, config.split, config.up_axis, limit=limit)


def rehearse(config: PretrainConfig, clouds: PointClouds, given: dict[str, Network]) -> Task:
    """Build the tasks of stage I and of the run's own objective, and sample masks for some clouds,
    so that impossible settings fail before anything is written. Returns the task of the run's own
    objective.
    """
    tasks = {name: make_task(config, name, clouds, {}) for name in config.stages}
    stages = {name: task.module for name, task in tasks.items()}
    task = make_task(config, config.objective, clouds, given | stages)
    if config.objective == "jepa":
        points, encoder = clouds.batch(np.arange(min(len(clouds), 64))), config.encoder
        centers = group(points, encoder.num_groups, encoder.group_size).centers
        check_sample(make_sampler(config)(centers, BatchGenerator(config.seed)))
    return task


def try_stages(
    config: PretrainConfig, steps: int
) -> Iterator[tuple[str, Task, PointClouds, int, dict, dict]]:
    """Take `steps` steps of every stage, on as many clouds as two batches have. Nothing is written.

    The stages are the trainings of stage I, and then the run's own training. Yields for each stage:
    its name, its task, the clouds, the number of shapes in the whole data, the estimated wall and
    CPU seconds to cache the teacher's targets for all shapes (0 for stages without cached targets),
    and the final state of `fit`.
    """
    networks = load_given(config, None)
    for stage in (*config.stages, config.objective):
        schedule = config.schedule(stage)
        clouds = clouds_of(config, stage, limit=2 * schedule.batch_size)
        shapes = clouds.available or len(clouds)
        task = make_task(config, stage, clouds, networks)
        task = replace(task, schedule=replace(schedule, max_steps=steps))
        start = clock()
        task = with_cache(task, clouds, config, None)
        scale = shapes / len(clouds) if task.targets else 0
        caching = {name: scale * seconds for name, seconds in spent_since(start).items()}
        quiet = replace(config, objective=stage, log_every=steps, snapshot_every=None)
        state = fit(task, clouds, quiet, None)
        networks[stage] = task.module
        yield stage, task, clouds, shapes, caching, state


def cpu_costs(config: PretrainConfig) -> tuple[float, float]:
    """Measure the CPU seconds that a run takes before its first step (stage I and cached targets),
    and the CPU seconds per step.
    """
    before, step = 0.0, 0.0
    for stage, _, _, shapes, caching, state in try_stages(settle(config), TIMED_STEPS):
        step = state["step_cpu_seconds"]
        before += caching["cpu_seconds"]
        if stage != config.objective:
            before += step * total_steps(config.schedule(stage), shapes)
    return before, step


def dry_run(config: PretrainConfig) -> None:
    """Take two steps of every stage, and print the time, memory and disk that the whole run needs.

    Nothing is written.
    """
    check(config := settle(config))
    spent, memory, disk, shapes = [], 0.0, 0, 0
    for stage, task, clouds, shapes, caching, state in try_stages(config, 2):
        if teacher := teacher_to_cache(config, task):
            disk += shapes * cache.row_type(config, teacher.width).itemsize
            spent.append(("caching targets", caching["wall_seconds"]))
        size, batch = count_parameters(task.module), config.schedule(stage).batch_size
        steps = total_steps(config.schedule(stage), shapes)
        what = f"{stage} ({steps:,} steps with batches of {batch})"
        spent.append((what, steps * state["step_seconds"]))
        in_memory = runs.ON_CPU and not clouds.shard_sizes
        unread = (shapes - len(clouds)) * clouds.points[0].nbytes if in_memory else 0
        memory = max(memory, state["peak_memory"] + unread)
        # The disk holds two checkpoints (each with weights and two moments), the network before and
        # after training, and the snapshots.
        snapshots = 2
        if config.snapshot_every and stage == config.objective:
            snapshots += steps // config.snapshot_every
        disk += 4 * (6 * count_parameters(task.objective, True) + size * snapshots)
        log.info(
            f"dry run, {stage}: {len(clouds)} clouds of {clouds.points.shape[1]} points read, "
            f"2 steps with batches of {batch} in {state['wall_seconds']:.1f} s, "
            f"{size / 1e6:.2f} M parameters in the {task.export}; nothing written"
        )
    if is_main():
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent)
        total = duration(sum(seconds for _, seconds in spent))
        what = f"the whole run on {shapes:,} shapes"
        log.info(f"{what} takes about {total} here: {parts}")
        needed = f"{memory / 2**30:.2f} GiB of memory and at most {disk / 1e9:.2f} GB of disk"
        log.info(f"it needs about {needed}")


def duration(seconds: float) -> str:
    """Write a number of seconds as text, such as "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def check(config: PretrainConfig) -> None:
    """Check the settings before any data is read. Raises ValueError if they cannot work."""
    validate(config)
    tracker(config.track, None)
    for objective in (*config.stages, config.objective):
        size = config.schedule(objective).batch_size
        runs.check_batch(config, f"{objective}: batch_size", size)
