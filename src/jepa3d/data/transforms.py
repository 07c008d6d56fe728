"""Augmentations of batched clouds B N 3 as functions of a generator, on the device of the points."""

import math

import torch
from torch import Tensor

from jepa3d.ops import BatchGenerator, gather_points, squared_distance, uniform


def random_scale(points: Tensor, low: float, high: float, generator: BatchGenerator | None = None) -> Tensor:
    """Each axis of each cloud scaled by its own factor in [low, high]."""
    return points * (low + (high - low) * uniform(generator, (len(points), 1, 3), points.device))


def random_rotate(points: Tensor, generator: BatchGenerator | None = None) -> Tensor:
    """Each cloud rotated about the up axis z by its own angle."""
    angle = 2 * math.pi * uniform(generator, (len(points), 1), points.device)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def random_crop(points: Tensor, count: int, generator: BatchGenerator | None = None) -> Tensor:
    """The `count` points of each cloud nearest to a random one of its points, a ball, left where they are."""
    pick = (uniform(generator, (len(points), 1), points.device) * points.shape[1]).long()
    around = gather_points(points, pick)
    return gather_points(points, squared_distance(around, points)[:, 0].topk(count, largest=False).indices)


def augment(points: Tensor, scale: tuple[float, float], rotate: bool, generator: BatchGenerator) -> Tensor:
    """Scale per axis, then rotation about the up axis, as configured."""
    if scale != (1.0, 1.0):
        points = random_scale(points, *scale, generator.stream("scale"))
    return random_rotate(points, generator.stream("rotate")) if rotate else points
