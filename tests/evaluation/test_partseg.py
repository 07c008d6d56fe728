"""Scores of part segmentation agree with an example computed by hand and with a slow loop, and
shapes get only parts of their category.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.data.benchmarks import SHAPENETPART
from jepa3d.data.datasets import load
from jepa3d.evaluation.partseg import category_parts, mean_iou, restricted_argmax

NAMES = ("axe", "cup", "hat")
PARTS_OF = [np.array([0, 1]), np.array([2, 3, 4]), np.array([5])]


def slow_mean_iou(predicted, truth, labels, parts_of, names) -> dict:
    """Compute the scores shape by shape and part by part, with sets."""
    by_category, right = {}, 0
    for shape, label in enumerate(labels):
        ious = []
        for part in parts_of[label]:
            p = {i for i, value in enumerate(predicted[shape]) if value == part}
            t = {i for i, value in enumerate(truth[shape]) if value == part}
            ious.append(len(p & t) / len(p | t) if p | t else 1.0)
        by_category.setdefault(names[label], []).append(sum(ious) / len(ious))
        right += sum(a == b for a, b in zip(predicted[shape], truth[shape], strict=True))
    means = {name: 100 * sum(values) / len(values) for name, values in by_category.items()}
    shapes = [value for values in by_category.values() for value in values]
    return {
        "instance_miou": 100 * sum(shapes) / len(shapes),
        "category_miou": sum(means.values()) / len(means),
        "point_accuracy": 100 * right / np.size(truth),
        "per_category": means,
    }


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert found["per_category"] == pytest.approx(expected["per_category"])
    for name in expected.keys() - {"per_category"}:
        assert found[name] == pytest.approx(expected[name]), name


def test_a_worked_example():
    # axe 1: part 0: {0} of {0, 1}: 1/2; part 1: {2, 3} of {1, 2, 3}: 2/3       -> (1/2 + 2/3) / 2       = 7/12
    # axe 2: part 0: all four correct: 1; part 1: in neither: 1                   -> 1
    # cup:   part 2: {0, 1} of {0, 1}: 1; part 3: none of {2, 3}: 0;
    #        part 4: none of {2, 3}, for it is predicted and absent: 0            -> (1 + 0 + 0) / 3       = 1/3
    # instance: (7/12 + 1 + 1/3) / 3 = 23/36. category: axe (7/12 + 1) / 2 = 19/24, cup 1/3, hat has no shape:
    # (19/24 + 8/24) / 2 = 27/48. points: 3 + 4 + 2 of 12.
    truth = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [2, 2, 3, 3]], np.int16)
    predicted = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [2, 2, 4, 4]], np.int16)
    found = mean_iou(predicted, truth, np.array([0, 0, 1]), PARTS_OF, NAMES)
    assert_equal(
        found,
        {
            "instance_miou": 100 * 23 / 36,
            "category_miou": 100 * 27 / 48,
            "point_accuracy": 75,
            "per_category": {"axe": 100 * 19 / 24, "cup": 100 / 3},
        },
    )
    # JSON needs plain floats.
    assert all(
        type(value) is float for value in (*found["per_category"].values(), found["instance_miou"])
    )


@pytest.mark.parametrize(("absent_part_predicted", "miou"), [(0, 100), (1, 50 * 0.75)])
def test_a_part_absent_from_the_truth_counts_1_until_a_point_is_given_to_it(
    absent_part_predicted, miou
):
    truth = np.zeros((1, 4), np.int16)
    # If part 1 is predicted, the IoU is 3/4 for part 0 and 0/1 for part 1.
    predicted = np.array([[absent_part_predicted, 0, 0, 0]], np.int16)
    assert mean_iou(predicted, truth, np.array([0]), PARTS_OF, NAMES)[
        "instance_miou"
    ] == pytest.approx(miou)


def test_a_part_missed_altogether_counts_0():
    truth, predicted = np.array([[0, 0, 0, 1]]), np.zeros((1, 4), int)
    assert mean_iou(predicted, truth, np.array([0]), PARTS_OF, NAMES)[
        "instance_miou"
    ] == pytest.approx(50 * 0.75)


@given(st.integers(1, 9), st.integers(1, 30), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_it_is_the_slow_loop(shapes, points, within, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, shapes)
    truth = np.stack(
        [rng.choice(PARTS_OF[label][: rng.integers(1, 4)], points) for label in labels]
    )
    guess = np.stack([rng.choice(PARTS_OF[label], points) for label in labels])
    # Otherwise also parts of other categories, and of none.
    guess = guess if within else rng.integers(0, 8, truth.shape)
    predicted = np.where(rng.random(truth.shape) < rng.random(), truth, guess).astype(np.int16)
    arguments = predicted, truth.astype(np.int16), labels, PARTS_OF, NAMES
    assert_equal(mean_iou(*arguments), slow_mean_iou(*arguments))


def test_many_shapes_do_not_overflow_the_small_integers_of_parts():
    truth = np.tile(np.array([[2, 3, 4, 4]], np.int16), (20_000, 1))
    found = mean_iou(truth, truth, np.ones(20_000, np.int8), PARTS_OF, NAMES)
    assert (found["instance_miou"], found["point_accuracy"], found["per_category"]) == (
        100,
        100,
        {"cup": 100},
    )


@given(
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 0.0, -np.inf]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_best_part_is_never_another_categorys(shapes, points, seed, factor):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, shapes)
    logits = rng.random((shapes, points, 6)).astype(np.float32)
    for shape, label in enumerate(labels):  # parts of other categories always have larger logits
        logits[shape][:, PARTS_OF[label]] = logits[shape][:, PARTS_OF[label]] * factor - 2
    found = restricted_argmax(logits, labels, PARTS_OF)
    assert found.dtype == np.int16
    for shape, label in enumerate(labels):
        assert set(found[shape].tolist()) <= set(PARTS_OF[label].tolist())
        for point in range(points):
            best = max(PARTS_OF[label].tolist(), key=lambda part: logits[shape, point, part])
            assert found[shape, point] == best


@pytest.mark.parametrize(
    "part_names", [("cup/ear", "axe/head", "cup/body"), ("cup 0", "axe 0", "cup 1")]
)
def test_names_say_whose_a_part_is_also_where_no_shape_has_it(part_names):
    found = category_parts(part_names, np.array([0, 1]), np.array([[1, 1], [2, 2]]), NAMES[:2])
    assert [own.tolist() for own in found] == [[1], [0, 2]]


def test_shapenetparts_names_give_its_50_parts():
    names = tuple(f"{name} {i}" for name, count in SHAPENETPART.items() for i in range(count))
    found = category_parts(names, np.zeros(0, int), np.zeros((0, 8), np.int16), tuple(SHAPENETPART))
    assert [len(own) for own in found] == list(SHAPENETPART.values())
    assert np.concatenate(found).tolist() == list(range(50))


def test_a_category_of_two_words_is_found():
    found = category_parts(
        ("coat rack 0", "rack/coat 0"),
        np.zeros(0, int),
        np.zeros((0, 8), int),
        ("coat rack", "rack"),
    )
    assert [own.tolist() for own in found] == [[0], [1]]


@pytest.mark.parametrize("part_names", [(), ("background", "object", "", "", "", "", "")])
def test_without_names_the_parts_are_those_seen(part_names):
    parts = np.array([[5, 0, 5], [3, 3, 3], [6, 0, 0]], np.int16)
    found = category_parts(part_names, np.array([0, 2, 0]), parts, NAMES)
    assert [own.tolist() for own in found] == [[0, 5, 6], [], [3]]


def test_a_part_of_another_category_is_refused():
    with pytest.raises(ValueError, match=r"\Aa shape of cup has part 1 \(axe/head\).*\Z"):
        category_parts(("cup/ear", "axe/head"), np.array([1]), np.array([[0, 1]]), NAMES)
    with pytest.raises(ValueError, match=r"\Aa shape of cup has part 9 .*\Z"):
        category_parts(("cup/ear", "axe/head"), np.array([1]), np.array([[0, 9]]), NAMES)


def test_on_real_shapes_the_truth_is_right_and_the_commonest_part_is_not(real_data):
    every = load(
        [str(real_data / "labeled_psb/labeled_psb_2048.npz")], 128, "all", ["y"], parts=True
    )
    train, test = every.part("train"), every.part("test")
    parts_of = category_parts(every.part_names, train.labels, train.parts, every.class_names)
    assert len(parts_of) == 19
    assert np.concatenate(parts_of).tolist() == list(range(94))
    seen = category_parts((), train.labels, train.parts, every.class_names)
    assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(seen, parts_of, strict=True))
    perfect = mean_iou(test.parts, test.parts, test.labels, parts_of, every.class_names)
    assert perfect["instance_miou"] == perfect["category_miou"] == perfect["point_accuracy"] == 100
    counts = np.stack(
        [
            np.bincount(train.parts[train.labels == label].ravel(), minlength=94)
            for label in range(19)
        ]
    )
    predicted = restricted_argmax(
        np.repeat(counts[test.labels][:, None], 128, 1), test.labels, parts_of
    )
    arguments = predicted, test.parts, test.labels, parts_of, every.class_names
    assert_equal(mean_iou(*arguments), slow_mean_iou(*arguments))
    assert 10 < mean_iou(*arguments)["instance_miou"] < 50
