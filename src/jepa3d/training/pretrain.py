"""Pretraining: settings and data in, a run folder out (`run.py`), in one stage or two."""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
from jepa3d.training.engine import settle
from jepa3d.training.loop import Task, fit
from jepa3d.training.optim import total_steps
from jepa3d.training.progress import cpu_seconds
from jepa3d.training.runs import count_parameters, is_main, wait_for_everyone
from jepa3d.validate import validate

Network = DVAE | PointEncoder
TIMED_STEPS = 9  # of a stage whose cost is measured; the first is not timed


def make_task(
    config: PretrainConfig, objective: str, clouds: PointClouds, networks: dict[str, Network]
) -> Task:
    """What the loop trains for an objective.

    networks: those of stage I and those given, by name.
    """
    torch.manual_seed(config.seed)
    schedule = config.schedule(objective)
    if objective == "dvae":
        dvae = make_dvae(config)
        return Task(Autoencoding(config.dvae, dvae), schedule, "dvae", dvae)
    encoder = PointEncoder(**vars(config.encoder))
    # An EMA teacher reads these statistics from step 1.
    calibrate_batchnorm(encoder, clouds.batch(_some(config.seed, len(clouds))))
    if is_code(objective):
        return Task(load_code(objective)(config, encoder), schedule, "encoder", encoder)
    if objective == "generative":
        return Task(Generative(config, encoder), schedule, "encoder", encoder)
    if objective == "invariance":
        return Task(Invariance(config, encoder), schedule, "encoder", encoder, augments=False)
    # before a warm start, the average after it
    networks = networks | {"untrained": copy.deepcopy(encoder)}
    if config.init:
        warm_start(encoder, networks[config.init], config.init)
    networks["ema"] = copy.deepcopy(encoder)
    return Task(JEPA(config, encoder, make_teacher(config, networks)), schedule, "encoder", encoder)


def _some(seed: int, count: int) -> np.ndarray:
    """The 512 shapes, or all of fewer, whose statistics an encoder is given."""
    return np.random.default_rng(seed).permutation(count)[:512]


def to_export(network: Network, clouds: PointClouds, seed: int) -> Network:
    """A copy of an encoder whose vectors are standardised by some of the clouds; a dVAE as it is."""
    if isinstance(network, DVAE):
        return network
    network = copy.deepcopy(network).eval()
    standardise_vectors(network, clouds.batch(_some(seed, len(clouds))))
    return network


def make_dvae(config: PretrainConfig) -> DVAE:
    """The stage-I dVAE, with the student's num_groups and group_size."""
    names = "width num_codes num_points tokenizer_dim dgcnn_dim folding_dim".split()
    sizes = {name: getattr(config.dvae, name) for name in names}
    sizes |= {name: getattr(config.encoder, name) for name in ("num_groups", "group_size")}
    backbone = reference(config.dvae.backbone) if config.dvae.backbone else ""
    return DVAE(backbone=backbone, **sizes)


def make_teacher(config: PretrainConfig, networks: dict[str, Network]) -> Teacher | None:
    """All teachers of the configuration joined; None where there is none."""
    if config.teacher == ("none",):
        return None
    average = config.teacher.index("ema") if "ema" in config.teacher else None
    return Teacher(
        [networks[name] for name in config.teacher],
        config.target.norm,
        config.target.layers,
        average,
    )


def warm_start(encoder: PointEncoder, source: Network, name: str) -> None:
    """Weights and statistics of `source`. ValueError where it is not the same architecture."""
    try:
        encoder.load_weights(source)
    except RuntimeError as error:
        hint = "encoder.*; encoder.qkv_bias for one older than that setting"
        raise ValueError(f"init {name}: not an encoder of this run's sizes ({hint})") from error


