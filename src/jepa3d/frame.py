"""From any cloud to what the encoder sees: the one frame behind every vector, with numpy alone.

Every command and call that asks an encoder goes through `frame`, so that a vector depends on the
set of points and on nothing else: not on the order of rows, a file's name, a place in a list or a
random number. `jepa3d export` puts this file beside the model as the module `grouping`. Within the package
the compiled sampling of ops.py takes the place of the loop below and picks the same points.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FRAME = 3  # version of the rules in this file: vectors of two versions cannot be compared
# different points of a cloud that is kept for any encoder; one encoder needs its own `min_points`
LEAST = 64
STEP = 0.6  # see `fill`
ALONE, MAX_CELLS, MAX_STRAYS, ROUNDS = 4, 64, 0.25, 8  # see `without_strays`
_ENDS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
# Turns 12 3 3: each of a cloud's own axes up, either end first; among them those that `own_axes`
# may confuse.
TURNS = np.stack([np.roll(np.diag(ends), axis, 1) for axis in range(3) for ends in _ENDS]).astype(
    np.float32
)


class Frame(NamedTuple):
    """What the encoder sees of a cloud, and where in the cloud's own coordinates that lies."""

    points: np.ndarray  # num_points 3 float32: centroid 0, farthest point at distance 1
    center: np.ndarray  # 3 float64
    radius: float
    turn: np.ndarray | None = None  # 3 3 float64, where the cloud was turned into its own axes

    def place(self, others: np.ndarray) -> np.ndarray:
        """Any points (..., 3) of the cloud where the encoder would see them, float32."""
        away = others - self.center
        return ((away if self.turn is None else away @ self.turn.T) / self.radius).astype(
            np.float32
        )


