"""Few-shot runs: folds are drawn once, each is a separate run, and the result is their mean."""

import json

import numpy as np
import pytest

from jepa3d.config import FewshotConfig
from jepa3d.plain import from_dict, merge
from jepa3d.training import fewshot as running
from jepa3d.training.fewshot import run_fewshot
from jepa3d.training.loop import Interrupted

QUICK = {
    "batch_size": 8,
    "max_steps": 6,
    "lr": 3e-3,
    "ways": 2,
    "shots": 4,
    "folds": 3,
    "queries": 5,
    "encoder": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_groups": 16,
        "group_size": 8,
        "num_points": 64,
        "tokenizer_dim": 8,
        "drop_path": 0.0,
    },
}


@pytest.fixture
def config(shapes):
    return lambda **overrides: from_dict(FewshotConfig, merge(QUICK, {"data": shapes}, overrides))


def result(run) -> dict:
    return json.loads((run / "results.json").read_text())


def test_the_result_is_the_mean_over_its_folds(config, tmp_path):
    found = result(run_fewshot(config(), tmp_path / "run"))
    folds = [
        result(tmp_path / "run" / f"fold-{i}")["metrics"]["overall_accuracy"] for i in range(3)
    ]
    assert found["details"]["folds"] == folds
    assert found["metrics"]["overall_accuracy"] == pytest.approx(np.mean(folds))
    assert found["metrics"]["std_over_folds"] == pytest.approx(np.std(folds, ddof=1))
    assert (found["protocol"], found["selection"]) == ("2-way 4-shot, fine-tuned", "last epoch")
    assert (found["data"]["train"], found["data"]["test"]) == (8, 10)


def test_an_interrupted_run_goes_on_where_it_was(config, tmp_path, monkeypatch):
    whole = result(run_fewshot(config(), tmp_path / "whole"))
    finetune, stops = running.finetune, iter([None, 3])

    def stopping(*arguments, **options):
        return finetune(*arguments, stop_at=next(stops), **options)

    monkeypatch.setattr(running, "finetune", stopping)
    with pytest.raises(Interrupted):
        run_fewshot(config(), tmp_path / "cut")
    monkeypatch.setattr(running, "finetune", finetune)
    first = (tmp_path / "cut" / "fold-0" / "results.json").stat().st_mtime_ns
    cut = result(run_fewshot(config(), tmp_path / "cut", resume=True))
    assert cut["details"] == whole["details"]
    assert (tmp_path / "cut" / "fold-0" / "results.json").stat().st_mtime_ns == first


@pytest.mark.parametrize("method", ["ncm", "logistic"])
def test_frozen_methods_need_no_training_and_say_what_they_are(config, tmp_path, method):
    run = run_fewshot(config(method=method), tmp_path / "run")
    found = result(run)
    assert found["init"] == "untrained"
    assert found["selection"] == "none"
    assert found["metrics"]["overall_accuracy"] > 60
    assert not list(run.glob("fold-*"))
    assert (run / "start" / "model.safetensors").is_file()


def test_an_untrained_frozen_encoder_has_the_given_points_and_patches(config, tmp_path):
    changes = {"method": "ncm", "num_points": 32, "num_groups": 4}
    run = run_fewshot(config(**changes), tmp_path / "run")
    kept = json.loads((run / "start" / "config.json").read_text())
    assert (kept["num_points"], kept["num_groups"]) == (32, 4)


def test_both_arms_see_the_same_episodes(config, tmp_path):
    one, two = (
        run_fewshot(config(method=m), tmp_path / m) / "episodes.json" for m in ("ncm", "logistic")
    )
    assert one.read_text() == two.read_text()


def test_too_few_classes_is_said_before_anything_is_written(config, tmp_path):
    with pytest.raises(
        ValueError, match="4 classes need 4 train and 5 test shapes each, but only 3 have enough"
    ):
        run_fewshot(config(ways=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_way_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="ways 1 must be at least 2"):
        run_fewshot(config(ways=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
