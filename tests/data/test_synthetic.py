"""The built-in shapes: each is reproducible, classes are balanced, clouds lie in the unit sphere,
and part labels belong to the class.
"""

import numpy as np
import pytest

from jepa3d.data.synthetic import CLASS_NAMES, PART_NAMES, make_shape, make_shapes


@pytest.fixture(scope="module")
def made():
    return make_shapes(2 * len(CLASS_NAMES), 128, seed=5)


def test_arrays_have_the_documented_shapes_and_types(made):
    n = 2 * len(CLASS_NAMES)
    kinds = {name: (array.shape, array.dtype) for name, array in made.items()}
    assert kinds == {
        "points": ((n, 128, 3), np.float32),
        "labels": ((n,), np.int64),
        "parts": ((n, 128), np.int16),
    }


def test_the_same_seed_makes_the_same_shapes(made):
    again = make_shapes(len(made["points"]), 128, seed=5)
    assert all(np.array_equal(made[name], again[name]) for name in made)


def test_another_seed_makes_other_shapes(made):
    other = make_shapes(4, 128, seed=6)["points"]
    assert not any(np.array_equal(a, b) for a, b in zip(made["points"], other, strict=False))


def test_a_longer_set_begins_with_a_shorter_one(made):
    short = make_shapes(7, 128, seed=5)
    assert all(np.array_equal(made[name][:7], short[name]) for name in short)


def test_no_two_shapes_are_equal(made):
    assert len(np.unique(made["points"].reshape(len(made["points"]), -1), axis=0)) == len(
        made["points"]
    )


def test_classes_are_balanced(made):
    assert np.bincount(made["labels"]).tolist() == [2] * len(CLASS_NAMES)


def test_shapes_are_finite_and_in_the_unit_sphere(made):
    assert np.isfinite(made["points"]).all()
    assert np.allclose(made["points"].mean(1), 0, atol=1e-5)
    assert np.allclose(np.linalg.norm(made["points"], axis=2).max(1), 1, atol=1e-5)


def test_parts_belong_to_the_shapes_class(made):
    for label, parts in zip(made["labels"], made["parts"], strict=True):
        assert {PART_NAMES[part].split("/")[0] for part in np.unique(parts)} == {CLASS_NAMES[label]}


def test_part_names_are_unique_and_every_class_has_two():
    assert len(set(PART_NAMES)) == len(PART_NAMES)
    assert all(sum(part.startswith(f"{name}/") for part in PART_NAMES) >= 2 for name in CLASS_NAMES)


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_any_class_can_be_made_of_any_number_of_points(label):
    points, parts = make_shape(label, 50, np.random.default_rng(label))
    assert points.shape == (50, 3)
    assert parts.shape == (50,)


def test_shapes_stand_upright():
    table = CLASS_NAMES.index("table")
    for seed in range(8):
        points, parts = make_shape(table, 400, np.random.default_rng(seed))
        top = parts == PART_NAMES.index("table/top")
        assert points[top, 2].mean() > points[~top, 2].mean()


def test_shapes_face_every_way():
    bench, angles = CLASS_NAMES.index("bench"), []
    for seed in range(12):
        points = make_shape(bench, 200, np.random.default_rng(seed))[0][:, :2]
        longest = np.linalg.eigh(np.cov(points.T))[1][:, 1]
        angles.append(np.arctan2(longest[1], longest[0]) % np.pi)
    assert np.ptp(angles) > 1
