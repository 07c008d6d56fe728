"""Learning curves: each snapshot is scored once, at its cost; seeds of a configuration share a
line.
"""

import json

import numpy as np
import pytest

from jepa3d.cli import main
from jepa3d.evaluation import curve as curves
from jepa3d.evaluation.curve import Curve, learning_curves
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.training.pretrain import pretrain


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny):
    def run(name, **overrides):
        return pretrain(
            tiny(max_steps=4, snapshot_every=2, **overrides), tmp_path_factory.mktemp("runs") / name
        )

    return [
        run("ema-0"),
        run("ema-1", seed=1),
        run("warm-0", init="generative", generative={"max_steps": 2}),
    ]


@pytest.fixture
def scored(monkeypatch):
    """Replace the classifiers by made-up scores. Returns a list with one call per scored model."""
    calls = []

    def protocol(name, x, *rest):
        calls.append(float(np.abs(x).sum()))
        return {"accuracy": float(len(calls))}

    monkeypatch.setattr(curves, "run_protocol", protocol)
    return calls


def test_a_curve_has_the_untrained_encoder_each_snapshot_and_the_end_at_their_cost(
    runs, bundle, scored
):
    ema, warm = learning_curves(runs, LabelledSet(bundle), protocol="knn")
    assert (ema.name, ema.seeds, ema.steps) == ("ema", [0, 1], [0, 2, 4])
    assert (warm.name, warm.seeds, warm.steps) == ("warm", [0], [0, 2, 4])
    assert ema.accuracy.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (ema.minutes[:, 0] == 0).all()
    record = json.loads((runs[2] / "run.json").read_text())["cost"]
    total = (record["cpu_seconds"] + record["stage1_cpu_seconds"]) / 60
    assert record["stage1_cpu_seconds"] > 0
    assert warm.minutes[0, -1] == pytest.approx(total)
    assert warm.minutes[0, 1] > record["stage1_cpu_seconds"] / 60
    assert len(set(scored)) == 8  # runs of the same seed share the untrained encoder


def test_scores_are_kept_and_those_of_other_data_are_not_used(runs, bundle, scored, tmp_path):
    first = learning_curves(runs[:1], LabelledSet(bundle), protocol="svc_linear")
    assert len(scored) == 3
    again = learning_curves(runs[:1], LabelledSet(bundle), protocol="svc_linear")
    assert len(scored) == 3
    assert again[0].accuracy.tolist() == first[0].accuracy.tolist()
    with np.load(bundle) as archive:
        arrays = dict(archive)
    other = tmp_path / "shapes.npz"
    np.savez(other, **(arrays | {"points": arrays["points"] * [1, 1, 0.5]}))
    learning_curves(runs[:1], LabelledSet(str(other)), protocol="svc_linear")
    assert len(scored) == 6
    learning_curves(runs[:1], LabelledSet(str(other), up_axis="y"), protocol="svc_linear")
    assert len(scored) == 9


def test_the_part_that_is_scored_has_scores_and_a_file_of_its_own(
    runs, bundle, scored, monkeypatch
):
    sizes = []
    monkeypatch.setattr(
        curves,
        "layer_features",
        lambda model, clouds: sizes.append(len(clouds)) or np.zeros((1, 1, 1)),
    )
    for part in ("test", "validation", "validation"):
        learning_curves(runs[:1], LabelledSet(bundle), protocol="logistic", part=part)
    # Three models (untrained encoder, two snapshots), each on train and on the scored split.
    assert sizes == [32, 16] * 3 + [25, 7] * 3
    assert (runs[0] / "curve-shapes-validation-logistic.json").exists()


def test_the_time_to_an_accuracy_is_the_first_from_which_it_stays_reached():
    arm = Curve(
        "a",
        [0, 1],
        [0, 1, 2, 3],
        np.array([[0, 1, 2, 3], [0, 3, 4, 5.0]]),
        np.array([[1, 5, 3, 6], [1, 7, 3, 6]]),
    )
    assert arm.minutes_to(6) == 4  # the mean is 6 at step 1 too, but falls below it later
    assert arm.minutes_to(3) == 2
    assert arm.minutes_to(1) == 0
    assert arm.minutes_to(7) is None


def test_the_command_prints_when_each_reaches_the_other_and_draws(
    runs, bundle, scored, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        main(
            [
                "curve",
                *map(str, runs),
                "--data",
                bundle,
                "--protocol",
                "linear_svc",
                "--out",
                str(tmp_path / "c.png"),
            ]
        )
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "reaches final accuracy of warm after" in printed
    assert "none is selected" in printed


@pytest.mark.parametrize("wrong", ["folder", "protocol"])
def test_what_is_no_run_is_refused(runs, bundle, tmp_path, wrong):
    with pytest.raises(
        ValueError, match="not a finished run" if wrong == "folder" else "one of logistic"
    ):
        learning_curves(
            [tmp_path] if wrong == "folder" else runs,
            LabelledSet(bundle),
            protocol="knn" if wrong == "folder" else "svm",
        )
