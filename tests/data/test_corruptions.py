"""Each kind of damage changes a cloud as documented, and in no other way."""

import math

import numpy as np
import pytest

from jepa3d.data.corruptions import KINDS, corrupt

RNG = np.random.default_rng(0)


def ball(count: int = 1024) -> np.ndarray:
    """Sample different points in the unit sphere; the farthest lies at distance 1."""
    points = RNG.normal(size=(count, 3))
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


CLOUD = ball()
EVERY = [
    (kind, severity) for kind, (_, levels, _) in KINDS.items() for severity in range(len(levels))
]
ROWS = {row.tobytes() for row in CLOUD}


def own(points: np.ndarray) -> np.ndarray:
    """Return which of the points belong to the undamaged cloud."""
    return np.array([row.tobytes() in ROWS for row in points])


def length(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points, axis=1)


@pytest.mark.parametrize(("kind", "severity"), EVERY)
def test_every_kind_gives_finite_float32_the_same_again_and_leaves_its_input_alone(kind, severity):
    before = CLOUD.copy()
    found = corrupt(CLOUD, kind, severity, 7)
    assert found.dtype == np.float32
    assert found.ndim == 2
    assert found.shape[1] == 3
    assert np.isfinite(found).all()
    assert np.array_equal(CLOUD, before)
    assert np.array_equal(found, corrupt(CLOUD, kind, severity, 7))
    other = corrupt(CLOUD, kind, severity, 8)
    assert found.shape != other.shape or not np.array_equal(found, other)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("drop global", [768, 640, 512, 384, 256]),
        ("drop local", [924, 824, 724, 624, 524]),
        ("256 points", [256]),
        ("half cut away", [512]),
        ("partial (40 % cut)", [614]),
    ],
)
def test_what_takes_points_away_keeps_the_others_as_they_were(kind, kept):
    for severity, count in enumerate(kept):
        found = corrupt(CLOUD, kind, severity, 0)
        assert len(found) == count
        assert own(found).all()
        assert len(np.unique(found, axis=0)) == count


@pytest.mark.parametrize(
    ("kind", "added", "reach"),
    [
        ("add global", [10, 20, 30, 40, 50], 1),
        ("add local", [100, 200, 300, 400, 500], 1),
        ("5 % strays", [51], 1.5),
        ("one far stray", [1], 3),
    ],
)
def test_what_adds_points_keeps_all_the_cloud_has_and_stays_within_its_reach(kind, added, reach):
    for severity, count in enumerate(added):
        found = corrupt(CLOUD, kind, severity, 0)
        assert np.array_equal(found[:1024], CLOUD)
        assert len(found) == 1024 + count
        farthest = length(found[1024:]).max()
        assert farthest <= reach + 1e-6
        assert farthest > (0.8 if reach == 1 else 2.9 if reach == 3 else 1)


def test_a_cloud_of_twice_the_points_suffers_twice_as_many():
    assert len(corrupt(ball(2048), "drop local", 0, 0)) == 2048 - 200
    assert len(corrupt(ball(2048), "add global", 4, 0)) == 2048 + 100


def test_noise_has_the_deviation_of_its_level():
    for severity, sigma in enumerate((0.01, 0.02, 0.03, 0.04, 0.05)):
        moved = corrupt(CLOUD, "jitter", severity, 0) - CLOUD
        assert moved.std() == pytest.approx(sigma, rel=0.05)
        assert abs(moved.mean()) < 0.1 * sigma


def test_scaling_has_one_factor_an_axis_within_its_level():
    factors = np.stack([corrupt(CLOUD, "scale", 4, i)[0] / CLOUD[0] for i in range(50)])
    assert np.allclose(corrupt(CLOUD, "scale", 4, 0), CLOUD * factors[0], atol=1e-6)
    assert 0.5 <= factors.min() < 0.7
    assert 1.7 < factors.max() <= 2
    assert np.ptp(factors, 1).min() > 0


@pytest.mark.parametrize("kind", ["rotate", "turned about up", "turned any way"])
def test_turns_keep_every_distance_and_handedness(kind):
    for shape in range(5):
        found = corrupt(CLOUD, kind, 0, shape)
        assert np.allclose(length(found), length(CLOUD), atol=1e-6)
        turn = np.linalg.lstsq(CLOUD.astype(np.float64), found.astype(np.float64), rcond=None)[0]
        assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-5)
        assert np.linalg.det(turn) == pytest.approx(1, abs=1e-5)
        angle = math.degrees(math.acos(min(1, (np.trace(turn) - 1) / 2)))
        assert kind != "rotate" or angle <= 3**0.5 * 6 + 0.5
        if kind == "turned about up":
            assert np.array_equal(found[:, 2], CLOUD[:, 2])


def test_turns_any_way_are_even_over_the_sphere():
    """The rotated up axis is uniform on the sphere: each of its coordinates has mean 0 and mean
    square 1/3.
    """
    up = np.stack(
        [corrupt(np.eye(3, dtype=np.float32), "turned any way", 0, shape) for shape in range(2000)]
    )
    assert np.abs(up.mean(0)).max() < 0.06
    assert np.abs((up**2).mean(0) - 1 / 3).max() < 0.04


def test_a_plane_parts_what_it_takes_from_what_it_leaves():
    kept = own_of(corrupt(CLOUD, "half cut away", 0, 3))
    away = CLOUD[~kept].mean(0) - CLOUD[kept].mean(0)  # for a ball, about the normal of the plane
    place = CLOUD @ (away / np.linalg.norm(away))
    assert (place[kept] < np.median(place)).mean() > 0.95


def test_a_hole_is_a_neighbourhood():
    """The points that one hole removes are closer together than as many random points."""
    taken = CLOUD[~own_of(corrupt(CLOUD, "drop local", 0, 0))]
    distance = np.linalg.norm(taken[:, None] - taken[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    random = RNG.permutation(CLOUD)[:100]
    apart = np.linalg.norm(random[:, None] - random[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    assert distance.min(1).mean() < 0.7 * apart.min(1).mean()


def own_of(found: np.ndarray) -> np.ndarray:
    """Return which points of the cloud remain."""
    rows = {row.tobytes() for row in found}
    return np.array([row.tobytes() in rows for row in CLOUD])


def test_what_the_encoder_was_never_trained_with_is_marked():
    marked = {name for name, kind in KINDS.items() if not kind.trained}
    assert marked == {"rotate", "drop local", "turned any way", "partial (40 % cut)"}
