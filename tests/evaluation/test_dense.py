"""Parts from features of points: they are found if the features contain them, at all points, and no
choice uses the test split.
"""

import json

import numpy as np
import pytest
import torch

from jepa3d.cli import main
from jepa3d.data.datasets import load
from jepa3d.evaluation import dense
from jepa3d.evaluation.dense import local_features, probe_parts, token_features
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import thirds
from jepa3d.ops import knn

BASELINES = ["untrained", "geometry", "positions", "geometry and positions"]


@pytest.fixture
def model(tmp_path) -> str:
    torch.manual_seed(0)
    PointEncoder(24, 3, 2, 16, 8, 128, tokenizer_dim=8).save_pretrained(tmp_path / "one")
    return str(tmp_path / "one")


def test_parts_that_lie_left_and_right_are_told_by_position(model, shapes, tmp_path, capsys):
    out = tmp_path / "parts.json"
    with pytest.raises(SystemExit) as ended:
        main(["probe", model, "--data", shapes, "--parts", "--out", str(out)])
    assert not ended.value.code
    result, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(result["results"]) == [model, *BASELINES]
    assert result["results"]["positions"]["instance_miou"] > 90
    assert result["results"][model]["channels"] == 3 * 24
    for name, row in result["results"].items():
        assert name == model or name.split()[0] in shown  # a table cuts long names
        assert row["instance_miou"] > 50  # predicting one part everywhere would give 25
        assert row["C"] in dense._C_GRID
        if name != model:
            low, high = row["interval"]
            assert low <= row["first_minus_this"] <= high
            assert row["first_minus_this"] == pytest.approx(
                result["results"][model]["instance_miou"] - row["instance_miou"]
            )
    assert result["data"]["test"] == 78
    assert result["points"] == 256


def test_labels_of_the_test_part_choose_nothing(model, shapes, tmp_path, monkeypatch):
    """When the part labels of test shapes change, C and the data of every fit stay the same."""
    seen, fit = [], dense._fit

    def watched(c, x, y):
        seen.append((c, x.tobytes(), y.tobytes()))
        return fit(c, x, y)

    monkeypatch.setattr(dense, "_fit", watched)
    monkeypatch.setattr(dense, "local_features", lambda encoder: {})
    first = probe_parts([model], LabelledSet(shapes))
    fits = list(seen)
    arrays = dict(np.load(shapes))
    test = arrays["split"] == 1
    arrays["seg"][test] = arrays["seg"][test][:, ::-1]
    np.savez(tmp_path / "other.npz", **arrays)
    seen.clear()
    second = probe_parts([model], LabelledSet(str(tmp_path / "other.npz")))
    assert fits == seen
    assert first["results"][model]["instance_miou"] != second["results"][model]["instance_miou"]


def test_tokens_of_a_center_are_found_there(model):
    encoder = PointEncoder.from_pretrained(model)
    seen = encoder.prepare(np.random.default_rng(0).normal(size=(2, 300, 3)))
    states, centers = encoder.states(seen)
    expected = torch.cat([states[layer] for layer in thirds(3)], -1)
    torch.testing.assert_close(
        token_features(encoder, seen, centers), expected, rtol=1e-3, atol=1e-3
    )


def test_local_features_of_a_point_depend_on_no_other_point_asked_about(model):
    encoder = PointEncoder.from_pretrained(model)
    seen = encoder.prepare(np.random.default_rng(0).normal(size=(2, 300, 3)))
    for name, features in local_features(encoder).items():
        found = features(seen, seen)
        assert (
            found.shape[-1]
            == {"geometry": 89, "positions": 34, "geometry and positions": 123}[name]
        )
        torch.testing.assert_close(
            features(seen, seen[:, 5:9]), found[:, 5:9], rtol=1e-4, atol=1e-4
        )


def test_every_point_of_a_cloud_is_told_strays_among_them(model, tmp_path):
    """The encoder does not see a stray point, but the point still gets features of the nearest
    tokens.
    """
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 128, 3))
    points[:, 0] = [9, 0, 0]
    parts = (points[..., 0] > 0).astype(np.int16)
    file = tmp_path / "s.npz"
    labels = np.arange(40) % 2
    np.savez(
        file,
        points=points.astype(np.float32),
        labels=labels,
        split=np.arange(40) // 2 % 2,
        seg=parts,
    )
    encoder, clouds = PointEncoder.from_pretrained(model), load([str(file)], 128, "all", parts=True)
    _, seen, placed = next(dense._batches(encoder, clouds))
    assert placed.shape == (16, 128, 3)
    assert float(placed.norm(dim=-1).amax()) > 2
    assert float(seen.norm(dim=-1).amax()) < 1.001
    assert float(knn(seen, placed, 1).float().std()) > 0
    found = probe_parts([model], LabelledSet(str(file)))["results"]["positions"]
    assert found["instance_miou"] > 90


def test_points_without_a_label_are_left_out_and_shapes_of_them_refused(model, shapes, tmp_path):
    arrays = dict(np.load(shapes))
    arrays["seg"][:, 7:] = -1
    np.savez(tmp_path / "few.npz", **arrays)
    clouds = load([str(tmp_path / "few.npz")], 128, "train", parts=True)
    encoder = PointEncoder.from_pretrained(model)
    x, y = dense._samples(local_features(encoder)["positions"], encoder, clouds)
    assert y.min() >= 0
    assert len(np.unique(x[0], axis=0)) <= 7
    arrays["seg"][3] = -1
    np.savez(tmp_path / "few.npz", **arrays)
    with pytest.raises(ValueError, match=r"few.npz: .*1 shapes have no part label"):
        probe_parts([model], LabelledSet(str(tmp_path / "few.npz")))


def test_a_category_of_one_part_is_that_part_everywhere():
    classifier = dense._fit(0.1, np.zeros((5, 3)), np.full(5, 7))
    assert classifier.predict(np.ones((2, 3))).tolist() == [7, 7]


@pytest.mark.parametrize(
    "flags", [["--quick"], ["--corruptions"], ["--layer", "1"], ["--protocols", "knn"]]
)
def test_choices_of_other_protocols_are_refused(model, shapes, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["probe", model, "--data", shapes, "--parts", *flags])
    assert ended.value.code
    printed = " ".join(capsys.readouterr().err.split())
    assert "only one of these two flags, and without --layer" in printed
