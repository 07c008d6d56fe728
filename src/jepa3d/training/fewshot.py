"""Few-shot runs: episodes drawn once and kept, each fine-tuned in its own folder or scored on
frozen features.

OUT/config.json, run.json   as of pretraining                OUT/episodes.json  rows of the data, where they were drawn
OUT/start/    the encoder that every episode begins with     OUT/fold-N/        a run of finetune.py, where fine-tuned
OUT/results.json            mean and standard deviation over folds
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from jepa3d.config import FewshotConfig
from jepa3d.data.datasets import PointClouds, load
from jepa3d.evaluation import fewshot
from jepa3d.evaluation.labelled import Labelled
from jepa3d.evaluation.protocol import Result, moments
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm
from jepa3d.plain import log, read_checked, to_dict
from jepa3d.training import runs
from jepa3d.training.finetune import (
    FINETUNED,
    arm_settings,
    begin,
    finetune,
    init_name,
    num_points,
    pretraining_of,
)
from jepa3d.training.progress import cpu_seconds

WORDS = {
    "finetune": "fine-tuned",
    "ncm": "frozen, nearest class mean",
    "logistic": "frozen, logistic regression",
}


@runs.exclusive
def run_fewshot(config: FewshotConfig, out: Path, resume: bool = False) -> Path:
    """Score every fold and write their mean.

    Raises ValueError, before anything is written, and loop.Interrupted.
    """
    config = replace(config, select="last")  # W * S labels are too few to spare some
    config, encoder, started = begin(config, out, resume)
    if started and runs.close_if_finished(out):
        return out
    clouds, folds, drawn = _folds(config, num_points(config), out / "episodes.json")
    head = FINETUNED[config.trained].removeprefix("fine-tuned").removesuffix(", all weights")
    head = head if config.method == "finetune" else ""
    name = f"{config.ways}-way {config.shots}-shot, {WORDS[config.method]}{head}"
    if encoder is None and config.method != "finetune":
        torch.manual_seed(config.seed)
        encoder = PointEncoder(**vars(config.encoder))
        calibrate_batchnorm(encoder, folds[0][0].batch(np.arange(len(folds[0][0]))))
    if started:
        runs.check_same_data(clouds, out)
    else:
        record = {"pretraining": pretraining_of(config.init)}
        networks = {"start": encoder} if encoder else {}
        runs.create(out, {"task": "fewshot"} | to_dict(config), clouds, record, networks)
        if drawn and runs.is_main():
            fewshot.save_episodes(out / "episodes.json", drawn, clouds.fingerprint)
    runs.wait_for_everyone()

    if config.method == "finetune":
        scores, cost = _finetuned(config, out, name, clouds, folds, encoder)
    else:
        assert encoder is not None
        wall, cpu = time.perf_counter(), cpu_seconds()
        if drawn:
            scores = fewshot.run_frozen(encoder, clouds, drawn, config.method)
        else:
            scores = fewshot.run_frozen_folds(encoder, folds, config.method)
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
    over_folds = moments(scores)
    named = {"overall_accuracy": over_folds["mean"], "std_over_folds": over_folds["std"]}
    # one fold has no std
    named = {name: value for name, value in named.items() if value is not None}
    if runs.is_main():
        result = Result(
            task="fewshot",
            protocol=name,
            data={
                "name": clouds.name,
                "variant": None if drawn else "ModelNet40 few-shot",
                "fingerprint": clouds.fingerprint,
                "classes": config.ways,
                "train": config.ways * config.shots,
                "validation": 0,
                "test": config.ways * config.queries,
                "labels": 1.0,
            },
            init=init_name(config.init, "scratch" if config.method == "finetune" else "untrained"),
            pretraining=pretraining_of(config.init),
            seed=config.seed,
            selection="last epoch" if config.method == "finetune" else "none",
            votes=config.votes,
            metrics=named,
            validation=None,
            details={"folds": scores},
            settings=arm_settings(config)
            | {"ways": config.ways, "shots": config.shots, "queries": config.queries},
            cost=cost,
        )
        runs.finish(out, cost, named, result)
    runs.wait_for_everyone()
    return out


def _finetuned(
    config: FewshotConfig,
    out: Path,
    name: str,
    clouds: PointClouds,
    folds: list[fewshot.Fold],
    encoder: PointEncoder | None,
) -> tuple[list[float], dict[str, float]]:
    """Accuracy of every fold, each a run of its own with its own seed, and what they cost together."""
    scores, costs = [], []
    for i, (train, test) in enumerate(folds):
        fold = replace(config, seed=config.seed + i)
        names = train.class_names or tuple(map(str, range(config.ways)))
        data = Labelled(clouds.name, None, clouds.fingerprint, train, test, None, names)
        folder = out / f"fold-{i}"
        finetune(
            fold,
            folder,
            (folder / "config.json").is_file(),
            data=data,
            encoder=encoder,
            protocol=name,
        )
        done = read_checked(folder / "results.json")
        scores.append(done["metrics"]["overall_accuracy"])
        costs.append(done["cost"])
        log.info(f"fold {i}: {scores[-1]:.1f} %")
        # At the paper's size a gigabyte or two a setting, and no use.
        for network in ("start", "model"):
            shutil.rmtree(folder / network, ignore_errors=True)
    return scores, {
        key: sum(cost[key] for cost in costs) for key in ("wall_seconds", "cpu_seconds")
    }


def _folds(
    config: FewshotConfig, points: int, saved: Path
) -> tuple[PointClouds, list[fewshot.Fold], list[fewshot.Episode] | None]:
    """The published folds at config.data, or folds of episodes drawn with the seed, or before."""
    if Path(config.data).is_dir():
        sizes = config.ways, config.shots, config.folds, config.queries
        folds = fewshot.published_folds(Path(config.data), points, config.up_axis, *sizes)
        if folds:
            digest = "".join(train.fingerprint for train, _ in folds)
            whole = replace(folds[0][0], name=Path(config.data).name, fingerprint=digest)
            return whole, folds, None
    clouds = load([config.data], points, "all", [config.up_axis], config.labels_key)
    if saved.is_file():
        episodes = fewshot.load_episodes(saved, clouds.fingerprint)
    else:
        sizes = config.ways, config.shots, config.folds, config.seed, config.queries
        episodes = fewshot.draw_episodes(clouds, *sizes)
    return clouds, [fewshot.fold_of(clouds, episode) for episode in episodes], episodes
