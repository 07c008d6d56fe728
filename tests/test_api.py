"""The public functions have types, print nothing, and continue after a bad file."""

import inspect
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import jepa3d
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, Segmenter
from jepa3d.plain import log

SIZES = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
}


@pytest.fixture(autouse=True)
def without_the_tests_own_printer(monkeypatch):
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])


@pytest.fixture
def folder(tmp_path):
    """Save an encoder, a classifier, a segmenter, four clouds, and two files that are no clouds.
    Returns the folder.
    """
    torch.manual_seed(0)
    PointEncoder(**SIZES).save_pretrained(tmp_path / "encoder")
    Classifier(SIZES, ["cup", "jug"]).save_pretrained(tmp_path / "classes" / "model")
    segmenter = Segmenter(SIZES, ["pot"], ["body", "lid"], [[0, 1]], [1, 2])
    segmenter.save_pretrained(tmp_path / "parts" / "model")
    (tmp_path / "scans").mkdir()
    for i in range(4):
        np.save(tmp_path / "scans" / f"{i}.npy", np.random.default_rng(i).normal(size=(100, 3)))
    (tmp_path / "scans" / "bad.npy").write_bytes(b"no array")
    (tmp_path / "scans" / "README.md").write_text("about these")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["load", "embed", "search", "predict", "export", "pretrain", "finetune", "probe"]
)
def test_arguments_and_results_have_types(name):
    signature = inspect.signature(getattr(jepa3d, name))
    for value in (*signature.parameters.values(),):
        assert value.annotation is not value.empty
    assert signature.return_annotation not in (None, signature.empty)


def test_predictions_of_a_list_with_bad_files(folder, capfd):
    scans = folder / "scans"
    found = jepa3d.predict(folder / "classes", [scans, folder / "none.ply"])
    assert [prediction.error is None for prediction in found] == [True] * 4 + [False] * 3
    assert {prediction.class_name for prediction in found[:4]} <= {"cup", "jug"}
    assert all(p.probability >= p.second_probability > 0 for p in found[:4])
    errors = {prediction.path: prediction.error for prediction in found[4:]}
    assert "damaged" in errors[str(scans / "bad.npy")]
    assert "unknown kind of file" in errors[str(scans / "README.md")]
    assert "no such file" in errors[str(folder / "none.ply")]
    (whole,) = jepa3d.predict(folder / "parts", scans / "0.npy")
    assert set(whole.parts.tolist()) <= {0, 1}
    assert len(whole.parts) == 100
    for up_axis in ("w", "none"):
        with pytest.raises(ValueError, match="is unknown: use x, y, z"):
            jepa3d.predict(folder / "classes", scans, up_axis=up_axis)
    assert capfd.readouterr() == ("", "")


def test_a_path_is_a_query_and_not_its_own_neighbour(folder, capfd):
    pytest.importorskip("pyarrow")
    from jepa3d.inference.embed_files import embed_files

    index, scans = folder / "v.parquet", folder / "scans"
    counts = embed_files([scans], index, str(folder / "encoder"), workers=1)
    assert (counts["new"], counts["left out"]) == (4, 2)
    found = jepa3d.search(index, scans, k=3)
    assert len(found) == 4  # the bad file is left out
    for i, hits in enumerate(found):
        assert len(hits) == 3
        assert str(scans / f"{i}.npy") not in [hit.path for hit in hits]
    vectors = jepa3d.embed(scans / "2.npy", jepa3d.load(folder / "encoder"))
    assert jepa3d.search(index, vectors, k=1)[0][0].path == str(scans / "2.npy")
    assert capfd.readouterr() == ("", "")


def test_training_as_the_page_says(tmp_path, monkeypatch, capfd):
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "scans").mkdir()
    for i in range(4):
        np.save(tmp_path / "scans" / f"{i}.npy", np.random.default_rng(i).normal(size=(600, 3)))
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace('"max_steps": 1000', '"max_steps": 2, "batch_size": 2'), scope)
    assert isinstance(scope["encoder"], PointEncoder)
    assert scope["run"] == Path("runs/mine")
    assert capfd.readouterr() == ("", "")