def group(
    points: np.ndarray, num_points: int, num_groups: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of patches.onnx: patches num_groups group_size 3 and centers num_groups 3, float32, of
    a cloud N 3.

    Any unit. Stack those of several clouds for a batch. The sizes stand in the model's metadata and
    its README. Raises ValueError as `frame` does.

    >>> patches, centers = group(cloud, 1024, 64, 24)
    >>> session.run(["embedding"], {"patches": patches[None], "centers": centers[None]})
    """
    points = frame(points, num_points, max(num_groups, group_size)).points
    start = int(_squares(points, points.mean(0)).argmax())
    centers = points[farthest_point_sample(points, num_groups, start)]
    return points[_nearest(centers, points, group_size)] - centers[:, None], centers


def farthest_point_sample(points: np.ndarray, num_samples: int, start: int) -> np.ndarray:
    """Indices num_samples of points N 3, each farthest from those before it; the first is `start`."""
    distance = np.full(len(points), np.inf, points.dtype)
    picked = np.empty(num_samples, np.int64)
    for i in range(num_samples):
        picked[i] = start
        np.minimum(distance, _squares(points, points[start]), out=distance)
        start = int(distance.argmax())
    return picked


def frame(
    points: np.ndarray,
    num_points: int,
    min_points: int = 1,
    sample: Callable[[np.ndarray, int, int], np.ndarray] = farthest_point_sample,
    keep_strays: bool = False,
    upright: bool = True,
) -> Frame:
    """What the encoder sees of a cloud N 3 of any unit and number type: `num_points` points in the
    unit sphere.

    Farthest points of more, and fewer filled up: see `fill`. A point that is there several times
    counts once, and strays not at all (`without_strays`), unless `keep_strays`. sample: what draws
    farthest points, as `farthest_point_sample` does. upright: as the cloud stands, else turned into
    its own axes (`own_axes`). Raises ValueError as `check` does, and for fewer than `min_points`
    different points.
    """
    cloud = check(points)
    place = (
        cloud.min(0) + cloud.max(0)
    ) / 2  # of the box: the same in any order, and however often a point is there
    cloud = _distinct(cloud - place)
    different, turn = len(cloud), None
    if not upright:
        turn = own_axes(cloud)
        # sorted again, by where points lie now: ties are in this order
        cloud = _distinct(cloud @ turn.T)
    if not keep_strays:
        cloud = cloud[without_strays(cloud, min_points)]
    middle = (cloud.min(0) + cloud.max(0)) / 2
    cloud -= middle
    size = float(np.abs(cloud).max()) or 1.0
    cloud = (cloud / size).astype(np.float32)  # in double until here: map coordinates are large
    if different < min_points:
        raise ValueError(too_few(len(points), different, min_points))
    start = int(_squares(cloud, np.zeros(3, np.float32)).argmax())
    if len(cloud) != num_points:
        cloud = cloud[sample(cloud, min(len(cloud), num_points), start)]
    if len(cloud) < num_points:
        cloud, _ = fill(cloud, num_points)
    seen = cloud.astype(np.float64)
    center = seen.mean(0)
    seen -= center
    radius = float(np.linalg.norm(seen, axis=1).max()) or 1.0
    center = middle + size * center
    return Frame(
        (seen / radius).astype(np.float32),
        place + (center if turn is None else center @ turn),
        size * radius,
        turn,
    )


def own_axes(points: np.ndarray) -> np.ndarray:
    """The turn 3 3 that brings a cloud n 3 into its own axes, the one along which it is flattest
    first.

    However a cloud is turned, it comes to lie in the same place. The axes are of the directions in
    which points lie from their mean, each counting once however far, so that strays weigh little;
    the first two point to where they are skew. A shape that looks alike from both ends of an axis
    may have either first; one with equal axes, say a cube, may come to lie anyhow.
    """
    away = points - points.mean(0)
    away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-300)
    axes = np.linalg.eigh(away.T @ away)[1]
    axes *= np.where(((away @ axes) ** 3).sum(0) < 0, -1, 1)
    axes[:, 2] *= np.sign(np.linalg.det(axes))
    return axes.T


def without_strays(points: np.ndarray, min_points: int = 1) -> np.ndarray:
    """Which of different points n 3, as indices in order, lie where others are; a clean cloud keeps
    nearly all.

    Points are counted in a grid over the box with three cells a point, at most `MAX_CELLS` along
    its longest side. In the cell of a stray and the 26 around it lie fewer than `ALONE` points,
    itself among them (of many points: fewer than an eighth of them would put there, spread evenly
    through the box; of fewer than 256: fewer than n / 64). Then again in the box of the rest, until
    nothing goes: one point far off puts all others into one cell at first; at most `ROUNDS` times,
    as often as a graph can do it (inference/export.py). A cloud that would lose more than
    `MAX_STRAYS` of its points, or keep fewer than `min_points`, is no surface with strays and keeps all.
    """
    kept = np.arange(len(points))
    for _ in range(ROUNDS):
        cells = min(MAX_CELLS, max(2, round((3 * len(kept)) ** (1 / 3))))
        left = points[kept]
        low = left.min(0)
        width = float((left.max(0) - low).max()) or 1.0
        cell = ((left - low) * ((cells - 1e-6) / width)).astype(np.int64) @ (
            cells * cells,
            cells,
            1,
        )
        count = np.bincount(cell, minlength=cells**3).reshape(cells, cells, cells)
        for axis in range(3):
            one = np.swapaxes(count, 0, axis)
            three = one.copy()
            three[1:] += one[:-1]
            three[:-1] += one[1:]
            count = np.swapaxes(three, 0, axis)
        few = min(ALONE * max(1.0, 3 * len(kept) / cells**3), len(kept) / 64)
        good = count.ravel()[cell] >= few
        if good.all():
            break
        kept = kept[good]
    return (
        np.arange(len(points))
        if len(kept) < max(min_points, (1 - MAX_STRAYS) * len(points))
        else kept
    )


def are_kept(points: np.ndarray, min_points: int = 1) -> np.ndarray:
    """Which points of any cloud n 3 `frame` keeps, a mask [n]; copies of a point share its lot."""
    centred = points - (points.min(0) + points.max(0)) / 2
    different, which = np.unique(centred, axis=0, return_inverse=True)
    kept = np.zeros(len(different), bool)
    kept[without_strays(different, min_points)] = True
    return kept[which.reshape(-1)]


def fill(points: np.ndarray, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """`num_points` points from fewer different ones, n 3 in farthest point order; and of which
    point each is a copy.

    All points come first, then copies of them, turn after turn. A copy of turn t is moved away from
    the t-th nearest point by STEP of that distance, a little less the later it comes, to where the
    surface goes on: patches of many copies in one place are unlike any that an encoder was trained
    on.
    """
    turn, row = np.divmod(np.arange(len(points), num_points), len(points))
    source, k = points[row], min(int(turn[-1]), len(points) - 1)
    copied = points[: min(len(points), len(row))]
    nearest = np.concatenate(
        [_nearest(copied[at : at + 256], points, k + 1) for at in range(0, len(copied), 256)]
    )
    # itself is the nearest
    away = source - points[nearest[row, 1 + (turn - 1) % k]] if k else np.zeros_like(source)
    # else copies of two neighbours are equally far
    step = (STEP * (1 - row / (4 * len(points)))).astype(np.float32)
    filled = np.concatenate([points, source + step[:, None] * away])
    return filled, np.r_[: len(points), row]


def _nearest(query: np.ndarray, points: np.ndarray, k: int) -> np.ndarray:
    """Indices n k of the points nearest to each query, nearest first."""
    distance = _squares(query[:, None], points)
    some = np.argpartition(distance, k - 1, axis=1)[:, :k]
    return np.take_along_axis(
        some, np.take_along_axis(distance, some, 1).argsort(1, kind="stable"), 1
    )


def check(points: np.ndarray) -> np.ndarray:
    """A copy in float64 of points N 3. Raises ValueError for another array, or one of NaN."""
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "fiub":
        raise ValueError(f"points must be numbers N x 3, found {points.dtype} {list(points.shape)}")
    if not len(points):
        raise ValueError("no points")
    cloud = points.astype(np.float64)
    if not (np.abs(cloud) <= 1e30).all():
        raise ValueError("NaN or infinite coordinates")
    return cloud


def too_few(count: int, different: int, min_points: int) -> str:
    """What is said of a cloud of `count` points, `different` of them, where at least `min_points` are
    needed.
    """
    if different == 1:
        return "one point only" if count == 1 else "all points are equal"
    found = (
        f"{count} points" if count == different else f"{different} different points of {count:,}"
    )
    return f"{found}, at least {min_points} are needed"


def _distinct(points: np.ndarray) -> np.ndarray:
    """Each different point of n 3 once, in an order that depends on their values alone."""
    x, y, z = points.T
    # far cheaper than to sort by rows
    points = points[np.argsort(x + np.sqrt(2) * y + np.pi * z, kind="stable")]
    return points[np.r_[True, (points[1:] != points[:-1]).any(1)]]


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y, z = (np.square(a[..., axis] - b[..., axis]) for axis in range(3))
    return x + y + z
