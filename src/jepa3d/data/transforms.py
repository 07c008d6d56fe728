"""Augmentations of batched clouds B N 3 as functions of a generator, on the device of the points."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa3d.frame import STEP
from jepa3d.ops import BatchGenerator, gather_points, squared_distance, uniform, unit_sphere

# of `random_view`
MAX_CUT, MAX_CLUTTER, VIEW_SHARES = 0.5, 0.1, (1, 1, 1 / 2, 1 / 4, 1 / 8)


def random_scale(
    points: Tensor, low: float, high: float, generator: BatchGenerator | None = None
) -> Tensor:
    """Each axis of each cloud scaled by its own factor in [low, high]."""
    return points * (low + (high - low) * uniform(generator, (len(points), 1, 3), points.device))


def random_rotate(points: Tensor, generator: BatchGenerator | None = None) -> Tensor:
    """Each cloud rotated about the up axis z by its own angle."""
    angle = 2 * math.pi * uniform(generator, (len(points), 1), points.device)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def random_translate(
    points: Tensor, reach: float, generator: BatchGenerator | None = None
) -> Tensor:
    """Each cloud moved along each axis by its own distance in [-reach, reach]."""
    return points + reach * (2 * uniform(generator, (len(points), 1, 3), points.device) - 1)


def random_jitter(
    points: Tensor, sigma: float | Tensor, generator: BatchGenerator | None = None
) -> Tensor:
    """Each coordinate moved by normal noise of standard deviation sigma, cut at 3 sigma (Box and
    Muller 1958).
    """
    u = uniform(generator, (len(points), 2, *points.shape[1:]), points.device)
    noise = (-2 * (1 - u[:, 0]).log()).sqrt() * (2 * math.pi * u[:, 1]).cos()
    return points + sigma * noise.clamp(-3, 3)


def random_crop(points: Tensor, count: int, generator: BatchGenerator | None = None) -> Tensor:
    """The `count` points of each cloud nearest to a random one of its points, a ball, left where
    they are.
    """
    pick = (uniform(generator, (len(points), 1), points.device) * points.shape[1]).long()
    around = gather_points(points, pick)
    return gather_points(
        points, squared_distance(around, points)[:, 0].topk(count, largest=False).indices
    )


def random_view(points: Tensor, num_points: int, generator: BatchGenerator) -> Tensor:
    """Each cloud B M 3, in farthest point order, as a scan might show it, B num_points 3 in the
    unit sphere.

    Turned about z. In half of the clouds up to `MAX_CUT` of the points lie beyond a plane and are
    gone. Of the rest a share of `VIEW_SHARES`, one for the batch, is kept: evenly, or in half of
    the clouds with a density that falls along one direction by up to e^3 a radius. Noise of up to 2
    % of the radius; in a third of the clouds up to `MAX_CLUTTER` of the points lie anywhere in the
    ball. Filled up as `frame` fills clouds of few points.
    """
    points = random_rotate(points, generator.stream("turn"))
    batch, drawn, _ = points.shape
    draws = uniform(generator.stream("view"), (batch, 11), points.device)
    away, along = (F.normalize(draws[:, at : at + 3] - 0.5, dim=1)[..., None] for at in (0, 3))
    place = (points @ away)[..., 0]
    cut = 2 * MAX_CUT * (draws[:, 6:7] - 0.5).clamp_min(0)
    edge = place.sort(1).values.gather(1, ((1 - cut) * (drawn - 1)).long())
    even = -torch.arange(drawn, device=points.device) / drawn
    chance = -(
        -uniform(generator.stream("thin"), place.shape, points.device).clamp_min(1e-9).log()
    ).log()
    # Gumbel noise: the largest are a weighted draw
    chance -= 3 * draws[:, 7:8] * (points @ along)[..., 0]
    chance = torch.where(draws[:, 8:9] < 0.5, even, chance)
    # what lies beyond the plane comes last
    chance -= 100 * (1 + place - edge) * (place > edge)
    count = round(num_points * VIEW_SHARES[generator.stream("count").choice(len(VIEW_SHARES))])
    points = gather_points(points, chance.topk(count, 1).indices)
    points = random_jitter(points, 0.02 * draws[:, 9:10, None], generator.stream("jitter"))
    stray = uniform(generator.stream("clutter"), (batch, count, 4), points.device)
    anywhere = F.normalize(stray[..., 1:] - 0.5, dim=-1) * (2 * stray[..., 1:] - 1).abs().amax(
        -1, keepdim=True
    )
    cluttered = stray[..., :1] < 3 * MAX_CLUTTER * (draws[:, 10:, None] - 2 / 3)
    return unit_sphere(fill(torch.where(cluttered, anywhere, points), num_points))


def fill(points: Tensor, num_points: int) -> Tensor:
    """Clouds B n 3 filled up to B num_points 3 with moved copies of their points, as
    `frame.py::fill` does for one.
    """
    count = points.shape[1]
    if count == num_points:
        return points
    extra = torch.arange(num_points - count, device=points.device)
    turn, row = extra // count, extra % count
    k = (num_points - 1) // count
    copied = points[:, : min(count, num_points - count)]
    nearest = squared_distance(copied, points).topk(k + 1, largest=False).indices[..., 1:]
    source = points[:, row]
    away = source - gather_points(points, nearest[:, row, turn % k])
    step = STEP * (1 - row / (4 * count))
    return torch.cat([points, source + step[:, None] * away], 1)


def augment(
    points: Tensor,
    scale: tuple[float, float],
    rotate: bool,
    translate: float,
    generator: BatchGenerator,
) -> Tensor:
    """Scale per axis, then rotation about the up axis, then a move, as configured."""
    if scale != (1.0, 1.0):
        points = random_scale(points, *scale, generator.stream("scale"))
    if rotate:
        points = random_rotate(points, generator.stream("rotate"))
    return (
        random_translate(points, translate, generator.stream("translate")) if translate else points
    )
