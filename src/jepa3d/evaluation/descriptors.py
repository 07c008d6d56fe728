"""Descriptors made by hand, which a learned vector has to beat; they see what the encoder sees."""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa3d.models.encoder import PointEncoder, pool
from jepa3d.models.tokenizer import group
from jepa3d.ops import gather_points, squared_distance

BINS, _DRAWS = 64, 2**15
SCALES = (1, 4, 8, 16)  # patches together, of `geometry`


class Descriptor(NamedTuple):
    """Vectors of clouds, and how two sets of them are compared."""

    of: Callable[[Tensor], np.ndarray]  # clouds B N 3 as the encoder sees them -> B E
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray]  # q E, n E -> q n, larger is nearer


def baselines(encoder: PointEncoder, train: Tensor) -> dict[str, Descriptor]:
    """Shape histograms, and pooled geometry of the encoder's patches, standardised by prepared
    clouds `train` m N 3.

    train: never the clouds that are searched, unless those are searched to choose by.
    """
    of = partial(geometry, num_groups=encoder.num_groups, group_size=encoder.group_size)
    histograms = partial(_mean_over_poses, encoder, shape_histograms)
    surfaces = standardised(partial(_mean_over_poses, encoder, of), train)
    return {
        "histograms": Descriptor(histograms, minus_l1),
        "geometry": Descriptor(surfaces, cosine),
    }


def _mean_over_poses(
    encoder: PointEncoder, of: Callable[[Tensor], np.ndarray], points: Tensor
) -> np.ndarray:
    """The mean of the descriptor `of` over the poses in which the encoder sees prepared clouds."""
    return np.mean([of(pose) for pose in encoder.poses(points)], 0)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines q n of vectors q E and n E; of a zero vector 0."""
    return unit_length(a) @ unit_length(b).T


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors n E at length 1; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def minus_l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minus the L1 distances q n of histograms q E and n E."""
    return -torch.cdist(torch.from_numpy(a), torch.from_numpy(b), p=1).numpy()


def standardised(
    of: Callable[[Tensor], np.ndarray], train: Tensor
) -> Callable[[Tensor], np.ndarray]:
    """The descriptor `of`, each channel with mean 0 and deviation 1 over clouds `train` m N 3."""
    known = of(train)
    mean, deviation = known.mean(0), np.maximum(known.std(0), 1e-6)
    return lambda points: (of(points) - mean) / deviation


def _in_batches(of: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """Decorator: call a function of clouds B N 3 with eight clouds at a time."""

    @wraps(of)
    def batched(points: Tensor, *settings, **named) -> np.ndarray:
        found = [of(batch, *settings, **named).numpy() for batch in points.cpu().split(8)]
        return np.concatenate(found)

    return batched


@_in_batches
def shape_histograms(points: Tensor, seed: int = 0) -> Tensor:
    """Four histograms B 4 x 64 of clouds B N 3, each of sum 1 (Osada et al. 2002).

    Of 32,768 random triples of points: D2, the distance of two; A3, the angle at one; D3, the root
    of the area. D2 and D3 are divided by their means and end at 3. And of all points the height, in
    [-1, 1].
    """
    triples = np.random.default_rng(seed).integers(0, points.shape[1], (3, _DRAWS))
    first, second, third = (points[:, torch.from_numpy(rows)] for rows in triples)
    one, other = second - first, third - first
    twice = torch.linalg.cross(one, other).norm(dim=-1)
    angle = torch.atan2(twice, (one * other).sum(-1)) / torch.pi
    # Areas of a straight line are rounding errors: the mean counts as 0.01 of the radius at least.
    distance, root = (
        value / (3 * value.mean(1, keepdim=True).clamp_min(0.01))
        for value in (one.norm(dim=-1), (twice / 2).sqrt())
    )
    height = (points[..., 2] + 1) / 2
    return torch.cat([_shares(value) for value in (distance, angle, root, height)], 1)


def _shares(values: Tensor) -> Tensor:
    """The share of values B n in each of 64 equal bins of [0, 1], B 64 double; values outside count
    in the nearest bin.
    """
    bins = (values * BINS).long().clamp(0, BINS - 1) + BINS * torch.arange(len(values))[:, None]
    counts = bins.flatten().bincount(minlength=BINS * len(values)).view(-1, BINS)
    return counts.double() / values.shape[1]


@_in_batches
def geometry(points: Tensor, num_groups: int, group_size: int) -> Tensor:
    """Mean and maximum over tokens B 178 of 89 numbers on the surface around each, of clouds B N 3.

    At four scales (its own patch; those of its 4, 8 and 16 nearest centres, its own among them,
    together): the log of the trace of the covariance; the shares of the square roots of its
    eigenvalues; n n^T of the flattest direction, weighted by flatness; t t^T of the longest,
    weighted by linearity; the mean, from the centre. Then ten quantiles of the distances to the
    other centres, the distance from the centroid, the height, the distance from the up axis.
    """
    return pool(surface(points, num_groups, group_size)[0])


def surface(points: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The 89 numbers B M 89 of `geometry`, double, and the tokens' centres B M 3."""
    grouped = group(points, num_groups, group_size)
    centers = grouped.centers.double()
    placed = grouped.patches.double() + centers[:, :, None]
    mean, second = placed.mean(2), (placed.mT @ placed / group_size).flatten(2)
    distance = squared_distance(centers, centers).sqrt()
    near = distance.topk(min(SCALES[-1], num_groups), largest=False).indices
    found = []
    for scale in SCALES:
        middle = gather_points(mean, near[..., :scale]).mean(2)
        moment = gather_points(second, near[..., :scale]).mean(2).unflatten(-1, (3, 3))
        values, directions = torch.linalg.eigh(moment - middle[..., None] * middle[..., None, :])
        roots = values.clamp_min(0).sqrt()
        small, medium, large = roots.clamp_min(1e-9).split(1, -1)
        found += [(roots.square().sum(-1, keepdim=True) + 1e-6).log()]
        found += [roots / (small + medium + large)]
        found += [_product(directions[..., 0]) * (medium - small) / large]
        found += [_product(directions[..., 2]) * (large - medium) / large]
        found += [middle - centers]
    others = distance.sort(-1).values[..., 1:]  # the first is its own
    at = torch.linspace(0.05, 0.95, 10, dtype=others.dtype)
    found += [others.quantile(at, -1).movedim(0, -1)]
    found += [centers.norm(dim=-1, keepdim=True), centers[..., 2:]]
    found += [centers[..., :2].norm(dim=-1, keepdim=True)]
    return torch.cat(found, -1), grouped.centers


def _product(direction: Tensor) -> Tensor:
    """The six different entries of d d^T (..., 6) of directions (..., 3)."""
    x, y, z = direction.unbind(-1)
    return torch.stack([x * x, x * y, x * z, y * y, y * z, z * z], -1)
