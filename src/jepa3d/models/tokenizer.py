"""Group points into patches, by farthest point sampling and nearest neighbours, and encode each
patch as a token, with a light PointNet.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.ops import BatchGenerator, farthest_point_sample, gather_points, knn, sum_over_processes
from jepa3d.shapes import Float, Int, Points, Rows


class Groups(NamedTuple):
    centers: Tensor  # B M 3
    patches: Tensor  # B M K 3, each relative to its centre
    index: Tensor  # B M K, indices of each patch's points


def group(
    points: Points,
    num_groups: int,
    group_size: int,
    generator: torch.Generator | BatchGenerator | None = None,
) -> Groups:
    """Group points [B, N, 3] into patches (the paper's section III-B): choose centres by farthest
    point sampling, then take the points nearest to each centre.

    num_groups: patches per cloud (M). group_size: points per patch (K). generator: chooses a random
    first centre; if it is None, the first centre is the point farthest from the centroid. Raises
    ValueError if a cloud has fewer points than `num_groups` or `group_size`.
    """
    num_points = points.shape[1]
    if num_points < max(num_groups, group_size):
        raise ValueError(
            f"a cloud of {num_points} points cannot give {num_groups} patches of {group_size} points: "
            f"num_groups and group_size must not exceed the number of points"
        )
    chosen = farthest_point_sample(points, num_groups, generator)
    return groups_at(points, chosen, knn(gather_points(points, chosen), points, group_size))


def groups_at(points: Points, centers: Int[Tensor, "b m"], index: Int[Tensor, "b m k"]) -> Groups:
    """Group points [B, N, 3] into patches whose centres and points were chosen before.

    centers: indices of the centres, [B, M]. index: indices of each patch's points, [B, M, K].
    """
    at = gather_points(points, centers)
    return Groups(at, gather_points(points, index) - at[:, :, None], index)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over rows [n, C]. In training it computes statistics over the rows of all
    processes. (Torch's SyncBatchNorm does this too, but does not run on a CPU.)

    Each process is weighted by its number of rows, so the result equals that of one process with
    all rows. If `synchronised` is False, each process uses only its own rows.
    """

    synchronised = True

    def forward(self, input: Rows) -> Rows:
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)
        if alone or not self.training or not self.synchronised:
            return super().forward(input)
        x = input.float()  # half precision is too coarse for sums over many rows
        rows = torch.full((1,), float(len(x)), device=x.device, dtype=x.dtype)
        sums = sum_over_processes(torch.cat([x.sum(0), rows]))
        mean = sums[:-1] / sums[-1]
        variance = sum_over_processes((x - mean).square().sum(0)) / sums[-1]
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            step = (
                self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            )
            self.running_mean.lerp_(mean, step)
            self.running_var.lerp_(variance * (sums[-1] / (sums[-1] - 1)), step)
        out = (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return out.to(input.dtype)

    def fold_into_linear(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Fold this BatchNorm, in evaluation mode, into the linear layer before it.

        weight, bias: those of the linear layer. Returns the weight and bias of one linear layer
        that replaces both layers.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return weight * scale[:, None], (bias - self.running_mean) * scale + self.bias


class PatchTokenizer(nn.Module):
    """The light PointNet of Point-BERT, which encodes a patch as a token.

    Every point goes through two layers of widths 3 -> w (BN, ReLU) -> 2w. The maximum over the
    patch is then joined to the features of every point, and two more layers follow: 4w -> 4w (BN,
    ReLU) -> C. The maximum of their outputs over the patch is the token. embed_dim: C. hidden_dim:
    w.

    Three exact rewrites halve the cost; the stored weights are the same as without them. (1) Let x
    be the features of a point, g the joined maximum and [Wg Wx] the matrix of `linear3`. Then
    `linear3` computes Wg g + Wx x, so Wg g is computed once per patch instead of once per point.
    (2) No nonlinearity lies between `linear2` (matrix W2) and Wx, so one matrix, Wx W2, replaces
    both. (3) The biases of `linear2` and `linear4` are added after the maximum instead of before.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 128):
        super().__init__()
        self.linear1 = nn.Linear(3, hidden_dim)
        self.norm1 = BatchNorm(hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.linear3 = nn.Linear(4 * hidden_dim, 4 * hidden_dim)
        self.norm3 = BatchNorm(4 * hidden_dim)
        self.linear4 = nn.Linear(4 * hidden_dim, embed_dim)

    def forward(self, patches: Float[Tensor, "*rest k 3"]) -> Float[Tensor, "*rest c"]:
        """Encode patches (..., K, 3) as tokens (..., C)."""
        lead, size = patches.shape[:-2], patches.shape[-2]
        first = (self.linear1.weight, self.linear1.bias)
        second = (self.linear3.weight, self.linear3.bias)
        # In evaluation mode, each BatchNorm is folded into the linear layer before it.
        if not self.norm1.training:
            first = self.norm1.fold_into_linear(*first)
            second = self.norm3.fold_into_linear(*second)
        local = F.linear(patches.reshape(-1, 3), *first)
        local = F.relu(self.norm1(local) if self.norm1.training else local, inplace=True).unflatten(
            0, (-1, size)
        )
        highest = F.linear(local, self.linear2.weight).amax(1) + self.linear2.bias
        to_global, to_local = second[0].chunk(2, 1)
        folded = F.linear(local, to_local @ self.linear2.weight)
        shift = F.linear(highest, to_global, second[1]) + to_local @ self.linear2.bias
        hidden = folded.add_(shift[:, None]).flatten(0, 1)
        hidden = F.relu(self.norm3(hidden) if self.norm3.training else hidden, inplace=True)
        out = F.linear(hidden.unflatten(0, (-1, size)), self.linear4.weight)
        return (out.amax(1) + self.linear4.bias).view(*lead, -1)
