"""From a cloud to the inputs of patches.onnx, with numpy alone. `jepa3d export` copies this file beside the model.

The same steps as the encoder's own: unit sphere, farthest points, neighbours (jepa3d: models/encoder.py, tokenizer.py).
"""

import numpy as np


def group(points: np.ndarray, num_points: int, num_groups: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches num_groups group_size 3 and centers num_groups 3, float32, of a cloud N 3 in any unit.

    Stack those of several clouds for a batch. The sizes stand in the model's metadata and its README. Raises
    ValueError for another shape, NaN, a cloud whose points are all equal, or too few points.

    >>> patches, centers = group(cloud, 1024, 64, 24)
    >>> session.run(["embedding"], {"patches": patches[None], "centers": centers[None]})
    """
    points = prepare(points, num_points)
    if len(points) < max(num_groups, group_size):
        raise ValueError(f"{len(points)} points, at least {max(num_groups, group_size)} are needed")
    centers = points[farthest_point_sample(points, num_groups)]
    distance = _squares(centers[:, None], points)
    nearest = distance.argsort(1, kind="stable")[:, :group_size]
    return points[nearest] - centers[:, None], centers


def prepare(points: np.ndarray, num_points: int) -> np.ndarray:
    """A cloud N 3 in the unit sphere, float32, with at most `num_points` points."""
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"points must be N x 3, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("points contain NaN or infinite coordinates")
    if (points == points[0]).all():
        raise ValueError("all points of a cloud are equal")
    points = _unit_sphere(points.astype(np.float64)).astype(np.float32)  # in double first: map coordinates are large
    if len(points) > num_points:
        points = _unit_sphere(points[farthest_point_sample(points, num_points)])
    return points


def farthest_point_sample(points: np.ndarray, num_samples: int) -> np.ndarray:
    """Indices num_samples of points N 3, each farthest from those before it, the first from the centroid."""
    current = int(_squares(points, points.mean(0)).argmax())
    distance = np.full(len(points), np.inf, points.dtype)
    picked = np.empty(num_samples, np.int64)
    for i in range(num_samples):
        picked[i] = current
        np.minimum(distance, _squares(points, points[current]), out=distance)
        current = int(distance.argmax())
    return picked


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y, z = (np.square(a[..., axis] - b[..., axis]) for axis in range(3))
    return x + y + z


def _unit_sphere(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(0)
    return points / np.linalg.norm(points, axis=1).max()
