"""Augmentations of batched clouds B N 3 as functions of a generator, on the device of the points."""

import math

import torch
from torch import Tensor

from jepa3d.ops import BatchGenerator, uniform


def random_scale(points: Tensor, low: float, high: float, generator: BatchGenerator | None = None) -> Tensor:
    """Each axis of each cloud scaled by its own factor in [low, high]."""
    return points * (low + (high - low) * uniform(generator, (len(points), 1, 3), points.device))


def random_rotate(points: Tensor, generator: BatchGenerator | None = None) -> Tensor:
    """Each cloud rotated about the up axis z by its own angle."""
    angle = 2 * math.pi * uniform(generator, (len(points), 1), points.device)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