@runs.exclusive
def pretrain(
    config: PretrainConfig,
    out: Path,
    resume: bool = False,
    stop_at: int | None = None,
    clouds: PointClouds | None = None,
    stage_one: Iterable[Path] = (),
) -> Path:
    """Run `config` into the folder `out`, stage I first for every network that 3D-JEPA needs and
    does not get.

    A finished run of `stage_one` whose settings are those that stage I needs is copied instead of
    trained again. Raises ValueError for settings or data that cannot work, before anything is
    written, and loop.Interrupted.
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
        created = {
            "departures": settings.departures(config, len(clouds)),
            "parameters": {
                task.export: count_parameters(task.module),
                "trained": count_parameters(task.objective, True),
            },
        }
        if task.export == "dvae" and (backbone := task.module.backbone):
            created["backbone"] = {"name": backbone.name, "sha256": backbone.sha256}
        given = {
            f"given/{i}": network
            for i, network in enumerate(networks.values())
            if isinstance(network, Pretrained)
        }
        runs.create(out, settings.to_dict(config), clouds, created, given)
    wait_for_everyone()
    for name in config.stages:
        folder = out / "stage1" / name
        if is_main() and not folder.exists():
            runs.copy_twin(config.stage(name), folder, stage_one)
        wait_for_everyone()
        pretrain(config.stage(name), folder, folder.exists(), clouds=stage_clouds.get(name, clouds))
        networks[name] = load_module(str(folder))
    task = make_task(config, config.objective, clouds, networks)
    if task.export == "encoder" and is_main() and not (out / "untrained").exists():
        fresh = (
            task
            if not config.init
            else make_task(replace(config, init=None), config.objective, clouds, networks)
        )
        checkpoint.replace_folder(
            out / "untrained", to_export(fresh.module, clouds, config.seed).save_pretrained
        )
    state = fit(with_cache(task, clouds, config, out), clouds, config, out, stop_at)
    if is_main():
        checkpoint.replace_folder(
            out / task.export, to_export(task.module, clouds, config.seed).save_pretrained
        )
        runs.finish(out, runs.cost_of(out, state), state["metrics"])
    wait_for_everyone()
    return out


def teacher_to_cache(config: PretrainConfig, task: Task) -> Teacher | None:
    """The frozen teacher whose targets the configuration wants computed beforehand."""
    return (
        task.objective.teacher if config.target.cache and isinstance(task.objective, JEPA) else None
    )


def with_cache(task: Task, clouds: PointClouds, config: PretrainConfig, out: Path | None) -> Task:
    """The task with its teacher's targets computed beforehand, where wanted; in memory without a
    run.
    """
    teacher = teacher_to_cache(config, task)
    if teacher is None:
        return task
    targets = cache.CachedTargets(config, len(clouds), teacher.width, out and out / "cache")
    targets.fill(teacher, clouds, config)
    return replace(task, targets=targets)


def load_given(config: PretrainConfig, started: Path | None) -> dict[str, Network]:
    """The networks that the configuration names by folder, Hub id or function.

    A started run has copies of the first two, in given/.
    """
    if config.objective != "jepa":
        return {}
    names = [*config.teacher, *([config.init] if config.init else [])]
    given = [name for name in dict.fromkeys(names) if name not in (*STAGE_ONE, *TEACHERS)]
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
    """The data at the number of points of an objective, twice that for views if it has them.

    `loaded` is returned as it is if it has that number already.
    """
    num_points = config.dvae.num_points if objective == "dvae" else config.encoder.num_points
    viewed = objective == "jepa" and config.target.view > 0
    if loaded is not None and loaded.points.shape[1] in (
        num_points,
        2 * num_points if viewed else num_points,
    ):
        return loaded
    if viewed:  # of which a view still has enough when some are cut away
        with suppress(ReadError):
            return load(config.data, 2 * num_points, config.split, config.up_axis, limit=limit)
    return load(config.data, num_points, config.split, config.up_axis, limit=limit)


def rehearse(config: PretrainConfig, clouds: PointClouds, given: dict[str, Network]) -> Task:
    """Build every stage and draw one sample, so that what cannot work fails before anything is
    written.
    """
    stages = {name: make_task(config, name, clouds, {}).module for name in config.stages}
    task = make_task(config, config.objective, clouds, given | stages)
    if config.objective == "jepa":
        points = clouds.batch(np.arange(min(len(clouds), 64)))
        centers = group(points, config.encoder.num_groups, config.encoder.group_size).centers
        check_sample(make_sampler(config)(centers, BatchGenerator(config.seed)))
    return task


class StageTrial(NamedTuple):
    """Some steps of one stage on a few clouds, and what they cost; nothing is written."""

    stage: str
    task: Task
    clouds: PointClouds
    shapes: int  # that the whole data has
    steps: int  # of the whole stage
    # wall and CPU seconds of asking the teachers about all shapes; 0 unless their targets are
    # cached
    asking: np.ndarray
    state: dict  # of `fit`


def try_stages(config: PretrainConfig, steps: int) -> Iterator[StageTrial]:
    """Take `steps` steps of every stage, on the clouds of two batches."""
    networks = load_given(config, None)
    for stage in (*config.stages, config.objective):
        schedule = config.schedule(stage)
        clouds = clouds_of(config, stage, limit=2 * schedule.batch_size)
        shapes = clouds.available or len(clouds)
        task = make_task(config, stage, clouds, networks)
        began = np.array([time.perf_counter(), cpu_seconds()])
        task = with_cache(
            replace(task, schedule=replace(schedule, max_steps=steps)), clouds, config, None
        )
        asking = (
            np.array([time.perf_counter(), cpu_seconds()]) - began if task.targets else np.zeros(2)
        )
        state = fit(task, clouds, replace(config, log_every=steps, snapshot_every=None), None)
        networks[stage] = task.module
        whole = total_steps(schedule, shapes)
        yield StageTrial(stage, task, clouds, shapes, whole, asking * (shapes / len(clouds)), state)


def cpu_costs(config: PretrainConfig) -> tuple[float, float]:
    """CPU-seconds of a run before its own first step (stage I, asking teachers), and of each of its
    steps; measured.
    """
    before, step = 0.0, 0.0
    for trial in try_stages(settle(config), TIMED_STEPS):
        step = trial.state["step_cpu_seconds"]
        before += trial.asking[1] + (trial.steps * step if trial.stage != config.objective else 0.0)
    return before, step


def dry_run(config: PretrainConfig) -> None:
    """Resolve data, build, take two steps of every stage, print what the whole run will cost, write
    nothing.
    """
    check(config := settle(config))
    spent, memory, disk = [], 0.0, 0
    for trial in try_stages(config, 2):
        stage, task, clouds, shapes, steps, asking, state = trial
        if teacher := teacher_to_cache(config, task):
            disk += cache.num_bytes(cache.columns(config, shapes, teacher.width))
            spent.append(("asking the teachers", asking[0]))
        size, batch = count_parameters(task.module), config.schedule(stage).batch_size
        spent.append((f"{stage} {steps:,} steps of {batch}", steps * state["step_seconds"]))
        unread = 0 if clouds.shard_sizes else (shapes - len(clouds)) * clouds.points[0].nbytes
        memory = max(memory, state["peak_memory"] + (unread if runs.ON_CPU else 0))
        # Two checkpoints of weights and two moments; what is kept before and after, and on the way.
        snapshots = (
            steps // config.snapshot_every
            if config.snapshot_every and stage == config.objective
            else 0
        )
        disk += 4 * (6 * count_parameters(task.objective, True) + size * (2 + snapshots))
        log.info(
            f"dry run, {stage}: {len(clouds)} clouds of {clouds.points.shape[1]} points read, "
            f"2 steps of {batch} in {state['wall_seconds']:.1f} s, "
            f"{size / 1e6:.2f} M parameters in the {task.export}; nothing written"
        )
    if is_main():
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent)
        log.info(
            f"the whole run on {shapes:,} shapes takes about {duration(sum(s for _, s in spent))} here: {parts}"
        )
        log.info(
            f"it needs about {memory / 2**30:.2f} GiB of memory and at most {disk / 1e9:.2f} GB of disk"
        )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def check(config: PretrainConfig) -> None:
    """Settings that can be refused before data is read."""
    validate(config)
    for objective in (*config.stages, config.objective):
        runs.check_batch(config, f"{objective}: batch_size", config.schedule(objective).batch_size)
