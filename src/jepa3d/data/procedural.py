"""Endless unlabelled shapes: random programs that compose, repeat, cut and bend solids, nothing to
download.

After "Learning 3D Representations from Procedural 3D Programs" (Chen et al. 2024, arXiv
2411.17467): 1 to 9 parts from a few kinds of solids suffice to pretrain an encoder. Every solid
here is one *loft*, a closed outline swept along a line or an arc under a profile of radii: boxes,
cylinders, cones, prisms, ellipsoids, lathes, cups, tori, tubes.
"""

from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.synthetic import Rng, normalise, sample_triangles, turn

# chances of 1 to 9 parts, as published
PARTS = np.array([5, 5, 5, 4, 4, 3, 2, 1, 1]) / 30
POINTS = 4096  # of a shape, of which an encoder sees farthest ones
NOISE = 0.006  # largest standard deviation a coordinate, for a shape of radius 1
# corners of an outline: triangles, squares, hexagons and octagons keep theirs
SIDES = 24
GRID = 48  # of directions, a side, in a view from one side

_ANGLES = np.arange(SIDES) * (2 * np.pi / SIDES)
_AXES = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
        [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
    ]
)


def _outline(rng: Rng) -> np.ndarray:
    """Closed outline [SIDES, 2] within the square of half side 1."""
    kind = rng.integers(6)
    if kind < 2:  # from a rhombus to a circle to a square
        power = 2.0 if rng.random() < 0.5 else rng.choice([1.2, 4.0, 30.0, 30.0])
        radius = 1 / (np.abs(np.cos(_ANGLES)) ** power + np.abs(np.sin(_ANGLES)) ** power) ** (
            1 / power
        )
    elif kind < 4:  # regular polygon
        step = 2 * np.pi / rng.choice([3, 4, 4, 6, 8])
        radius = np.cos(step / 2) / np.cos((_ANGLES + step / 2) % step - step / 2)
        radius = radius / radius.max()
    elif kind == 4:  # cogwheel, star
        low = rng.uniform(0.4, 0.9)
        radius = np.where((_ANGLES * rng.choice([3, 4, 6]) / (2 * np.pi)) % 1 < 0.5, 1.0, low)
    else:  # any rounded outline
        k = np.arange(2, 5)[:, None]
        radius = 1 + (
            rng.uniform(0, 0.25, (3, 1)) * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi, (3, 1)))
        ).sum(0)
        radius = radius / radius.max()
    return radius[:, None] * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)


def _profile(rng: Rng) -> np.ndarray:
    """Rows (radius, height) of the rings, heights from -1 to 1."""
    kind = rng.integers(8)
    if kind < 3:  # prism, cone or anything between
        top = 1.0 if kind < 2 else rng.uniform(0, 0.9)
        return np.array([(0, -1), (1, -1), (top, 1), (0, 1)])
    if kind == 3:  # ellipsoid, dome
        t = np.linspace(-np.pi / 2 if rng.random() < 0.6 else 0, np.pi / 2, 9)
        height = np.sin(t)
        ends = [] if t[0] < 0 else [(0.0, -1.0)]
        return np.array(
            [*ends, *np.stack([np.cos(t), 2 * (height - height[0]) / (1 - height[0]) - 1], 1)]
        )
    if kind < 6:  # lathe of a smooth profile, closed or open
        count = rng.integers(3, 6)
        radii = np.interp(
            np.linspace(0, 1, 9), np.linspace(0, 1, count), rng.uniform(0.2, 1, count)
        )
        radii = np.convolve(np.pad(radii, 1, "edge"), (0.25, 0.5, 0.25), "valid")
        rows = np.stack([radii / radii.max(), np.linspace(-1, 1, 9)], 1)
        return rows if kind == 5 else np.array([(0, -1), *rows, (0, 1)])
    if kind == 6:  # cup: outside up, inside down
        wall, base = rng.uniform(0.05, 0.2), rng.uniform(0.5, 1)
        return np.array(
            [(0, -1), (base, -1), (1, 1), (1 - wall, 1), (base * (1 - wall), -0.85), (0, -0.85)]
        )
    steps = rng.integers(2, 5)  # stairs
    radii, heights = rng.uniform(0.3, 1, steps), np.sort(rng.uniform(-1, 1, steps - 1))
    edges = np.r_[-1, heights, 1]
    rows = [(r, z) for i, r in enumerate(radii / radii.max()) for z in edges[i : i + 2]]
    return np.array([(0, -1), *rows, (0, 1)])


