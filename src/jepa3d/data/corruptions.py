"""Corruptions of scans: functions of one cloud N 3 in the unit sphere, a level and a generator.

The first seven kinds are those of PointCloud-C (Ren et al. 2022, arXiv 2202.03377) at its five
severities. It gives numbers of points for clouds of 1,024 points; here they are shares, so that the
effect does not depend on the size of a cloud. The other kinds have one level each.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator


class Kind(NamedTuple):
    """One kind of corruption."""

    change: Callable[[np.ndarray, float, Generator], np.ndarray]
    levels: tuple[float, ...]  # mildest first
    # whether `transforms.py::random_view`, which trained the package's encoder, has it too
    trained: bool = True


def corrupt(points: np.ndarray, kind: str, severity: int, shape: int) -> np.ndarray:
    """The corrupted cloud n 3 float32 of a cloud N 3 in the unit sphere.

    severity: from 0. shape: a number that seeds the draws, together with kind and severity.
    """
    rng = np.random.default_rng([zlib.crc32(kind.encode()), severity, shape])
    change, levels, _ = KINDS[kind]
    return change(points.astype(np.float64), levels[severity], rng).astype(np.float32)


def jitter(points: np.ndarray, sigma: float, rng: Generator) -> np.ndarray:
    """Add normal noise of standard deviation sigma to every coordinate."""
    return points + sigma * rng.standard_normal(points.shape)


def scale(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Scale each axis by its own factor in [1 / most, most]."""
    return points * rng.uniform(1 / most, most, 3)


def tilt(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Turn about x, then y, then z, by up to `most` radians each."""
    for axis, angle in enumerate(rng.uniform(-most, most, 3)):
        points = _turned(points, axis, angle)
    return points


def drop_global(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a random share of the points."""
    return _some(points, int(len(points) * (1 - share)), rng)


def drop_local(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Cut one to seven holes, each around a random point, which together remove a share of the
    points.
    """
    for size in _clusters(share * len(points), rng):
        distance = _squares(points, points[rng.integers(len(points))])
        points = points[np.sort(distance.argsort(kind="stable")[size:])]
    return points


def add_global(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Add a share of points anywhere in the unit ball."""
    return np.concatenate([points, _ball(share * len(points), rng)])


def add_local(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Add one to seven clusters around random points, together a share of points, within the unit
    ball.
    """
    sizes = _clusters(share * len(points), rng)
    middle = _some(points, len(sizes), rng).repeat(sizes, 0)
    width = rng.uniform(0.075, 0.125, len(sizes)).repeat(sizes)[:, None]
    added = middle + width * rng.standard_normal(middle.shape)
    outside = np.maximum(np.square(added).sum(-1, keepdims=True), 1)
    return np.concatenate([points, added / outside])


def strays(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Add a share of points anywhere in a ball of one and a half radii."""
    return np.concatenate([points, 1.5 * _ball(share * len(points), rng)])


def far_stray(points: np.ndarray, distance: float, rng: Generator) -> np.ndarray:
    """Add one point at a distance in radii."""
    return np.concatenate([points, distance * _direction(rng)[None]])


def few_points(points: np.ndarray, count: float, rng: Generator) -> np.ndarray:
    """Keep `count` random points."""
    return _some(points, int(count), rng)


def cut(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a share of the points: those beyond a plane of random direction."""
    return _nearest(points, points @ _direction(rng), share)


def turn_up(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Turn about the up axis z by up to `most` radians."""
    return _turned(points, 2, rng.uniform(0, most))


def turn_any(points: np.ndarray, _: float, rng: Generator) -> np.ndarray:
    """Turn by a uniformly drawn rotation."""
    turn, upper = np.linalg.qr(rng.standard_normal((3, 3)))
    turn = turn * np.sign(np.diag(upper))  # or some rotations would be more likely
    return points @ (turn * np.linalg.det(turn))


def partial(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a share of the points: those farthest from a random one."""
    return _nearest(points, _squares(points, points[rng.integers(len(points))]), share)


def _some(points: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """At most `count` random points, in their order."""
    return points[np.sort(rng.permutation(len(points))[:count])]


def _nearest(points: np.ndarray, distance: np.ndarray, share: float) -> np.ndarray:
    """The points n 3 without the share that has the largest distances n, in their order."""
    count = len(points) - round(share * len(points))
    return points[np.sort(distance.argsort(kind="stable")[:count])]


def _clusters(total: float, rng: Generator) -> np.ndarray:
    """Sizes of one to seven clusters of about `total` points together."""
    number = rng.integers(1, 8)
    return rng.multinomial(round(total), np.full(number, 1 / number))


def _ball(count: float, rng: Generator) -> np.ndarray:
    """About `count` points, at least one, uniform in the unit ball."""
    count = max(1, round(count))
    away = rng.standard_normal((count, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return away * rng.uniform(0, 1, (count, 1)) ** (1 / 3)


def _direction(rng: Generator) -> np.ndarray:
    away = rng.standard_normal(3)
    return away / np.linalg.norm(away)


def _turned(points: np.ndarray, axis: int, angle: float) -> np.ndarray:
    turned, (a, b) = points.copy(), ((1, 2), (2, 0), (0, 1))[axis]
    turned[:, a] = math.cos(angle) * points[:, a] - math.sin(angle) * points[:, b]
    turned[:, b] = math.sin(angle) * points[:, a] + math.cos(angle) * points[:, b]
    return turned


def _squares(points: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.square(points - place).sum(-1)


KINDS = {
    "jitter": Kind(jitter, (0.01, 0.02, 0.03, 0.04, 0.05)),
    "scale": Kind(scale, (1.6, 1.7, 1.8, 1.9, 2.0)),
    "rotate": Kind(tilt, tuple(math.radians(6 * i) for i in range(1, 6)), False),
    "drop global": Kind(drop_global, (0.25, 0.375, 0.5, 0.625, 0.75)),
    "drop local": Kind(drop_local, tuple(100 * i / 1024 for i in range(1, 6)), False),
    "add global": Kind(add_global, tuple(10 * i / 1024 for i in range(1, 6))),
    "add local": Kind(add_local, tuple(100 * i / 1024 for i in range(1, 6))),
    "5 % strays": Kind(strays, (0.05,)),
    "one far stray": Kind(far_stray, (3,)),
    "256 points": Kind(few_points, (256,)),
    "half cut away": Kind(cut, (0.5,)),
    "turned about up": Kind(turn_up, (2 * math.pi,)),
    "turned any way": Kind(turn_any, (0,), False),
    "partial (40 % cut)": Kind(partial, (0.4,), False),
}
