"""Handcrafted descriptors of a cloud, which an encoder's vectors have to beat. They are computed
from the same points that the encoder sees.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa3d.models.encoder import PointEncoder, pool
from jepa3d.models.tokenizer import group
from jepa3d.ops import gather_points, squared_distance

# for `shape_histograms`: number of bins per histogram, and of random triples of points per cloud
BINS, _DRAWS = 64, 2**15
# number of patches that `geometry` joins at each scale, including the token's own patch
SCALES = (1, 4, 8, 16)


class Descriptor(NamedTuple):
    """A function that computes the vectors of clouds, and a function that compares vectors."""

    # clouds [B, N, 3], as the encoder sees them -> vectors [B, E]
    of: Callable[[Tensor], np.ndarray]
    # vectors [q, E] and [n, E] -> similarities [q, n]; larger means more similar
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray]


def baselines(encoder: PointEncoder, train: Tensor) -> dict[str, Descriptor]:
    """Return two handcrafted descriptors by name. "histograms" are shape histograms; "geometry" is
    the pooled geometry of the encoder's patches.

    train: clouds [m, N, 3] that `encoder.prepare` returned. The geometry is standardised by its
    mean and std over these clouds. So do not pass the clouds on which the descriptors are scored,
    unless these scores only serve to choose a setting.
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
    """Average the descriptor `of` over the poses (rotations) that `encoder.poses` returns for a
    cloud. If the encoder assumes upright clouds, there is only one pose.
    """
    return np.mean([of(pose) for pose in encoder.poses(points)], 0)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine similarities [q, n] of vectors [q, E] and [n, E]; 0 for a zero vector."""
    return unit_length(a) @ unit_length(b).T


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [n, E] to length 1; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def minus_l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the negative L1 distances [q, n] of histograms [q, E] and [n, E]."""
    return -torch.cdist(torch.from_numpy(a), torch.from_numpy(b), p=1).numpy()


def standardised(
    of: Callable[[Tensor], np.ndarray], train: Tensor
) -> Callable[[Tensor], np.ndarray]:
    """Return the descriptor `of`, shifted and scaled to mean 0 and std 1 per channel over the
    clouds `train` [m, N, 3].
    """
    vectors = of(train)
    mean, deviation = vectors.mean(0), np.maximum(vectors.std(0), 1e-6)
    return lambda points: (of(points) - mean) / deviation


