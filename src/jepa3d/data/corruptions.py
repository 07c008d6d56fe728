"""What scans suffer, as functions of one cloud N 3 in the unit sphere, a level and a generator of
numpy.

The first seven kinds are PointCloud-C's (Ren et al. 2022, arXiv 2202.03377) at its five severities.
It numbers points of clouds of 1,024; here they are shares, so that a cloud of any size suffers as
much. The others have one level each.
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
    # whether the views that trained the package's encoder have it: `transforms.py::random_view`
    trained: bool = True


def corrupt(points: np.ndarray, kind: str, severity: int, shape: int) -> np.ndarray:
    """A cloud N 3 of the unit sphere, corrupted, n 3 float32; the same for the same severity (from
    0) and shape.
    """
    rng = np.random.default_rng([zlib.crc32(kind.encode()), severity, shape])
    changed = KINDS[kind].change(points.astype(np.float64), KINDS[kind].levels[severity], rng)
    return changed.astype(np.float32)


def jitter(points: np.ndarray, sigma: float, rng: Generator) -> np.ndarray:
    """Normal noise of standard deviation sigma on every coordinate."""
    return points + sigma * rng.standard_normal(points.shape)


def scale(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Each axis by its own factor in [1 / most, most]."""
    return points * rng.uniform(1 / most, most, 3)


def tilt(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Turned about x, then y, then z, by up to `most` radians each."""
    for axis, angle in enumerate(rng.uniform(-most, most, 3)):
        points = _turned(points, axis, angle)
    return points


def drop_global(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """A random share of the points is gone."""
    return _some(points, int(len(points) * (1 - share)), rng)


def drop_local(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Up to seven holes: in each a random one of the points and those nearest to it are gone,
    together a share.
    """
    for size in _clusters(share * len(points), rng):
        order = _squares(points, points[rng.integers(len(points))]).argsort(kind="stable")
        points = points[np.sort(order[size:])]
    return points


def add_global(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """A share of points more, anywhere in the unit ball."""
    return np.concatenate([points, _ball(share * len(points), rng)])


def add_local(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Up to seven clouds of points more, together a share, each around one of the points; none
    leaves the unit ball.
    """
    sizes = _clusters(share * len(points), rng)
    middle = _some(points, len(sizes), rng).repeat(sizes, 0)
    width = rng.uniform(0.075, 0.125, len(sizes)).repeat(sizes)[:, None]
    added = middle + width * rng.standard_normal(middle.shape)
    return np.concatenate([points, added / np.maximum(_squares(added, np.zeros(3)), 1)[:, None]])


def strays(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """A share of points more, anywhere in a ball of one and a half radii."""
    return np.concatenate([points, 1.5 * _ball(share * len(points), rng)])


def far_stray(points: np.ndarray, distance: float, rng: Generator) -> np.ndarray:
    """One point more, at a distance in radii."""
    return np.concatenate([points, distance * _direction(rng)[None]])


def few_points(points: np.ndarray, count: float, rng: Generator) -> np.ndarray:
    """Only some of the points, at random."""
    return _some(points, int(count), rng)


def cut(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """A share of the points, those beyond a plane of random direction, is gone."""
    return _nearest(points, points @ _direction(rng), share)


def turn_up(points: np.ndarray, most: float, rng: Generator) -> np.ndarray:
    """Turned about the up axis z by up to `most` radians."""
    return _turned(points, 2, rng.uniform(0, most))


def turn_any(points: np.ndarray, _: float, rng: Generator) -> np.ndarray:
    """Turned by a rotation drawn evenly of all."""
    turn, upper = np.linalg.qr(rng.standard_normal((3, 3)))
    turn = turn * np.sign(np.diag(upper))  # else qr prefers some
    return points @ (turn * np.linalg.det(turn))


def partial(points: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """A share of the points, those farthest from a random one of them, is gone."""
    return _nearest(points, _squares(points, points[rng.integers(len(points))]), share)


def _some(points: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """At most `count` random ones of the points, in their order."""
    return points[np.sort(rng.permutation(len(points))[:count])]


def _nearest(points: np.ndarray, distance: np.ndarray, share: float) -> np.ndarray:
    """The points n 3 without the share of them that has the largest distances n, in their order."""
    return points[
        np.sort(distance.argsort(kind="stable")[: len(points) - round(share * len(points))])
    ]


def _clusters(total: float, rng: Generator) -> np.ndarray:
    """Sizes of one to seven clusters of about `total` points together."""
    number = rng.integers(1, 8)
    return rng.multinomial(round(total), np.full(number, 1 / number))


def _ball(count: float, rng: Generator) -> np.ndarray:
    """About `count` points, at least one, evenly in the unit ball."""
    count = max(1, round(count))
    away = rng.standard_normal((count, 3))
    return (
        away
        / np.linalg.norm(away, axis=1, keepdims=True)
        * rng.uniform(0, 1, (count, 1)) ** (1 / 3)
    )


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
    "rotate": Kind(tilt, tuple(math.radians(6 * step) for step in range(1, 6)), trained=False),
    "drop global": Kind(drop_global, (0.25, 0.375, 0.5, 0.625, 0.75)),
    "drop local": Kind(drop_local, tuple(100 * step / 1024 for step in range(1, 6)), trained=False),
    "add global": Kind(add_global, tuple(10 * step / 1024 for step in range(1, 6))),
    "add local": Kind(add_local, tuple(100 * step / 1024 for step in range(1, 6)), trained=False),
    "5 % strays": Kind(strays, (0.05,)),
    "one far stray": Kind(far_stray, (3,)),
    "256 points": Kind(few_points, (256,)),
    "half cut away": Kind(cut, (0.5,)),
    "turned about up": Kind(turn_up, (2 * math.pi,)),
    "turned any way": Kind(turn_any, (0,), trained=False),
    "partial (40 % cut)": Kind(partial, (0.4,), trained=False),
}
