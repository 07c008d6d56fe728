"""Generate any number of unlabelled shapes by random programs.

A program composes, repeats, cuts and bends solids. The idea is from "Learning 3D Representations
from Procedural 3D Programs" (Chen et al. 2024, arXiv 2411.17467): there, shapes of 1 to 9 parts
made from a few kinds of solids suffice to pretrain an encoder. Every solid here is a *loft*: a
closed outline that is swept along a line or an arc, while a profile scales the radius of the
outline. Boxes, cylinders, cones, prisms, ellipsoids, solids of revolution, cups, tori and tubes are
lofts. A loft is stored as an array [rings, SIDES, 3]: each ring is the outline at one place of the
sweep, with SIDES points (see lofts.py).
"""

from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, rotation, sample_triangles
from jepa3d.data.lofts import Rng, normalise, sweep, triangles_of, turn

# probabilities of 1, 2, ..., 9 parts, as in the paper by Chen et al.
PARTS = np.array([5, 5, 5, 4, 4, 3, 2, 1, 1]) / 30
POINTS = 4096  # number of points of each shape
NOISE = 0.006  # largest standard deviation of noise per axis, for a radius of 1
# number of points of an outline; it is a multiple of 3, 4, 6 and 8, so that regular polygons with
# these numbers of corners keep all corners
SIDES = 24
GRID = 48  # cells along each side of the image in which `_seen` finds visible points

_ANGLES = np.arange(SIDES) * (2 * np.pi / SIDES)
# three rotation matrices, [3, 3, 3]: the first maps z to z, the second z to x, the third z to y
_AXES = np.stack([np.roll(np.eye(3), step, axis=0) for step in (0, 1, 2)])


def _outline(rng: Rng) -> np.ndarray:
    """Choose a random closed outline [SIDES, 2] in the square [-1, 1]^2."""
    kind = rng.integers(6)
    cos, sin = np.cos(_ANGLES), np.sin(_ANGLES)
    if kind < 2:  # superellipse: rhombus-like, circle or square
        power = 2.0 if rng.random() < 0.5 else rng.choice([1.2, 4.0, 30.0, 30.0])
        radius = 1 / (np.abs(cos) ** power + np.abs(sin) ** power) ** (1 / power)
    elif kind < 4:  # regular polygon
        step = 2 * np.pi / rng.choice([3, 4, 4, 6, 8])
        radius = np.cos(step / 2) / np.cos((_ANGLES + step / 2) % step - step / 2)
        radius = radius / radius.max()
    elif kind == 4:  # cogwheel or star
        low = rng.uniform(0.4, 0.9)
        teeth = _ANGLES * rng.choice([3, 4, 6]) / (2 * np.pi)
        radius = np.where(teeth % 1 < 0.5, 1.0, low)
    else:  # random rounded outline
        k, height = np.arange(2, 5)[:, None], rng.uniform(0, 0.25, (3, 1))
        waves = height * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi, (3, 1)))
        radius = 1 + waves.sum(0)
        radius = radius / radius.max()
    return radius[:, None] * np.stack([cos, sin], 1)


def _profile(rng: Rng) -> np.ndarray:
    """Choose a random profile of a loft: rows (radius, height from -1 to 1), one for each ring."""
    kind = rng.integers(8)
    if kind < 3:  # prism, truncated cone or cone
        top = 1.0 if kind < 2 else rng.uniform(0, 0.9)
        return np.array([(0, -1), (1, -1), (top, 1), (0, 1)])
    if kind == 3:  # ellipsoid or dome
        t = np.linspace(-np.pi / 2 if rng.random() < 0.6 else 0, np.pi / 2, 9)
        height = np.sin(t)
        rows = np.stack([np.cos(t), 2 * (height - height[0]) / (1 - height[0]) - 1], 1)
        return rows if t[0] < 0 else np.array([(0, -1), *rows])
    if kind < 6:  # smooth random profile, with or without end caps
        count, places = rng.integers(3, 6), np.linspace(0, 1, 9)
        radii = np.interp(places, np.linspace(0, 1, count), rng.uniform(0.2, 1, count))
        radii = np.convolve(np.pad(radii, 1, "edge"), (0.25, 0.5, 0.25), "valid")
        rows = np.stack([radii / radii.max(), np.linspace(-1, 1, 9)], 1)
        return rows if kind == 5 else np.array([(0, -1), *rows, (0, 1)])
    if kind == 6:  # cup: up along the outside, down along the inside
        wall, base = rng.uniform(0.05, 0.2), rng.uniform(0.5, 1)
        inside = [(1 - wall, 1), (base * (1 - wall), -0.85), (0, -0.85)]
        return np.array([(0, -1), (base, -1), (1, 1), *inside])
    steps = rng.integers(2, 5)  # stairs: a random radius for each step
    radii, heights = rng.uniform(0.3, 1, steps), np.sort(rng.uniform(-1, 1, steps - 1))
    edges = np.r_[-1, heights, 1]
    rows = [(r, z) for i, r in enumerate(radii / radii.max()) for z in edges[i : i + 2]]
    return np.array([(0, -1), *rows, (0, 1)])


