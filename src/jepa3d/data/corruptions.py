"""Corrupt clouds, for example with the noise, holes and stray points of a scanner.

Each kind of corruption is a function of one cloud [N, 3] in the unit ball, a level and a random
generator. The first seven kinds are those of PointCloud-C (Ren et al. 2022, arXiv 2202.03377), each
at five levels, called severities. PointCloud-C states how many of 1,024 points are removed or
added. Here these numbers are converted to shares, so that the effect does not depend on the number
of points of a cloud. The kinds after the first seven have one level each.
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
    # True if the encoder in the package was trained on changes of this kind. In training,
    # `random_view` in transforms.py or the random scaling of the axes makes such changes.
    trained: bool = True


def corrupt(points: np.ndarray, kind: str, severity: int, shape: int) -> np.ndarray:
    """Corrupt a cloud [N, 3] in the unit ball; returns points [n, 3] float32.

    kind: a key of `KINDS`. severity: index of the level, from 0. shape: index of the shape; kind,
    severity and shape together seed the random generator.
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
    """Rotate about x, then y, then z, each by a random angle from -`most` to `most` radians."""
    for axis, angle in enumerate(rng.uniform(-most, most, 3)):
        points = _rotated(points, axis, angle)
    return points


def drop_global(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a share of the points, chosen at random."""
    return _some(points, int(len(points) * (1 - share)), rng)


def drop_local(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a share of the points: one to seven clusters around random points of the cloud."""
    for size in _clusters(share * len(points), rng):
        distance = _squares(points, points[rng.integers(len(points))])
        points = points[np.sort(distance.argsort(kind="stable")[size:])]
    return points


def add_global(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Add random points anywhere in the unit ball.

    share: number of added points, relative to the number of points in the cloud.
    """
    return np.concatenate([points, _ball(share * len(points), rng)])


def add_local(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Add points in one to seven clusters around random points of the cloud. Added points outside
    the unit ball are moved into it, from distance r from the centre to distance 1 / r.

    The points of a cluster are normally distributed, with a standard deviation that is drawn once
    per cluster, from 0.075 to 0.125. share: number of all added points, relative to the number of
    points in the cloud.
    """
    sizes = _clusters(share * len(points), rng)
    middle = _some(points, len(sizes), rng).repeat(sizes, 0)
    width = rng.uniform(0.075, 0.125, len(sizes)).repeat(sizes)[:, None]
    added = middle + width * rng.standard_normal(middle.shape)
    outside = np.maximum(np.square(added).sum(-1, keepdims=True), 1)
    return np.concatenate([points, added / outside])


def strays(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Add random points anywhere in a ball of radius 1.5.

    share: number of added points, relative to the number of points in the cloud.
    """
    return np.concatenate([points, 1.5 * _ball(share * len(points), rng)])


def far_stray(points: np.ndarray, distance: float, rng: Generator) -> np.ndarray:
    """Add one point in a random direction.

    distance: how far the point is from the centre, in radii of the cloud.
    """
    return np.concatenate([points, distance * _direction(rng)[None]])


def few_points(points: np.ndarray, count: float, rng: Generator) -> np.ndarray:
    """Keep `count` random points, or all points if there are fewer."""
    return _some(points, int(count), rng)


def cut(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a share of the points: all those on one side of a plane with a random normal."""
    return _nearest(points, points @ _direction(rng), share)


def turn_up(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Rotate about the up axis z by a random angle from 0 to `most` radians."""
    return _rotated(points, 2, rng.uniform(0, most))


def turn_any(points: np.ndarray, _: float, rng: Generator) -> np.ndarray:
    """Apply a rotation that is sampled uniformly from all rotations."""
    matrix, upper = np.linalg.qr(rng.standard_normal((3, 3)))
    # without these signs, some rotations would be more likely than others
    matrix = matrix * np.sign(np.diag(upper))
    # if the determinant is -1, the matrix contains a reflection, but its negative is a rotation
    return points @ (matrix * np.linalg.det(matrix))


def partial(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Remove a share of the points: those farthest from a random point of the cloud."""
    return _nearest(points, _squares(points, points[rng.integers(len(points))]), share)


def _some(points: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """Choose `count` random points, or all if there are fewer; their order stays the same."""
    return points[np.sort(rng.permutation(len(points))[:count])]


def _nearest(points: np.ndarray, distance: np.ndarray, share: float) -> np.ndarray:
    """Remove a share of the points [n, 3]: those with the largest distances.

    distance: array [n], one number per point. The order of the other points stays the same.
    """
    count = len(points) - round(share * len(points))
    return points[np.sort(distance.argsort(kind="stable")[:count])]


def _clusters(total: float, rng: Generator) -> np.ndarray:
    """Choose a random number of clusters, from one to seven, and a random size for each.

    The sizes add up to round(total).
    """
    number = rng.integers(1, 8)
    return rng.multinomial(round(total), np.full(number, 1 / number))


def _ball(count: float, rng: Generator) -> np.ndarray:
    """Sample round(`count`) points, but at least one, uniformly in the unit ball."""
    count = max(1, round(count))
    away = rng.standard_normal((count, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return away * rng.uniform(0, 1, (count, 1)) ** (1 / 3)


def _direction(rng: Generator) -> np.ndarray:
    away = rng.standard_normal(3)
    return away / np.linalg.norm(away)


def _rotated(points: np.ndarray, axis: int, angle: float) -> np.ndarray:
    rotated, (a, b) = points.copy(), ((1, 2), (2, 0), (0, 1))[axis]
    rotated[:, a] = math.cos(angle) * points[:, a] - math.sin(angle) * points[:, b]
    rotated[:, b] = math.sin(angle) * points[:, a] + math.cos(angle) * points[:, b]
    return rotated


def _squares(points: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.square(points - place).sum(-1)


# name -> kind. Where PointCloud-C removes or adds n of 1,024 points ("drop" and "add"), the level
# here is n / 1024.
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
