"""Few-shot runs. An episode is a choice of a few labelled shapes of a few classes, and of test
shapes of the same classes. A fold is an episode with the points of its shapes. Episodes are sampled
once and saved, unless the data has published folds. For each fold, a network is fine-tuned, or
frozen features are scored.

OUT/config.json, run.json   as in pretraining (run.py)
OUT/episodes.json           the sampled episodes, as indices of shapes in the data
OUT/start/                  the encoder that every fold starts from; missing if networks are trained
                            from scratch
OUT/fold-N/                 the fine-tuning run of fold N (finetune.py), if networks are fine-tuned
OUT/results.json            mean and standard deviation of the accuracy over folds
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from jepa3d.config import FewshotConfig
from jepa3d.data.datasets import PointClouds, load
from jepa3d.evaluation import fewshot
from jepa3d.evaluation.labelled import Labelled
from jepa3d.evaluation.protocol import moments
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm
from jepa3d.plain import log, read_checked, to_dict
from jepa3d.training import runs
from jepa3d.training.finetune import (
    TRAINED,
    arm_settings,
    begin,
    finetune,
    pretraining_of,
    size_overrides,
)
from jepa3d.training.progress import clock, spent_since

METHODS = {
    "finetune": "fine-tuned",
    "ncm": "frozen, nearest class mean",
    "logistic": "frozen, logistic regression",
}


@runs.exclusive
def run_fewshot(config: FewshotConfig, out: Path, resume: bool = False) -> Path:
    """Score every fold, and write the mean score to OUT/results.json. Returns `out`.

    Raises ValueError for settings or data that cannot work, before anything is written. Raises
    loop.Interrupted if the run is stopped.
    """
    # There are too few labelled shapes to hold some of them out for validation.
    config = replace(config, select="last")
    config, encoder, started = begin(config, out, resume)
    if started and runs.close_if_finished(out):
        return out
    clouds, folds, episodes = _folds(config, out / "episodes.json")
    trains = config.method == "finetune"
    head = f", {TRAINED[config.trained]}" if trains and config.trained != "all" else ""
    protocol = f"{config.ways}-way {config.shots}-shot, {METHODS[config.method]}{head}"
    if encoder is None and not trains:
        torch.manual_seed(config.seed)
        encoder = PointEncoder(**vars(config.encoder) | size_overrides(config))
        train = folds[0].train
        calibrate_batchnorm(encoder, train.batch(np.arange(len(train))))
    if started:
        runs.check_same_data(clouds, out)
    else:
        record = {"pretraining": pretraining_of(config.init)}
        networks = {"start": encoder} if encoder else {}
        runs.create(out, {"task": "fewshot"} | to_dict(config), clouds, record, networks)
        if episodes and runs.is_main():
            fewshot.save_episodes(out / "episodes.json", episodes, clouds.fingerprint)
    runs.wait_for_everyone()

    if trains:
        scores, cost = _finetuned(config, out, protocol, folds, encoder)
    else:
        assert encoder is not None
        start = clock()
        pairs = [(fold.train, fold.test) for fold in folds]
        scores = [fewshot.accuracy(encoder, *pair, config.method) for pair in pairs]
        cost = spent_since(start)
    found = moments(scores)
    metrics = {"overall_accuracy": found["mean"]}
    if len(folds) > 1:
        metrics["std_over_folds"] = found["std"]
    if runs.is_main():
        variant = None if episodes else "ModelNet40 few-shot"
        sizes = {name: getattr(config, name) for name in ("ways", "shots", "queries")}
        result = {
            "protocol": protocol,
            "data": folds[0].record(folds[0].train, None, 1.0) | {"variant": variant},
            "selection": "last epoch" if trains else "none",
            "metrics": metrics,
            "validation": None,
            "details": {"folds": scores},
            "settings": arm_settings(config) | sizes,
        }
        runs.finish(out, cost, metrics, result)
    runs.wait_for_everyone()
    return out


def _finetuned(
    config: FewshotConfig,
    out: Path,
    protocol: str,
    folds: list[Labelled],
    encoder: PointEncoder | None,
) -> tuple[list[float], dict[str, float]]:
    """Fine-tune on every fold. Each fold has its own run, with its own seed. Returns the accuracies
    of all folds, and the sum of their costs.
    """
    scores, costs = [], []
    for i, data in enumerate(folds):
        fold, folder = replace(config, seed=config.seed + i), out / f"fold-{i}"
        resume = (folder / "config.json").is_file()
        finetune(fold, folder, resume, data=data, encoder=encoder, protocol=protocol)
        done = read_checked(folder / "results.json")
        scores.append(done["metrics"]["overall_accuracy"])
        costs.append(done["cost"])
        log.info(f"fold {i}: {scores[-1]:.1f} %")
        # Nothing reads the folds' networks. With the paper's encoder, the networks of ten folds
        # would fill 1 GB, or 2 GB if each fold also has `start`.
        for network in ("start", "model"):
            shutil.rmtree(folder / network, ignore_errors=True)
    names = ("wall_seconds", "cpu_seconds")
    return scores, {name: sum(cost[name] for cost in costs) for name in names}


def _folds(
    config: FewshotConfig, saved: Path
) -> tuple[PointClouds, list[Labelled], list[fewshot.Episode] | None]:
    """Return the data, the folds and the episodes.

    If `config.data` has published folds, these are returned, and the episodes are None. If not,
    the episodes are read from the file `saved` if it exists, else sampled with the seed.
    """
    num_points = config.num_points or config.encoder.num_points
    sizes, queries = (config.ways, config.shots, config.folds), config.queries
    source, episodes = Path(config.data), None
    folds = fewshot.published_folds(source, num_points, config.up_axis, *sizes, queries)
    if folds:
        digest = "".join(train.fingerprint for train, _ in folds)
        clouds = replace(folds[0][0], name=source.name, fingerprint=digest)
    else:
        clouds = load([config.data], num_points, "all", [config.up_axis], config.labels_key)
        if saved.is_file():
            episodes = fewshot.load_episodes(saved, clouds.fingerprint)
        else:
            episodes = fewshot.draw_episodes(clouds, *sizes, config.seed, queries)
        folds = [fewshot.fold_of(clouds, episode) for episode in episodes]
    data = []
    for train, test in folds:
        names = train.class_names or tuple(map(str, range(config.ways)))
        data.append(Labelled(clouds.name, None, clouds.fingerprint, train, test, None, names))
    return clouds, data, episodes