def _solid(rng: Rng) -> np.ndarray:
    """Make a random solid, swept along z or along an arc.

    Returns a loft [rings, SIDES, 3] that lies roughly in the cube [-1, 1]^3.
    """
    outline, profile = _outline(rng), _profile(rng)
    # sweep along an arc or a full circle; this needs more rings than a sweep along a straight line
    if rng.random() < 0.2:
        at, known = np.linspace(0, len(profile) - 1, 17), np.arange(len(profile))
        profile = np.stack([np.interp(at, known, column) for column in profile.T], 1)
        if rng.random() < 0.5:
            profile[:, 0] = 1
        thick = rng.uniform(0.1, 0.45)
        whole = 2 * np.pi if rng.random() < 0.4 else rng.uniform(1, 5)
        angle = profile[:, 1:] * whole / 2
        across = 1 - thick + thick * profile[:, :1] * outline[:, 0]
        height = np.broadcast_to(thick * profile[:, :1] * outline[:, 1], across.shape)
        return np.stack([np.cos(angle) * across, np.sin(angle) * across, height], 2)
    loft = sweep(profile, outline)
    if rng.random() < 0.15:  # shear it, so that it leans
        loft[..., :2] += rng.uniform(-0.6, 0.6, 2) * loft[..., 2:]
    return loft


def _rotation(rng: Rng) -> np.ndarray:
    """Choose a rotation matrix [3, 3].

    It maps z to a coordinate axis (75 %), rotates by less than 70 degrees about a random axis
    (15 %), or is any rotation (10 %).
    """
    kind = rng.random()
    if kind < 0.75:
        return _AXES[rng.choice(3, p=(0.6, 0.2, 0.2))]
    if kind > 0.9:
        return rotation(rng.normal(size=4))
    return rotation(np.r_[1, rng.uniform(-0.4, 0.4, 3)])


def _size(rng: Rng) -> np.ndarray:
    """Choose the half axes [3] of a compact solid, a plate or a rod."""
    size = np.exp(rng.uniform(np.log(0.25), np.log(1.5), 3))
    thin = rng.random()
    if thin < 0.5:
        size[rng.permutation(3)[: 1 if thin < 0.28 else 2]] = rng.uniform(0.03, 0.12)
    if rng.random() < 0.5:
        size[1] = size[0]
    return size


