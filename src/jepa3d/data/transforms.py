"""Augment batches of clouds [B, N, 3], with random numbers from a generator."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa3d.frame import STEP
from jepa3d.ops import BatchGenerator, gather_points, squared_distance, uniform, unit_sphere

# largest shares of points that `random_view` removes, moves to random places, or moves into lumps
MAX_CUT, MAX_CLUTTER, MAX_LUMPS = 0.5, 0.1, 1 / 3
# `random_view` keeps one of these shares of num_points. Each of the five entries is chosen with the
# same probability; 1 stands here twice, so its probability is 2/5.
VIEW_SHARES = (1, 1, 1 / 2, 1 / 4, 1 / 8)


def random_rotate(points: Tensor, generator: BatchGenerator | None = None) -> Tensor:
    """Rotate each cloud about the up axis z by its own random angle."""
    angle = 2 * math.pi * uniform(generator, (len(points), 1), points.device)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def random_jitter(
    points: Tensor, sigma: float | Tensor, generator: BatchGenerator | None = None
) -> Tensor:
    """Add normal noise of standard deviation sigma, clipped at 3 sigma, to each coordinate.

    The noise is made from uniform numbers as in Box and Muller 1958.
    """
    u = uniform(generator, (len(points), 2, *points.shape[1:]), points.device)
    noise = (-2 * (1 - u[:, 0]).log()).sqrt() * (2 * math.pi * u[:, 1]).cos()
    return points + sigma * noise.clamp(-3, 3)


def random_crop(points: Tensor, count: int, generator: BatchGenerator) -> Tensor:
    """Keep the `count` points of each cloud that are nearest to a random point of the cloud.

    The points keep their coordinates.
    """
    draws = uniform(generator, (len(points), 1), points.device)
    around = gather_points(points, (draws * points.shape[1]).long())
    distance = squared_distance(around, points)[:, 0]
    return gather_points(points, distance.topk(count, largest=False).indices)


def random_view(points: Tensor, num_points: int, generator: BatchGenerator) -> Tensor:
    """Make each cloud look like a scan; returns clouds [B, num_points, 3] in the unit sphere.

    points: clouds [B, M, 3], in farthest point order. Steps:

    1. Rotate the cloud about z by a random angle.
    2. In half of the clouds, remove the points beyond a plane: a share of up to `MAX_CUT`. (If M is
       less than 2 * num_points, some of these points may remain.)
    3. Keep `num_points * share` points. The share is chosen at random from `VIEW_SHARES`, once for
       the whole batch. Half of the clouds keep an even sample; in the others, density falls along
       one direction by a factor of up to e^3 per radius.
    4. Add noise with a standard deviation of up to 2 % of the radius.
    5. In a third of the clouds, move a share of the points (up to `MAX_CLUTTER`) to random places
       in the unit ball. In another third, move a share (up to `MAX_LUMPS`) into lumps around at
       most seven of the points. A lump has a standard deviation of 0.1 along each axis.
    6. Add moved copies of points until there are num_points points (`fill`), and normalise the
       clouds.
    """
    points = random_rotate(points, generator.stream("turn"))
    batch, size, _ = points.shape
    draws = uniform(generator.stream("view"), (batch, 12), points.device)
    away = F.normalize(draws[:, :3] - 0.5, dim=1)[..., None]
    along = F.normalize(draws[:, 3:6] - 0.5, dim=1)[..., None]
    place = (points @ away)[..., 0]
    cut = 2 * MAX_CUT * (draws[:, 6:7] - 0.5).clamp_min(0)
    edge = place.sort(1).values.gather(1, ((1 - cut) * (size - 1)).long())
    even = -torch.arange(size, device=points.device) / size
    # with Gumbel noise, the points with the largest values are a weighted random sample
    chance = uniform(generator.stream("thin"), place.shape, points.device)
    chance = -(-chance.clamp_min(1e-9).log()).log()
    chance -= 3 * draws[:, 7:8] * (points @ along)[..., 0]
    chance = torch.where(draws[:, 8:9] < 0.5, even, chance)
    # points beyond the plane come last
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
    """Fill clouds [B, n, 3] up to [B, num_points, 3] with moved copies of their points.

    The points are those of `frame.py::fill`, which says how copies are moved; here, the clouds come
    in a batch, and each must have at least two points.
    """
    count = points.shape[1]
    if count == num_points:
        return points
    extra = torch.arange(num_points - count, device=points.device)
    turn, row = extra // count, extra % count
    k = min((num_points - 1) // count, count - 1)
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
    """Scale, rotate about the up axis z, and move clouds [B, N, 3].

    Each cloud gets its own random values: a factor in the range `scale` for each axis, an angle (if
    `rotate`), and a distance in [-translate, translate] along each axis.
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
