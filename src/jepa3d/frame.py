"""Convert point clouds to the normalised points that an encoder sees. This file needs only numpy.

Every vector of a cloud is computed from the points that `frame` returns. So the vector depends only
on the cloud's set of points, not on their order, a file's name, other clouds or random numbers.
`jepa3d export` copies this file to grouping.py beside the exported model. Inside the package,
`sample_one` of ops.py replaces `farthest_point_sample` below. If a compiled sampler is installed,
`sample_one` calls that sampler, which chooses the same points, except where distances are equal.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FRAME = 3  # version of the rules in this file; vectors of different versions are not comparable
# `jepa3d prepare` gives all clouds of a store the same number of points, for example 2,048. If a
# cloud has fewer, moved copies of its points are added (see `fill`). For this, the cloud needs at
# least `LEAST` different points (or, if the clouds of the store get fewer points than `LEAST`, as
# many different points as they get). Encoders have their own limit, the attribute `min_points`.
LEAST = 64
STEP = 0.6  # `fill` moves a copy of a point by at most this share of the distance to a neighbour
# `without_strays` explains these four.
ALONE, MAX_CELLS, MAX_STRAYS, ROUNDS = 4, 64, 0.25, 8
# The four ways to reverse none or two of the three axes. Only these reversals are rotations.
_ENDS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
# Rotations [12, 3, 3] that shift the order of the three axes cyclically and reverse none or two of
# them. If the up axis of a cloud is not known, its vector is the average over these rotations of
# the cloud in its own axes (`own_axes`). Each of the own axes then points up in some rotations and
# down in others. For two copies of a symmetric shape, `own_axes` may return axes with different
# signs. The average is still the same, since it includes all of these signs. For two copies of a
# shape with two equal extents, `own_axes` may return different axes. Then the averages differ.
TURNS = np.stack([np.roll(np.diag(ends), axis, 1) for axis in range(3) for ends in _ENDS]).astype(
    np.float32
)


class Frame(NamedTuple):
    """The points that the encoder sees, and the position, scale and rotation that convert the
    cloud's coordinates to the encoder's.
    """

    # [num_points, 3] float32; the centroid is 0, and the farthest point is at distance 1 from it
    points: np.ndarray
    center: np.ndarray  # [3] float64, the encoder's origin in the cloud's coordinates
    radius: float  # the length in the cloud's unit that is 1 in the encoder's coordinates
    # [3, 3] float64, the rotation into the cloud's own axes; None if the cloud is not rotated
    turn: np.ndarray | None = None

    def place(self, others: np.ndarray) -> np.ndarray:
        """Convert points [..., 3] from the cloud's coordinates to the encoder's, as float32."""
        away = others - self.center
        return ((away if self.turn is None else away @ self.turn.T) / self.radius).astype(
            np.float32
        )


def group(
    points: np.ndarray, num_points: int, num_groups: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the inputs of the exported model patches.onnx from a cloud [N, 3] in any unit.

    num_points, num_groups, group_size: as in the model's metadata and README. Returns patches
    [num_groups, group_size, 3] and centers [num_groups, 3], float32; for a batch, stack the results
    of several clouds. Raises ValueError as `frame` does.

    >>> patches, centers = group(cloud, 1024, 64, 24)
    >>> session.run(["embedding"], {"patches": patches[None], "centers": centers[None]})
    """
    points = frame(points, num_points, max(num_groups, group_size)).points
    start = int(_squares(points, points.mean(0)).argmax())
    centers = points[farthest_point_sample(points, num_groups, start)]
    return points[_nearest(centers, points, group_size)] - centers[:, None], centers


