"""Surfaces of the generated shapes: boxes, surfaces of revolution, tubes, and swept outlines.

The shapes themselves are made by procedural.py and synthetic.py. Every surface is a *loft*: an
array [rings, sides, 3] of closed rings, where quads join each ring to the next. A ring that is
shrunk to a point closes an end of the loft. Since all surfaces are lofts, one function
(`triangles_of`) makes the triangles of all of them.
"""

from collections.abc import Sequence

import numpy as np

Rng = np.random.Generator
Floats = Sequence | np.ndarray
Loft = np.ndarray  # [rings, sides, 3]

# `lathe` and `tube` approximate a circle by a polygon with 16 corners.
_ANGLES = np.arange(16) * (np.pi / 8)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])  # of a square, counter-clockwise


def box(base: Floats, size: Floats, taper: float = 1, lean: Floats = (0, 0)) -> Loft:
    """Make a box whose bottom has its centre at `base`.

    size: extents (x, y, z). taper: factor on the x and y extents of the top. lean: shift (x, y) of
    the top.
    """
    bottom = np.array(base, float)
    top = np.add(bottom, (*lean, size[2]))
    corners = np.zeros((4, 3))
    corners[:, :2] = CORNERS * np.divide(size[:2], 2)
    middles, widths = np.array([bottom, bottom, top, top]), np.array([0, 1, taper, 0])
    return middles[:, None] + widths[:, None, None] * corners


def lathe(profile: Floats, at: Floats = (0, 0, 0), scale: Floats = (1, 1), power: int = 2) -> Loft:
    """Make a surface of revolution.

    profile: one row (radius, height) per ring. at: position of the point with radius 0 and
    height 0. scale: factors in x and y. power: with a power above 2, the circles become squarish.
    """
    circle = _CIRCLE / np.linalg.norm(_CIRCLE, ord=power, axis=1, keepdims=True)
    return sweep(np.array(profile, float), circle) * (*scale, 1) + at


def sweep(profile: np.ndarray, outline: np.ndarray) -> Loft:
    """Sweep an outline [sides, 2] along z, scaled by a profile; returns a loft [rings, sides, 3].

    profile: one row (radius, height) per ring.
    """
    loft = np.empty((len(profile), len(outline), 3))
    loft[..., :2] = profile[:, :1, None] * outline
    loft[..., 2] = profile[:, 1:]
    return loft


def tube(path: Floats, radius: float | Floats) -> Loft:
    """Make a capped tube along `path` [k, 3], which is straight or lies in a plane parallel to two
    coordinate axes.

    radius: one radius, or k radii.
    """
    path = np.array(path, float)
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    across = np.cross(tangent, np.eye(3)[np.abs(tangent).max(axis=0).argmin()])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    frame = np.stack([across, np.cross(across, tangent)], axis=1)  # [k, 2, 3]
    radii = np.broadcast_to(radius, len(path))
    rings = path[:, None] + radii[:, None, None] * (_CIRCLE @ frame)
    ends = np.repeat(path[[0, -1], None], len(_CIRCLE), axis=1)
    return np.concatenate([ends[:1], rings, ends[1:]])


def bezier(*controls: Floats) -> np.ndarray:
    """Return nine points [9, d] on the Bezier curve with the given control points [d]."""
    points = np.array(controls, float)[:, None]
    t = np.linspace(0, 1, 9)[:, None]
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def turn(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate points [..., 3] about z by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def triangles_of(loft: Loft) -> np.ndarray:
    """Return the triangles [t, 3, 3] of a loft [rings, sides, 3].

    Beside a ring that is shrunk to a point, every second triangle has area 0.
    """
    a, b = loft[:-1], loft[1:]
    c, d = np.roll(a, -1, axis=1), np.roll(b, -1, axis=1)
    return np.stack([a, b, c, b, d, c], axis=2).reshape(-1, 3, 3)


def normalise(points: np.ndarray) -> np.ndarray:
    """Move the centroid of points [n, 3] to 0, and scale the farthest point to distance 1."""
    points = points - points.mean(axis=0)
    return points / np.linalg.norm(points, axis=1).max()
