"""The interval of a paired difference: examples computed by hand, and how often it contains the
true difference.
"""

import numpy as np
import pytest

from jepa3d.evaluation.descriptors import cosine
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.paired import (
    METRICS,
    Difference,
    Row,
    Vectors,
    difference,
    names_of,
    outcomes,
    rows_of,
    sheets_of,
)
from jepa3d.evaluation.probe import QUICK_C, run_protocol


def test_the_interval_is_that_worked_out_by_hand():
    """Both variance terms are 0.25. This gives 4 / (1 / 1 + 1 / 1) = 2 degrees of freedom, and
    their 97.5 % quantile is 4.3027.
    """
    ours, theirs = np.array([[10.0, 13.0], [12.0, 15.0]]), np.array([[7.0, 9.0], [8.0, 10.0]])
    assert (ours - theirs).tolist() == [[3, 4], [4, 5]]
    found = difference(ours, theirs)
    assert found.mean == 4
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx(
        [4.302653 * 0.5**0.5] * 2
    )


def test_the_interval_of_one_seed_is_student_s_over_shapes():
    """The gains 0 to 4 have a variance of the mean of 2.5 / 5, with 4 degrees of freedom; the
    quantile is 2.7764.
    """
    found = difference(np.arange(5.0)[None], np.zeros((1, 5)))
    assert found == pytest.approx((2, 2 - 2.776445 * 0.5**0.5, 2 + 2.776445 * 0.5**0.5), abs=1e-5)


def test_equal_rows_differ_by_nothing():
    found = difference(np.eye(3), np.eye(3))
    assert found == (0, 0, 0)
    assert found.verdict == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 3, "better"),
        (-3, -0.1, "worse"),
        (-0.1, 3, "undecided"),
        (0, 3, "undecided"),
        (-3, 0, "undecided"),
    ],
)
def test_the_verdict_needs_the_whole_interval_on_one_side(low, high, verdict):
    assert Difference((low + high) / 2, low, high).verdict == verdict


NOISES = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 3, 3), (0.1, 3, 10)]


@pytest.mark.parametrize(("of_seed", "of_shape", "of_both"), NOISES)
def test_the_interval_holds_the_truth_at_least_as_often_as_it_says(of_seed, of_shape, of_both):
    """With three seeds, 60 shapes and 600 comparisons, the share must be at least 95 % minus three
    standard errors.
    """
    rng, held, truth = np.random.default_rng(0), 0, 1.5
    for _ in range(600):
        gain = truth + of_seed * rng.normal(size=(3, 1)) + of_shape * rng.normal(size=60)
        _, low, high = difference(gain + of_both * rng.normal(size=(3, 60)), np.zeros((3, 60)))
        held += low <= truth <= high
    assert held / 600 > 0.95 - 3 * (0.95 * 0.05 / 600) ** 0.5


def test_shapes_alone_would_promise_too_much():
    """If seeds differ, an interval over shapes alone (of the mean over seeds) contains the truth
    too rarely.
    """
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        gain = 0.5 * rng.normal(size=(3, 1)) + rng.normal(size=60)
        _, low, high = difference(gain.mean(0, keepdims=True), np.zeros((1, 60)))
        held += low <= 0 <= high
    assert held / 300 < 0.8


def test_a_shape_without_a_figure_is_left_out_of_every_row():
    found = {
        "a": {"map": np.array([[50.0, np.nan, 70.0]])},
        "b": {"map": np.array([[40.0, np.nan, 50.0]])},
    }
    found = {
        name: values | {m: np.zeros((1, 3)) for m in ("logistic_10", "knn", "nearest")}
        for name, values in found.items()
    }
    rows = {row.name: row for row in rows_of("set", found, "b") if row.metric == "map"}
    assert rows["a"].values == [60]
    assert rows["b"].values == [45]
    assert rows["a"].difference.mean == 15
    assert rows["b"].difference is None
    found["a"]["map"][:] = np.nan
    assert {row.metric for row in rows_of("set", found, "b")} == {"logistic_10", "knn", "nearest"}


def test_the_table_of_a_set_has_a_column_for_every_metric():
    rows = []
    for metric in METRICS:
        rows += [
            Row("set", metric, "base", [80.0, 82.0], None),
            Row("set", metric, "new", [85.0, 85.0], Difference(4, 1, 7)),
            Row("set", metric, "histograms", [70.0, 70.0], Difference(-11, -23, 1)),
        ]
    (sheet,) = sheets_of(
        rows,
        {"base": 8.04, "new": 7.96},
        {"broken": "seed 0: the loss is nan"},
        {"set": "40 shapes"},
    )
    assert sheet.title == "set: 40 shapes"
    assert sheet.columns == ["", *METRICS.values(), "CPU-min"]
    assert sheet.rows == [
        ["base", *["81.0 ± 1.4"] * 5, "8.0"],
        ["new", *["+4.0 (1.0 to 7.0), better"] * 5, "8.0"],
        ["histograms", *["-11.0 (-23.0 to 1.0), undecided"] * 5, "-"],
        ["broken", *["failed"] * 5, "-"],
    ]


def test_outcomes_are_those_of_the_quick_probe_shape_by_shape():
    rng = np.random.default_rng(0)
    y, y_test = np.arange(90) % 3, np.arange(45) % 3
    x, x_test = (rng.normal(size=(len(labels), 6)) + np.eye(3, 6)[labels] for labels in (y, y_test))
    found = outcomes(Vectors(x, x_test, cosine), y, y_test, seed=4)
    assert all(values.shape == (45,) for values in found.values())
    for protocol in ("logistic_10", "knn"):
        expected = run_protocol(protocol, x[None], y, x_test[None], y_test, [0], 4, c=QUICK_C)[
            "accuracy"
        ]
        assert found[protocol].mean() == pytest.approx(expected)
        assert expected > 40
    assert set(found["knn"]) == {0, 100}
    assert set(np.round(found["logistic_10"] % 10, 6)) <= {
        0,
        10,
    }  # in steps of 10, since there are ten samples of labels
    other = outcomes(Vectors(x, x_test, cosine), y, y_test, seed=5)
    assert (other["logistic_10"] != found["logistic_10"]).any()
    assert (other["map"] == found["map"]).all()


def test_sets_of_the_same_name_are_told_apart():
    sets = LabelledSet.each(["a/x.npz", "b/x.npz", "y"], ["labels"], ["z", "y", "z"])
    assert list(names_of(sets).values()) == ["x", "b/x.npz", "y"]
    assert list(names_of([LabelledSet("x.npz"), LabelledSet("x.npz", "fine")]).values()) == [
        "x",
        "x (fine)",
    ]
    assert list(names_of([LabelledSet("a/x"), LabelledSet("x")]).values()) == ["x", "x, up axis z"]
    with pytest.raises(
        ValueError, match="--up-axis has 2 values for 3 scored sets: give one, or one per set"
    ):
        LabelledSet.each(["a", "b", "c"], ["labels"], ["z", "y"])