def farthest_point_sample(points: np.ndarray, num_samples: int, start: int) -> np.ndarray:
    """Choose points of a cloud [N, 3] by farthest point sampling.

    Returns indices [num_samples]. The first index is `start`. Each further index is that of the
    point with the largest distance to its nearest chosen point.
    """
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
    """Convert a cloud [N, 3], of any unit and number type, to `num_points` points in the unit ball.

    Duplicates of points are removed. Stray points are removed (`without_strays`) unless
    `keep_strays` is True. If more than `num_points` points are left, farthest point sampling
    chooses `num_points` of them. If fewer are left, `fill` adds moved copies of points.

    min_points: number of different points that the cloud needs. sample: the function that chooses
    points, with the arguments of `farthest_point_sample`. upright: keep the cloud's orientation; if
    False, rotate the cloud into its own axes (`own_axes`). Raises ValueError as `check` does, and
    if the cloud has fewer than `min_points` different points.
    """
    cloud = check(points)
    # Unlike the mean, the centre of the bounding box depends neither on the order of points nor on
    # duplicates.
    box_center = (cloud.min(0) + cloud.max(0)) / 2
    cloud = _distinct(cloud - box_center)
    different, turn = len(cloud), None
    if not upright:
        turn = own_axes(cloud)
        # Farthest point sampling chooses the first of several points at equal distance. So
        # `_distinct` sorts the points again: their order must depend only on the new coordinates.
        cloud = _distinct(cloud @ turn.T)
    if not keep_strays:
        cloud = cloud[without_strays(cloud, min_points)]
    middle = (cloud.min(0) + cloud.max(0)) / 2
    cloud -= middle
    size = float(np.abs(cloud).max()) or 1.0
    # float32 only after centring, since large geographic coordinates need float64
    cloud = (cloud / size).astype(np.float32)
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
        box_center + (center if turn is None else center @ turn),
        size * radius,
        turn,
    )


def own_axes(points: np.ndarray) -> np.ndarray:
    """Compute the rotation [3, 3] of a cloud [n, 3] into its own axes.

    The axes are the principal axes of the unit vectors from the mean to the points, so that far
    strays have little weight. The axis of the smallest extent is the first. The first two axes
    point to the side of positive skewness, and the third completes a rotation.

    With this rotation, all rotated copies of a cloud get the same coordinates, with two exceptions.
    If a shape is symmetric along an axis, that axis may point to either side. If the extents along
    two axes are equal, as for a cube, the rotation is arbitrary.
    """
    away = points - points.mean(0)
    away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-300)
    axes = np.linalg.eigh(away.T @ away)[1]
    axes *= np.where(((away @ axes) ** 3).sum(0) < 0, -1, 1)
    axes[:, 2] *= np.sign(np.linalg.det(axes))
    return axes.T


