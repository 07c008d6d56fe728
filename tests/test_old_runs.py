"""Runs of version 0.1.0 can be read, and unfinished ones continue (tests/old/README.md)."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import jepa3d
from jepa3d.cli import main
from jepa3d.data.store import Store
from jepa3d.models.ready import fingerprint, load_network
from jepa3d.run import Run

OLD = Path(__file__).parent / "old" / "runs.tar.xz"
RUNS = {
    "pretrain": "pretrain",
    "pretrain-unfinished": "pretrain",
    "generative-unfinished": "pretrain",
    "dvae-unfinished": "pretrain",
    "classify": "classify",
    "classify-unfinished": "classify",
    "fewshot": "fewshot",
    "fewshot-unfinished": "fewshot",
}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """Unpack the old runs and make their folder the current one, as when they were made."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_goes_on_or_is_finished_already(old, capsys, name):
    was = json.loads((old / name / "run.json").read_text())["status"]
    assert call(RUNS[name], "--out", name, "--resume") == 0, capsys.readouterr().err
    assert (f"{name}: finished already" in capsys.readouterr().out) == (was == "finished")
    assert json.loads((old / name / "run.json").read_text())["status"] == "finished"


def test_the_steps_of_an_old_rival_are_its_own(old):
    assert Run(old / "generative-unfinished").config["max_steps"] == 6
    assert call("pretrain", "--out", "generative-unfinished", "--resume") == 0
    lines = (old / "generative-unfinished" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6


@pytest.mark.parametrize("name", RUNS)
def test_info_tells_of_every_old_run(old, capsys, name):
    assert call("info", name) == 0
    said = capsys.readouterr().out
    assert "data: store, " in said
    assert ("running" if name.endswith("unfinished") else "finished") in said


def test_an_old_store_and_old_networks_are_read(old, capsys):
    store = Store(old / "store")
    store.verify()
    assert len(store) == 32
    assert call("info", "store", "--verify") == 0


def test_old_networks_keep_their_biases_and_give_the_same_vectors(old):
    """The expected numbers and fingerprint are from version 0.1.0. Its files do not say that
    queries, keys and values have biases.
    """
    cloud, encoder = np.random.default_rng(0).normal(size=(40, 3)), jepa3d.load("pretrain")
    vector = jepa3d.embed(cloud, encoder)
    assert vector.shape == (1, 16)
    assert vector[0, :4] == pytest.approx([0.47088712, 0.2050521, -0.25379604, 2.0934849], rel=1e-4)
    assert fingerprint(encoder) == "fef3df7c38cd0b8e"
    assert encoder.blocks[0].attention.query.bias is not None
    network = load_network(old / "classify")
    assert network.class_names == ["ball", "disc"]
    assert network.predict(cloud).tolist()[0] == pytest.approx([-7.9576e-05, 0.01040523], rel=1e-2)


def test_what_begins_from_an_old_network_has_its_biases(old, capsys):
    classify = (
        "classify",
        "--data",
        "store",
        "--init",
        "pretrain",
        "--max-steps",
        2,
        "--batch-size",
        4,
    )
    assert call(*classify, "--out", "classes") == 0, capsys.readouterr().err
    assert Run(old / "classes").config["encoder"]["qkv_bias"] is True
    assert load_network(old / "classes").encoder.blocks[0].attention.query.bias is not None
    recipe = {
        "encoder": Run(old / "pretrain").config["encoder"],
        "teacher": "ema",
        "sampler": {"name": "random"},
    }
    del recipe["encoder"]["qkv_bias"]
    (old / "recipe.yaml").write_text(
        json.dumps(recipe | {"data": "store", "batch_size": 4, "max_steps": 2})
    )
    pretrain = (
        "pretrain",
        "--recipe",
        "recipe.yaml",
        "--init",
        "pretrain/encoder",
        "--out",
        "warm",
    )
    assert call(*pretrain) == 2
    assert (
        "pretrain/encoder is not an encoder of this run's sizes: compare the settings encoder.*"
        in capsys.readouterr().err
    )
    assert call(*pretrain, "--encoder.qkv-bias") == 0, capsys.readouterr().err


def test_info_tells_of_networks_that_stand_alone(old, capsys):
    for path, said in (("classify/model", "Classifier"), ("pretrain/encoder", "PointEncoder")):
        assert call("info", path) == 0
        assert f"{path}: {said}, " in capsys.readouterr().out