def _copies(rng: Rng, about: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose how a part is repeated: not at all, mirrored, in a ring or in a row.

    about: a point [3] on the planes of mirrors and on the axes of rings. half: half the part's
    extent [3]. Returns matrices [n, 3, 3] and shifts [n, 3]. Copy i of a point p of the part is
    matrices[i] @ p + shifts[i].
    """
    kind, matrices = rng.random(), np.eye(3)[None]
    if kind < 0.2:
        matrices = np.stack([np.eye(3), np.diag((-1.0, 1, 1))])
        if rng.random() < 0.3:  # mirrored in x and in y: four copies
            matrices = np.concatenate([matrices, matrices * (1, -1, 1)])
    elif kind < 0.35:
        count = rng.integers(3, 9)
        angles = np.arange(count) * (2 * np.pi / count)
        matrices = np.stack([turn(np.eye(3), angle).T for angle in angles])
    elif kind < 0.5:
        count, axis = rng.integers(2, 7), rng.integers(3)
        shifts = np.zeros((count, 3))
        step = 2 * half[axis] * rng.uniform(1, 2.5) * rng.choice([-1, 1])
        shifts[:, axis] = np.arange(count) * step
        return np.repeat(matrices, count, 0), shifts
    return matrices, about - np.einsum("nij,j->ni", matrices, about)


def _compose(count: int, rng: Rng) -> np.ndarray:
    """Run one random program; returns points [count, 3], uniform by area over parts and copies."""
    triangles, boxes, copies = [], [], []
    for i in range(1 + rng.choice(9, p=PARTS)):
        loft = _solid(rng) * _size(rng) * (rng.uniform(0.3, 1) if i else 1)
        loft = loft @ _rotation(rng).T
        low, high = loft.min((0, 1)), loft.max((0, 1))
        half, place, about = (high - low) / 2, (low + high) / 2, np.zeros(3)
        if i:  # move the new part against a side of an earlier part
            about, other = boxes[rng.integers(len(boxes))]
            axis, side = rng.choice(3, p=(0.25, 0.25, 0.5)), rng.choice([-1, 1])
            moved = about + rng.uniform(-1, 1, 3) * other * (rng.random() < 0.7)
            away = other[axis] + half[axis] * rng.uniform(0.6, 1)
            moved[axis] = about[axis] + side * away
            loft, place = loft + (moved - place), moved
        boxes.append((place, half))
        triangles.append(triangles_of(loft))
        copies.append(_copies(rng, about, half))
    times = np.array([len(turns) for turns, _ in copies])
    part = np.repeat(np.arange(len(triangles)), [len(some) for some in triangles])
    points, chosen = sample_triangles(np.concatenate(triangles), count, rng, times[part])
    part = part[chosen]
    # move each point to a random copy of its part; copies are numbered consecutively over all parts
    copy = (rng.random(count) * times[part]).astype(int)
    copy += (np.cumsum(times) - times)[part]
    turns, shifts = (np.concatenate(some) for some in zip(*copies, strict=True))
    moved = np.flatnonzero(times[part] > 1)
    copy = copy[moved]
    rotated = np.einsum("nij,nj->ni", turns[copy], points[moved])
    points[moved] = rotated + shifts[copy]
    return points


def _bend(points: np.ndarray, rng: Rng) -> np.ndarray:
    """Twist, taper, bend or ripple points in the unit sphere along a random coordinate axis."""
    kind, axes = rng.integers(4), _AXES[rng.integers(3)]
    x, y, z = (points @ axes.T).T
    if kind == 0:  # twist
        angle = rng.uniform(-2, 2) * z
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = cos * x - sin * y, sin * x + cos * y
    elif kind == 1:  # taper
        factor = 1 + rng.uniform(-0.7, 0.7) * z
        x, y = factor * x, factor * y
    elif kind == 2:  # bend
        curve = rng.uniform(0.3, 1.2)
        radius, angle = x + 1 / curve, curve * z
        x, z = radius * np.cos(angle) - 1 / curve, radius * np.sin(angle)
    else:  # ripple
        height, angle = rng.uniform(0.02, 0.08), rng.uniform(4, 14) * z
        x = x + height * np.sin(angle + rng.uniform(0, 6))
    return np.stack([x, y, z], 1) @ axes


def _seen(points: np.ndarray, rng: Rng) -> np.ndarray:
    """Return a mask of the points that are visible from a random direction.

    The points lie in the unit sphere. They are projected to an image of GRID x GRID cells; a point
    is visible if no other point in its cell is much nearer to the viewer.
    """
    away = rng.normal(size=3)
    away /= np.linalg.norm(away)
    right = np.cross(away, np.eye(3)[np.abs(away).argmin()])
    right /= np.linalg.norm(right)
    depth, axes = points @ away, (right, np.cross(away, right))
    column, row = (((points @ axis + 1) * (GRID / 2)).astype(int) for axis in axes)
    cell = column.clip(0, GRID - 1) * GRID + row.clip(0, GRID - 1)
    nearest = np.full(GRID * GRID, np.inf)
    np.minimum.at(nearest, cell, depth)
    return depth < nearest[cell] + 0.1  # the tolerance of 0.1 keeps slanted surfaces


def make_procedural(i: int, num_points: int = POINTS, seed: int = 0) -> np.ndarray:
    """Make shape i of an endless sequence of shapes. Each seed gives another sequence.

    Returns the points, an array [num_points, 3] float32, with z up, centroid 0 and radius 1. The
    points are the same on every machine up to differences of 1e-5. About a third of the shapes have
    a box or an ellipsoid cut out, a third are bent, a fifth keep only the points that are visible
    from one side, and a fifth lose the points beyond a plane. These changes are independent of each
    other, with one exception: if fewer than `num_points` points would remain after the box or
    ellipsoid is cut out and invisible points are removed, neither of these two changes is made. All
    shapes get noise.
    """
    rng = np.random.default_rng([1, seed, i])
    cut, bent, seen, lost = rng.random(4) < (0.35, 0.35, 0.2, 0.2)
    # sample more points if some of them will be removed
    points = normalise(_compose(int(num_points * (1 + cut + lost / 2 + 3 * seen)), rng))
    if bent:
        points = normalise(_bend(points, rng))
    keep = np.ones(len(points), bool)
    if cut:
        middle = points[rng.integers(len(points))] * rng.uniform(0.5, 1)
        inside = (points - middle) / rng.uniform(0.15, 0.6, 3)
        is_ball = rng.random() < 0.5
        keep &= ((inside**2).sum(1) if is_ball else np.abs(inside).max(1)) > 1
    if seen:
        keep &= _seen(points, rng)
    if keep.sum() < num_points:
        keep[:] = True
    points = points[keep]
    if lost:
        order = np.argsort(points @ rng.normal(size=3), kind="stable")
        left = int(len(points) * rng.uniform(0.7, 1))
        points = points[order[: max(num_points, left)]]
    points = points[rng.permutation(len(points))[:num_points]]
    points = turn(points, rng.uniform(0, 2 * np.pi))
    noise = rng.normal(scale=rng.uniform(0, NOISE), size=points.shape)
    return normalise(points + noise).astype(np.float32)


def count_of(source: Path | str, kind: str = "procedural", fewest: int = 1) -> int:
    """Return COUNT if the source is `kind:COUNT`, and 0 for other sources.

    Raises ReadError if COUNT is not a number or is smaller than `fewest`.
    """
    name, colon, count = str(source).partition(":")
    if name != kind or not colon:
        return 0
    if not count.isdecimal() or int(count) < fewest:
        raise ReadError(f"{source}: give {kind}:COUNT with a COUNT of {fewest} or more")
    return int(count)


def read(i: int) -> PointCloud:
    """Return shape i as a cloud of `POINTS` points."""
    return PointCloud.make(make_procedural(i), up="z")
