"""Pretraining runs: settings and data in, a folder out, in one stage or two.

RUN/config.json        the resolved settings            RUN/checkpoints/  the newest whole checkpoint
RUN/run.json           data, versions, cost, status     RUN/untrained/    the encoder before the first step
RUN/metrics.jsonl      one line a log step              RUN/encoder/      the encoder after the last (or RUN/dvae/)
RUN/stage1/            the dVAE's own run, if one was trained; RUN/teacher/ a given teacher's copy
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from jepa3d import config as settings
from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds, load
from jepa3d.evaluation.protocol import provenance
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm
from jepa3d.models.teacher import Teacher, ema_teacher, load_module
from jepa3d.models.tokenizer import group
from jepa3d.objectives.autoencoding import Autoencoding
from jepa3d.objectives.jepa import JEPA, make_sampler
from jepa3d.ops import BatchGenerator
from jepa3d.training import checkpoint
from jepa3d.training.loop import ON_CPU, Task, fit


def jepa_task(config: PretrainConfig, clouds: PointClouds, teacher: DVAE | PointEncoder | None) -> Task:
    """Encoder, decoder and teacher from the configuration; None is the EMA teacher."""
    torch.manual_seed(config.seed)
    encoder = PointEncoder(**vars(config.encoder))
    sample = np.random.default_rng(config.seed).permutation(len(clouds))[:512]
    calibrate_batchnorm(encoder, clouds.batch(sample))  # an EMA teacher reads these statistics from step 1
    norm = config.target.norm
    speaker = Teacher(teacher, norm) if teacher else ema_teacher(encoder, norm)
    return Task(JEPA(config, encoder, speaker), config, "encoder", encoder)


def dvae_task(config: PretrainConfig) -> Task:
    """Stage I, on the student's grouping."""
    torch.manual_seed(config.seed)
    part, student = config.dvae, config.encoder
    sizes = {
        name: getattr(part, name)
        for name in ("width", "num_codes", "num_points", "tokenizer_dim", "dgcnn_dim", "folding_dim")
    }
    dvae = DVAE(num_groups=student.num_groups, group_size=student.group_size, **sizes)
    return Task(Autoencoding(part, dvae), part, "dvae", dvae)


def pretrain(
    config: PretrainConfig,
    out: Path,
    resume: bool = False,
    stop_at: int | None = None,
    clouds: PointClouds | None = None,
) -> Path:
    """Run `config` into the folder `out`, stage I first where the teacher is a dVAE of our own.

    Raises ValueError for settings or data that cannot work, before anything is written, and loop.Interrupted.
    """
    started, existed = (out / "config.json").exists(), out.exists()
    processes = PartialState(cpu=ON_CPU)
    processes.wait_for_everyone()  # all have looked before the first one writes
    if existed and not (resume and started):
        raise ValueError(
            f"{out}: exists already; choose another --out" + (", or continue it with --resume" if started else "")
        )
    if resume and not started:
        raise ValueError(f"{out}: no run to resume")
    check(config)
    if started:
        check_unchanged(config, out)
        if json.loads((out / "run.json").read_text())["status"] == "finished":
            print(f"{out}: finished already")
            return out
    is_jepa = config.objective == "jepa"
    needs_dvae = is_jepa and config.teacher == "dvae"
    clouds = clouds_of(config, config.objective, clouds)
    given = None
    if is_jepa and not needs_dvae and config.teacher != "ema":
        given = load_module(str(out / "teacher") if started else config.teacher)
    stage1_clouds = None
    if started:
        check_same_data(clouds, out)
    else:
        stage1_clouds = clouds_of(config, "dvae", clouds) if needs_dvae else None
        create_run(out, config, clouds, rehearse(config, clouds, given), given)
    processes.wait_for_everyone()
    if needs_dvae:
        stage1 = replace(config, objective="dvae")
        pretrain(stage1, out / "stage1", (out / "stage1").exists(), clouds=stage1_clouds or clouds)
        given = load_module(str(out / "stage1"))
    task = jepa_task(config, clouds, given) if is_jepa else dvae_task(config)
    if is_jepa and is_main() and not (out / "untrained").exists():
        checkpoint.replace_folder(out / "untrained", task.module.save_pretrained)
    state = fit(task, clouds, config, out, stop_at)
    if is_main():
        checkpoint.replace_folder(out / task.export, task.module.save_pretrained)
        finish_run(out, state)
    processes.wait_for_everyone()
    return out


def clouds_of(
    config: PretrainConfig, objective: str, loaded: PointClouds | None = None, limit: int | None = None
) -> PointClouds:
    """The data at the number of points of an objective; `loaded` if that is it."""
    num_points = config.dvae.num_points if objective == "dvae" else config.encoder.num_points
    if loaded is not None and loaded.points.shape[1] == num_points:
        return loaded
    return load(config.data, num_points, config.split, config.up_axis, limit=limit)


