"""Augmentations of batches of clouds B N 3, with random numbers from a generator."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa3d.frame import STEP
from jepa3d.ops import BatchGenerator, gather_points, squared_distance, uniform, unit_sphere

# of `random_view`
MAX_CUT, MAX_CLUTTER, MAX_LUMPS = 0.5, 0.1, 1 / 3
VIEW_SHARES = (1, 1, 1 / 2, 1 / 4, 1 / 8)


def random_rotate(points: Tensor, generator: BatchGenerator | None = None) -> Tensor:
    """Rotate each cloud about the up axis z by its own angle."""
    angle = 2 * math.pi * uniform(generator, (len(points), 1), points.device)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def random_jitter(
    points: Tensor, sigma: float | Tensor, generator: BatchGenerator | None = None
) -> Tensor:
    """Add normal noise of standard deviation sigma to each coordinate, cut at 3 sigma.

    After Box and Muller 1958.
    """
    u = uniform(generator, (len(points), 2, *points.shape[1:]), points.device)
    noise = (-2 * (1 - u[:, 0]).log()).sqrt() * (2 * math.pi * u[:, 1]).cos()
    return points + sigma * noise.clamp(-3, 3)


def random_crop(points: Tensor, count: int, generator: BatchGenerator) -> Tensor:
    """The `count` points of each cloud that are nearest to a random one of its points, not moved."""
    draws = uniform(generator, (len(points), 1), points.device)
    around = gather_points(points, (draws * points.shape[1]).long())
    distance = squared_distance(around, points)[:, 0]
    return gather_points(points, distance.topk(count, largest=False).indices)


def random_view(points: Tensor, num_points: int, generator: BatchGenerator) -> Tensor:
    """Each cloud B M 3, in farthest point order, as a scan might show it: B num_points 3, unit
    sphere.

    A cloud is turned about z. In half of the clouds up to `MAX_CUT` of the points are removed:
    those beyond a plane. Of the rest a share of `VIEW_SHARES`, the same for the whole batch, is
    kept: evenly, or in half of the clouds with a density that falls along one direction by up to
    e^3 a radius. Then noise of up to 2 % of the radius is added. In a third of the clouds up to
    `MAX_CLUTTER` of the points are put anywhere in the ball, in another third up to `MAX_LUMPS` of
    them into at most seven lumps around some of the points. Last, clouds are filled up to
    num_points by `fill`.
    """
    points = random_rotate(points, generator.stream("turn"))
    batch, drawn, _ = points.shape
    draws = uniform(generator.stream("view"), (batch, 12), points.device)
    away = F.normalize(draws[:, :3] - 0.5, dim=1)[..., None]
    along = F.normalize(draws[:, 3:6] - 0.5, dim=1)[..., None]
    place = (points @ away)[..., 0]
    cut = 2 * MAX_CUT * (draws[:, 6:7] - 0.5).clamp_min(0)
    edge = place.sort(1).values.gather(1, ((1 - cut) * (drawn - 1)).long())
    even = -torch.arange(drawn, device=points.device) / drawn
    # Gumbel noise: the points with the largest values are a weighted draw
    chance = uniform(generator.stream("thin"), place.shape, points.device)
    chance = -(-chance.clamp_min(1e-9).log()).log()
    chance -= 3 * draws[:, 7:8] * (points @ along)[..., 0]
    chance = torch.where(draws[:, 8:9] < 0.5, even, chance)
    # what lies beyond the plane comes last
    chance -= 100 * (1 + place - edge) * (place > edge)
    share = VIEW_SHARES[generator.stream("count").choice(len(VIEW_SHARES))]
    count = round(num_points * share)
    points = gather_points(points, chance.topk(count, 1).indices)
    noise = 0.02 * draws[:, 9:10, None]
    points = random_jitter(points, noise, generator.stream("jitter"))
    stray = uniform(generator.stream("clutter"), (batch, count, 4), points.device)
    radius = (2 * stray[..., 1:] - 1).abs().amax(-1, keepdim=True)
    anywhere = F.normalize(stray[..., 1:] - 0.5, dim=-1) * radius
    clutter, lumps = draws[:, 10, None, None], draws[:, 11, None, None]
    cluttered = stray[..., :1] < 3 * MAX_CLUTTER * (clutter - 2 / 3)
    middle = uniform(generator.stream("lumps"), (batch, 7), points.device) * count
    lump = (stray[..., 1] * (1 + 6 * lumps[..., 0])).long()
    lumped = gather_points(gather_points(points, middle.long()), lump)
    lumped = random_jitter(lumped, 0.1, generator.stream("lump"))
    in_lump = (clutter < 1 / 3) & (stray[..., :1] < 3 * MAX_LUMPS * clutter)
    points = torch.where(cluttered, anywhere, torch.where(in_lump, lumped, points))
    return unit_sphere(fill(points, num_points))


def fill(points: Tensor, num_points: int) -> Tensor:
    """Clouds B n 3 filled up to B num_points 3 with moved copies of points: `frame.py::fill` in
    batches.
    """
    count = points.shape[1]
    if count == num_points:
        return points
    extra = torch.arange(num_points - count, device=points.device)
    turn, row = extra // count, extra % count
    k = (num_points - 1) // count
    copied = points[:, : min(count, num_points - count)]
    nearest = squared_distance(copied, points).topk(k + 1, largest=False).indices
    source = points[:, row]
    away = source - gather_points(points, nearest[:, row, 1 + turn % k])
    step = STEP * (1 - row / (4 * count))
    return torch.cat([points, source + step[:, None] * away], 1)


def augment(
    points: Tensor,
    scale: tuple[float, float],
    rotate: bool,
    translate: float,
    generator: BatchGenerator,
) -> Tensor:
    """Scale each axis, rotate about the up axis and move, each if it is configured.

    Each cloud B N 3 gets its own factor in `scale` for each axis, its own angle, and its own
    distance in [-translate, translate] along each axis.
    """

    def draws(name: str) -> Tensor:
        return uniform(generator.stream(name), (len(points), 1, 3), points.device)

    if scale != (1.0, 1.0):
        low, high = scale
        points = points * (low + (high - low) * draws("scale"))
    if rotate:
        points = random_rotate(points, generator.stream("rotate"))
    if translate:
        points = points + translate * (2 * draws("translate") - 1)
    return points