def without_strays(points: np.ndarray, min_points: int = 1) -> np.ndarray:
    """Find the points of a cloud that are not strays; returns their indices in ascending order.

    points: [n, 3], all different. They are counted in a cubic grid over the bounding box, with
    about three cells per point and at most `MAX_CELLS` cells along each side. A point is a stray if
    its cell and the 26 cells around it together hold too few points, itself included. Too few means
    fewer than n / 64 in a cloud of fewer than 256 points, else fewer than `ALONE`. In a large
    cloud, where `MAX_CELLS` makes the cells larger, the threshold grows with their volume.

    One far point can make the grid so coarse that all other points lie in one cell. So removal is
    repeated in the bounding box of the remaining points until no stray is found. There are at most
    `ROUNDS` rounds, since the exported graph (inference/export.py) always has this number of
    rounds. A cloud that would lose more than the share `MAX_STRAYS` of its points, or keep fewer
    than `min_points`, keeps all points. Clean clouds keep nearly all points.
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
        # Add up each cell and its 26 neighbours: three cells along each axis in turn.
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
    """Return a mask [n], True for the points of a cloud [n, 3] that are not strays.

    The cloud may have duplicates; all duplicates of a point get the same value.
    """
    centred = points - (points.min(0) + points.max(0)) / 2
    different, which = np.unique(centred, axis=0, return_inverse=True)
    kept = np.zeros(len(different), bool)
    kept[without_strays(different, min_points)] = True
    return kept[which.reshape(-1)]


def fill(points: np.ndarray, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Add moved copies of points to a cloud [n, 3] until it has `num_points` points.

    points: all different and in farthest point order. Returns the points [num_points, 3], and for
    each point the index of its original (its own index if it is an original). The originals come
    first, then rounds of copies. In round t, each copy is moved away from the t-th nearest
    neighbour of its original. It moves by a share of the distance between the neighbour and the
    original. The share is STEP for the first copy of each round, and falls to about 3/4 of STEP for
    the last. If there are more rounds than neighbours, the neighbours are used again, starting with
    the nearest. A cloud of one point has no neighbours, so its copies do not move.

    Moved copies continue the surface; exact copies would give patches unlike those that an encoder
    was trained on.
    """
    turn, row = np.divmod(np.arange(len(points), num_points), len(points))
    source, k = points[row], min(int(turn[-1]), len(points) - 1)
    copied = points[: min(len(points), len(row))]
    nearest = np.concatenate(
        [_nearest(copied[at : at + 256], points, k + 1) for at in range(0, len(copied), 256)]
    )
    # neighbour 0 is the point itself, so counting starts at 1
    away = source - points[nearest[row, 1 + (turn - 1) % k]] if k else np.zeros_like(source)
    # The steps decrease within a round. If the copies of two mutual neighbours were equally far
    # from their originals, farthest point sampling would have to choose between equal distances.
    step = (STEP * (1 - row / (4 * len(points)))).astype(np.float32)
    filled = np.concatenate([points, source + step[:, None] * away])
    return filled, np.r_[: len(points), row]


def _nearest(query: np.ndarray, points: np.ndarray, k: int) -> np.ndarray:
    """Find the k points nearest to each of the query points [n, 3].

    Returns their indices in `points`, [n, k], the nearest first.
    """
    distance = _squares(query[:, None], points)
    some = np.argpartition(distance, k - 1, axis=1)[:, :k]
    return np.take_along_axis(
        some, np.take_along_axis(distance, some, 1).argsort(1, kind="stable"), 1
    )


def check(points: np.ndarray) -> np.ndarray:
    """Return a float64 copy of points [N, 3].

    Raises ValueError for a wrong shape or number type, for no points, and for NaN, infinite or very
    large coordinates (1e30 or more).
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "fiub":
        raise ValueError(
            f"points must be an N x 3 array of numbers, not {points.dtype} {list(points.shape)}"
        )
    if not len(points):
        raise ValueError("no points")
    cloud = points.astype(np.float64)
    if not (np.abs(cloud) < 1e30).all():
        raise ValueError("NaN or infinite coordinates")
    return cloud


def too_few(count: int, different: int, min_points: int) -> str:
    """Return the error text for a cloud of `count` points, if only `different` of them differ.

    min_points: number of different points that are needed.
    """
    if different == 1:
        return "one point only" if count == 1 else "all points are equal"
    found = (
        f"{count} points" if count == different else f"{different} different points of {count:,}"
    )
    return f"{found}, at least {min_points} are needed"


def _distinct(points: np.ndarray) -> np.ndarray:
    """Remove duplicates from points [n, 3]; the order of the rest depends only on coordinates."""
    x, y, z = points.T
    # Sorting by one number per point is much faster than sorting rows. Rarely, rounding gives two
    # different points the same number. Then their order is that of the input, and a duplicate of
    # one of them may be kept.
    points = points[np.argsort(x + np.sqrt(2) * y + np.pi * z, kind="stable")]
    return points[np.r_[True, (points[1:] != points[:-1]).any(1)]]


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute squared distances between points [..., 3] that broadcast against each other."""
    x, y, z = (np.square(a[..., axis] - b[..., axis]) for axis in range(3))
    return x + y + z