def _solid(rng: Rng) -> np.ndarray:
    """The loft [rings, SIDES, 3] of one solid in the cube of half side 1, swept along z or along an
    arc.
    """
    outline, profile = _outline(rng), _profile(rng)
    # an arc, up to a ring, needs more rings than a straight line
    if rng.random() < 0.2:
        profile = np.stack(
            [
                np.interp(np.linspace(0, len(profile) - 1, 17), np.arange(len(profile)), c)
                for c in profile.T
            ],
            1,
        )
        if rng.random() < 0.5:
            profile[:, 0] = 1
        thick, whole = (
            rng.uniform(0.1, 0.45),
            2 * np.pi if rng.random() < 0.4 else rng.uniform(1, 5),
        )
        angle = profile[:, 1] * whole / 2
        across = 1 - thick + thick * profile[:, :1] * outline[:, 0]
        height = np.broadcast_to(thick * profile[:, :1] * outline[:, 1], across.shape)
        loft = np.stack(
            [np.cos(angle)[:, None] * across, np.sin(angle)[:, None] * across, height], 2
        )
    else:
        loft = np.empty((len(profile), SIDES, 3))
        loft[..., :2] = profile[:, :1, None] * outline
        loft[..., 2] = profile[:, 1:]
        if rng.random() < 0.15:  # leaning
            loft[..., :2] += rng.uniform(-0.6, 0.6, 2) * loft[..., 2:]
    return loft


def _triangles(loft: np.ndarray) -> np.ndarray:
    """Triangles [t, 3, 3] of a loft [rings, SIDES, 3]."""
    a, b = loft[:-1], loft[1:]
    c, d = np.roll(a, -1, axis=1), np.roll(b, -1, axis=1)
    return np.stack([a, b, c, b, d, c], axis=2).reshape(-1, 3, 3)


def _rotation(rng: Rng) -> np.ndarray:
    """Mostly along an axis, sometimes tilted, sometimes any."""
    kind = rng.random()
    if kind < 0.75:
        return _AXES[rng.choice(3, p=(0.6, 0.2, 0.2))].astype(float)
    q = rng.normal(size=4) if kind > 0.9 else np.r_[1, rng.uniform(-0.4, 0.4, 3)]
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _size(rng: Rng) -> np.ndarray:
    """Half axes: solids, plates and rods."""
    size = np.exp(rng.uniform(np.log(0.25), np.log(1.5), 3))
    thin = rng.random()
    if thin < 0.5:
        size[rng.permutation(3)[: 1 if thin < 0.28 else 2]] = rng.uniform(0.03, 0.12)
    if rng.random() < 0.5:
        size[1] = size[0]
    return size