def rehearse(config: PretrainConfig, clouds: PointClouds, given: DVAE | PointEncoder | None) -> Task:
    """Build every stage and draw one sample, so that what cannot work fails before anything is written."""
    if config.objective == "dvae":
        return dvae_task(config)
    dvae = dvae_task(config).module if config.teacher == "dvae" else None
    task = jepa_task(config, clouds, given or dvae)
    points = clouds.batch(np.arange(min(len(clouds), 64)))
    centers = group(points, config.encoder.num_groups, config.encoder.group_size).centers
    make_sampler(config)(centers, BatchGenerator(config.seed))
    return task


def dry_run(config: PretrainConfig) -> None:
    """Resolve data, build, take two steps of every stage, print memory and time, write nothing."""
    check(config)
    stages = ["dvae"] if config.objective == "dvae" or config.teacher == "dvae" else []
    stages += ["jepa"] if config.objective == "jepa" else []
    given = None
    for stage in stages:
        is_jepa = stage == "jepa"
        schedule = config if is_jepa else config.dvae
        clouds = clouds_of(config, stage, limit=2 * schedule.batch_size)
        if is_jepa and config.teacher not in ("dvae", "ema"):
            given = load_module(config.teacher)
        task = jepa_task(config, clouds, given) if is_jepa else dvae_task(config)
        task = replace(task, schedule=replace(schedule, max_steps=2))
        state = fit(task, clouds, replace(config, log_every=1), None)
        given = task.module if not is_jepa else None
        print(
            f"dry run, {stage}: {len(clouds)} clouds of {clouds.points.shape[1]} points read, "
            f"2 steps of {schedule.batch_size} in {state['wall_seconds']:.1f} s, "
            f"peak memory {state['peak_memory'] / 2**30:.2f} GiB, "
            f"{count_parameters(task.module) / 1e6:.2f} M parameters in the {task.export}; nothing written"
        )


def check(config: PretrainConfig) -> None:
    """Settings that can be refused before data is read."""
    settings.validate(config)
    processes = PartialState(cpu=ON_CPU).num_processes
    for name, size in (("batch_size", config.batch_size), ("dvae.batch_size", config.dvae.batch_size)):
        if size % processes:
            raise ValueError(f"{name} {size} is not a multiple of the {processes} processes")


def check_unchanged(config: PretrainConfig, out: Path) -> None:
    """A resumed run has the settings it began with."""
    before = json.loads((out / "config.json").read_text())
    if changed := settings.differences(settings.to_dict(config), before):
        name, (now, then) = next(iter(changed.items()))
        raise ValueError(f"{out}: began with {name} = {then}, not {now}; --resume cannot change it")


def check_same_data(clouds: PointClouds, out: Path) -> None:
    before = json.loads((out / "run.json").read_text())["data"]
    if (clouds.fingerprint, len(clouds)) != (before["fingerprint"], before["shapes"]):
        raise ValueError(
            f"{out}: the data changed since the run began: {clouds.name} with {len(clouds)} shapes, "
            f"then {before['name']} with {before['shapes']}"
        )


def create_run(
    out: Path, config: PretrainConfig, clouds: PointClouds, task: Task, given: DVAE | PointEncoder | None
) -> None:
    """Config and provenance, whole or not at all."""
    if not is_main():
        return
    record = provenance() | {
        "status": "running",
        "data": {"name": clouds.name, "fingerprint": clouds.fingerprint, "shapes": len(clouds)},
        "departures": settings.departures(config, len(clouds)),
        "parameters": {task.export: count_parameters(task.module), "trained": count_parameters(task.objective, True)},
    }

    def write(partial: Path) -> None:
        checkpoint.write_json(partial / "config.json", settings.to_dict(config))
        checkpoint.write_json(partial / "run.json", record)
        if given is not None:
            given.save_pretrained(partial / "teacher")

    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_folder(out, write, new=True)


def finish_run(out: Path, state: dict) -> None:
    record = json.loads((out / "run.json").read_text())
    cost = {key: state[key] for key in ("step", "cpu_seconds", "wall_seconds", "peak_memory")}
    if (stage1 := out / "stage1" / "run.json").exists():
        before = json.loads(stage1.read_text())["cost"]
        cost["stage1_cpu_seconds"] = before["cpu_seconds"]
        cost["stage1_wall_seconds"] = before["wall_seconds"]
    checkpoint.write_json(out / "run.json", record | {"status": "finished", "cost": cost, "metrics": state["metrics"]})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def is_main() -> bool:
    return PartialState(cpu=ON_CPU).is_main_process


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
