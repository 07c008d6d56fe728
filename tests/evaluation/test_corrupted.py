"""Damaged shapes as queries of retrieval and as inputs of fitted classifiers."""

import json

import numpy as np
import pytest

from jepa3d.cli import main
from jepa3d.data import corruptions
from jepa3d.data.corruptions import KINDS
from jepa3d.data.synthetic import make_shapes
from jepa3d.evaluation import corrupted as module
from jepa3d.evaluation.classifiers import predict
from jepa3d.evaluation.corrupted import corrupted
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.probe import QUICK_C, few_labels
from jepa3d.evaluation.retrieval import opened

BASELINES = ["untrained", "histograms", "geometry"]
FIGURES = {"retrieval": ["nearest", "map"], "probe": ["logistic_10", "knn"]}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use few queries and only two samples of labels."""
    monkeypatch.setattr(module, "QUERIES", 20)
    monkeypatch.setattr("jepa3d.evaluation.probe._DRAWS", 2)


@pytest.mark.parametrize("command", FIGURES)
def test_corrupted_shapes_have_a_row_a_kind_and_a_column_a_vector(
    encoder_and_data, command, tmp_path, capsys
):
    model, data = encoder_and_data
    out = tmp_path / "c.json"
    with pytest.raises(SystemExit) as ended:
        main([command, model, "--data", data, "--corruptions", "--out", str(out)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert list(result["corruptions"]) == ["clean", *KINDS]
    assert (result["queries"], result["classes"]) == (20, 4)
    for kind, row in result["corruptions"].items():
        assert kind in shown
        assert list(row["results"]) == [model, *BASELINES]
        for values in row["results"].values():
            assert list(values) == FIGURES[command]
            for figures in values.values():
                assert len(figures) == len(row["levels"])
                assert all(0 <= figure <= 100 for figure in figures)
    assert "drop local *" in shown
    assert "jitter *" not in shown


@pytest.mark.parametrize("command", FIGURES)
def test_corruptions_get_whole_clouds_and_what_is_left_as_it_is_counts_as_clean(
    encoder_and_data, command, monkeypatch
):
    """The damage is applied to the 512 points of the source; the encoder gets 128 points."""
    model, data = encoder_and_data
    sizes = set()

    def unchanged(points: np.ndarray, kind: str, severity: int, shape: int) -> np.ndarray:
        sizes.add(points.shape)
        return points

    monkeypatch.setattr(module, "corrupt", unchanged)
    rows = corrupted(command, [model], LabelledSet(data))["corruptions"]
    assert sizes == {(512, 3)}
    for kind, row in rows.items():
        if len(row["levels"]) == 1:
            assert row["results"] == rows["clean"]["results"], kind


@pytest.mark.parametrize("command", FIGURES)
def test_dirt_is_told_from_clean(encoder_and_data, command, monkeypatch):
    """If the damage replaces all shapes by the same shape, accuracy is at chance level."""
    model, data = encoder_and_data
    same = make_shapes(1, 512, seed=9)["points"][0]
    monkeypatch.setattr(module, "corrupt", lambda points, *_: same)
    row = corrupted(command, [model], LabelledSet(data))["corruptions"]["256 points"]["results"][
        model
    ]
    assert next(iter(row.values()))[0] < 60
    assert corruptions.corrupt(same, "256 points", 0, 0).shape == (256, 3)


def test_clean_shapes_are_told_as_classifiers_fitted_to_train_tell_them(encoder_and_data):
    model, data = encoder_and_data
    found = corrupted("probe", [model], LabelledSet(data))["corruptions"]["clean"]["results"]
    encoder, descriptors, shapes = next(opened([model], LabelledSet(data), "test", whole=True))
    train, test = shapes.train, shapes.test
    asked = np.sort(np.random.default_rng(0).permutation(len(test))[:20])
    for name, (of, _) in descriptors.items():
        x, x_test = of(encoder.prepare(train.points)), of(encoder.prepare(test.points[asked]))
        draws = [
            predict("logistic", QUICK_C, x[s], train.labels[s], x_test)
            for s in few_labels(train.labels, 0)
        ]
        right = np.mean([told == test.labels[asked] for told in draws])
        assert found[name]["logistic_10"] == [pytest.approx(100 * right)]
        told = predict("knn", 0, x, train.labels, x_test)
        assert found[name]["knn"] == [pytest.approx(100 * np.mean(told == test.labels[asked]))]


def test_validation_leaves_the_test_part_alone(encoder_and_data):
    model, data = encoder_and_data
    before = corrupted("probe", [model], LabelledSet(data), part="validation")["corruptions"][
        "clean"
    ]
    arrays = dict(np.load(data))
    arrays["points"][arrays["split"] == 1] *= [1, 0.3, 2]
    np.savez(data, **arrays)
    assert (
        corrupted("probe", [model], LabelledSet(data), part="validation")["corruptions"]["clean"]
        == before
    )