def _copies(rng: Rng, about: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [n, 3, 3] and shifts [n, 3] that repeat a part: once, mirrored, in a ring or in a
    row.
    """
    kind, one = rng.random(), np.eye(3)[None]
    if kind < 0.2:
        flip = np.stack([np.eye(3), np.diag((-1.0, 1, 1))])
        if rng.random() < 0.3:  # four of them
            flip = np.concatenate([flip, flip * (1, -1, 1)])
        return flip, about - np.einsum("nij,j->ni", flip, about)
    if kind < 0.35:
        count = rng.integers(3, 9)
        angles = np.arange(count) * (2 * np.pi / count)
        spin = np.zeros((count, 3, 3))
        spin[:, 0, 0] = spin[:, 1, 1] = np.cos(angles)
        spin[:, 1, 0], spin[:, 0, 1], spin[:, 2, 2] = np.sin(angles), -np.sin(angles), 1
        return spin, about - np.einsum("nij,j->ni", spin, about)
    if kind < 0.5:
        count, axis = rng.integers(2, 7), rng.integers(3)
        shifts = np.zeros((count, 3))
        shifts[:, axis] = (
            np.arange(count) * 2 * half[axis] * rng.uniform(1, 2.5) * rng.choice([-1, 1])
        )
        return np.repeat(one, count, 0), shifts
    return one, np.zeros((1, 3))


def _compose(count: int, rng: Rng) -> np.ndarray:
    """Points [count, 3] on the surfaces of all parts of one program, uniform by area."""
    triangles, boxes, copies = [], [], []
    for i in range(1 + rng.choice(9, p=PARTS)):
        loft = (_solid(rng) * _size(rng) * (rng.uniform(0.3, 1) if i else 1)) @ _rotation(rng).T
        corners = loft.reshape(-1, 3)
        low, high = corners.min(0), corners.max(0)
        half, place, about = (high - low) / 2, (low + high) / 2, np.zeros(3)
        if i:  # against a side of an earlier part
            about, other = boxes[rng.integers(len(boxes))]
            axis, side = rng.choice(3, p=(0.25, 0.25, 0.5)), rng.choice([-1, 1])
            moved = about + rng.uniform(-1, 1, 3) * other * (rng.random() < 0.7)
            moved[axis] = about[axis] + side * (other[axis] + half[axis] * rng.uniform(0.6, 1))
            loft, place = loft + (moved - place), moved
        boxes.append((place, half))
        triangles.append(_triangles(loft))
        copies.append(_copies(rng, about, half))
    times = np.array([len(turns) for turns, _ in copies])
    part = np.repeat(np.arange(len(triangles)), [len(some) for some in triangles])
    points, chosen = sample_triangles(np.concatenate(triangles), count, rng, times[part])
    part = part[chosen]
    copy = (np.cumsum(times) - times)[part] + (rng.random(count) * times[part]).astype(int)
    turns, shifts = (np.concatenate(some) for some in zip(*copies, strict=True))
    moved = np.flatnonzero(times[part] > 1)
    points[moved] = np.einsum("nij,nj->ni", turns[copy[moved]], points[moved]) + shifts[copy[moved]]
    return points


def _bend(points: np.ndarray, rng: Rng) -> np.ndarray:
    """Points in the unit sphere twisted, tapered, bent or rippled along an axis."""
    kind, axes = rng.integers(4), _AXES[rng.integers(3)].astype(float)
    x, y, z = (points @ axes.T).T
    if kind == 0:
        angle = rng.uniform(-2, 2) * z
        x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    elif kind == 1:
        factor = 1 + rng.uniform(-0.7, 0.7) * z
        x, y = factor * x, factor * y
    elif kind == 2:
        curve = rng.uniform(0.3, 1.2)
        x, z = (x + 1 / curve) * np.cos(curve * z) - 1 / curve, (x + 1 / curve) * np.sin(curve * z)
    else:
        x = x + rng.uniform(0.02, 0.08) * np.sin(rng.uniform(4, 14) * z + rng.uniform(0, 6))
    return np.stack([x, y, z], 1) @ axes


def _seen(points: np.ndarray, rng: Rng) -> np.ndarray:
    """Of points in the unit sphere a mask of those that one viewpoint sees, the nearest in each of
    its directions.
    """
    away = rng.normal(size=3)
    away /= np.linalg.norm(away)
    right = np.cross(away, np.eye(3)[np.abs(away).argmin()])
    right /= np.linalg.norm(right)
    depth = points @ away
    cell = [
        ((points @ axis + 1) * (GRID / 2)).astype(int).clip(0, GRID - 1)
        for axis in (right, np.cross(away, right))
    ]
    nearest = np.full(GRID * GRID, np.inf)
    np.minimum.at(nearest, flat := cell[0] * GRID + cell[1], depth)
    return depth < nearest[flat] + 0.1


def make_procedural(i: int, num_points: int = POINTS, seed: int = 0) -> np.ndarray:
    """Shape i of the endless set `seed`: points float32 [num_points, 3], z up, centroid 0, farthest
    at distance 1.

    The same on any machine to 1e-5. A third is cut by a box or a ball, a third bent, a fifth seen
    from one side, a fifth loses what lies beyond a plane; all get noise.
    """
    rng = np.random.default_rng([1, seed, i])
    cut, bent, seen, lost = rng.random(4) < (0.35, 0.35, 0.2, 0.2)
    points = normalise(_compose(int(num_points * (1 + cut + lost / 2 + 3 * seen)), rng))
    if bent:
        points = normalise(_bend(points, rng))
    keep = np.ones(len(points), bool)
    if cut:
        inside = (points - points[rng.integers(len(points))] * rng.uniform(0.5, 1)) / rng.uniform(
            0.15, 0.6, 3
        )
        keep &= (inside**2).sum(1) > 1 if rng.random() < 0.5 else np.abs(inside).max(1) > 1
    if seen:
        keep &= _seen(points, rng)
    if keep.sum() < num_points:
        keep[:] = True
    points = points[keep]
    if lost:
        order = np.argsort(points @ rng.normal(size=3), kind="stable")
        points = points[order[: max(num_points, int(len(points) * rng.uniform(0.7, 1)))]]
    points = points[rng.permutation(len(points))[:num_points]]
    points = turn(points, rng.uniform(0, 2 * np.pi))
    points = normalise(points + rng.normal(scale=rng.uniform(0, NOISE), size=points.shape))
    return points.astype(np.float32)


def count_of(source: Path) -> int:
    """COUNT of `procedural:COUNT`, else 0.

    Raises ReadError for a COUNT that is no number from 1.
    """
    name, _, count = str(source).partition(":")
    if name != "procedural":
        return 0
    if not count.isdigit() or not int(count):
        raise ReadError(f"{source}: give procedural:COUNT with a COUNT from 1")
    return int(count)


def read(i: int) -> PointCloud:
    """Shape i as a cloud of `POINTS` points."""
    return PointCloud.make(make_procedural(i), up="z")