def _in_batches(of: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """Decorate a function of clouds [B, N, 3]: it is called with at most eight clouds at a time,
    and its results are concatenated.
    """

    @wraps(of)
    def batched(points: Tensor, *settings, **named) -> np.ndarray:
        found = [of(batch, *settings, **named).numpy() for batch in points.cpu().split(8)]
        return np.concatenate(found)

    return batched


@_in_batches
def shape_histograms(points: Tensor, seed: int = 0) -> Tensor:
    """Compute four histograms of 64 bins for clouds [B, N, 3]; returns the concatenated histograms
    [B, 256].

    The first three, D2, A3 and D3 (Osada et al. 2002), are measured on 32,768 random triples of
    points. D2 is the distance between two of the points, A3 is the angle at one of them, and D3 is
    the square root of the triangle's area. D2 and D3 are divided by their mean over the cloud;
    their bins cover 0 to 3. The bins of A3 cover 0 to pi. The fourth histogram is of the height z
    of all points; its bins cover -1 to 1. Each histogram sums to 1.
    """
    triples = np.random.default_rng(seed).integers(0, points.shape[1], (3, _DRAWS))
    first, second, third = (points[:, torch.from_numpy(rows)] for rows in triples)
    one, other = second - first, third - first
    twice_area = torch.linalg.cross(one, other).norm(dim=-1)
    angle = torch.atan2(twice_area, (one * other).sum(-1)) / torch.pi
    # If all points lie on a line, the areas are mere rounding errors. Therefore a mean below 0.01
    # is replaced by 0.01.
    distance, root = (
        value / (3 * value.mean(1, keepdim=True).clamp_min(0.01))
        for value in (one.norm(dim=-1), (twice_area / 2).sqrt())
    )
    height = (points[..., 2] + 1) / 2
    return torch.cat([_shares(value) for value in (distance, angle, root, height)], 1)


def _shares(values: Tensor) -> Tensor:
    """Count the n values of each of B clouds in 64 equal bins of [0, 1]; returns an array [B, 64]:
    the share of a cloud's values in each bin.

    Values below 0 are counted in the first bin, values above 1 in the last bin.
    """
    first = BINS * torch.arange(len(values))[:, None]
    bins = first + (values * BINS).long().clamp(0, BINS - 1)
    counts = bins.flatten().bincount(minlength=BINS * len(values)).view(-1, BINS)
    return counts.double() / values.shape[1]


@_in_batches
def geometry(points: Tensor, num_groups: int, group_size: int) -> Tensor:
    """Describe the surface around each token of clouds [B, N, 3] by 89 numbers. Returns an array
    [B, 178]: the mean and the maximum of these numbers over the tokens.

    Nineteen numbers are computed at each of four scales. The smallest scale uses the token's patch
    alone; the larger ones join the patches of 4, 8 or 16 centres: the token's own centre and those
    nearest to it. Let s <= m <= l be the square roots of the eigenvalues of the covariance matrix
    of all points in these patches. The nineteen numbers are:

    - the log of the trace of the covariance matrix (1 number)
    - s, m and l, each divided by s + m + l (3 numbers)
    - the distinct entries of n n^T, where n is the direction of smallest extent, times the flatness
      (m - s) / l (6 numbers)
    - the distinct entries of t t^T, where t is the direction of largest extent, times the linearity
      (l - m) / l (6 numbers)
    - the mean of the points, relative to the token's centre (3 numbers)

    The other thirteen numbers are: ten quantiles of the distances from the token's centre to the
    other centres; the height of the token's centre; and its distances from the origin and from the
    up axis.
    """
    return pool(surface(points, num_groups, group_size)[0])


def surface(points: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the 89 numbers of `geometry` for each of M tokens, as a tensor [B, M, 89], and the
    tokens' centres [B, M, 3].
    """
    grouped = group(points, num_groups, group_size)
    centers = grouped.centers.double()
    patches = grouped.patches.double() + centers[:, :, None]
    mean, second = patches.mean(2), (patches.mT @ patches / group_size).flatten(2)
    distance = squared_distance(centers, centers).sqrt()
    near = distance.topk(min(SCALES[-1], num_groups), largest=False).indices
    numbers = []
    for scale in SCALES:
        middle = gather_points(mean, near[..., :scale]).mean(2)
        moment = gather_points(second, near[..., :scale]).mean(2).unflatten(-1, (3, 3))
        values, directions = torch.linalg.eigh(moment - middle[..., None] * middle[..., None, :])
        roots = values.clamp_min(0).sqrt()
        small, medium, large = roots.clamp_min(1e-9).split(1, -1)
        numbers += [(roots.square().sum(-1, keepdim=True) + 1e-6).log()]
        numbers += [roots / (small + medium + large)]
        numbers += [_product(directions[..., 0]) * (medium - small) / large]
        numbers += [_product(directions[..., 2]) * (large - medium) / large]
        numbers += [middle - centers]
    # the first distance is left out: it is 0, from the centre to itself
    others = distance.sort(-1).values[..., 1:]
    levels = torch.linspace(0.05, 0.95, 10, dtype=others.dtype)
    numbers += [others.quantile(levels, -1).movedim(0, -1)]
    numbers += [centers.norm(dim=-1, keepdim=True), centers[..., 2:]]
    numbers += [centers[..., :2].norm(dim=-1, keepdim=True)]
    return torch.cat(numbers, -1), grouped.centers


def _product(direction: Tensor) -> Tensor:
    """Return the six distinct entries of the symmetric matrix d d^T for each direction d.

    direction: (..., 3). Returns (..., 6).
    """
    x, y, z = direction.unbind(-1)
    return torch.stack([x * x, x * y, x * z, y * y, y * z, z * z], -1)
