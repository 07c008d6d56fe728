"""Random numbers, and operators on batched point clouds: sampling, neighbours and distances.

Each operator is written in plain torch, which runs on any device. Only farthest point sampling also
has faster back ends: a compiled function for CPUs and a Triton kernel for GPUs. They return the
same indices, except that the compiled function may choose differently between equal distances.

The letters in shapes stand for numbers: B clouds in the batch, N points per cloud, M queries per
cloud, K neighbours per query, and C channels. `points` is a float tensor [B, N, 3].
"""

import hashlib
import importlib.util
import os
import shutil
from functools import cache
from typing import no_type_check

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jepa3d.frame import farthest_point_sample as numpy_farthest_point_sample
from jepa3d.shapes import Centers, Float, Indices, Int, Points, Tokens

_MAX_PAIRS = 2**26  # how many distances `knn` keeps in memory at once; 256 MiB of float32


class BatchGenerator:
    """Source of random numbers that depend only on (seed, step, stream), not on the number of
    processes.

    Every process draws numbers for the global batch (the rows of all processes) and keeps those of
    its own rows. So several processes together draw the same numbers as one process, a resumed run
    draws the same numbers as an uninterrupted run, and checkpoints need no generator state.

    first: index of this process's first row in the global batch. total: number of rows of the
    global batch, or None if there is only one process. stream: name of the purpose for which the
    numbers are drawn, see the method `stream`.
    """

    def __init__(
        self, seed: int, step: int = 0, first: int = 0, total: int | None = None, stream: str = ""
    ):
        self.seed, self.step, self.first, self.total, self.name = seed, step, first, total, stream
        key = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=7).digest()
        self._key, self._generators = int.from_bytes(key, "big"), {}

    def stream(self, name: str) -> "BatchGenerator":
        """Return an independent generator for one purpose; its use never changes other streams."""
        return BatchGenerator(self.seed, self.step, self.first, self.total, f"{self.name}/{name}")

    def repeated(self, times: int) -> "BatchGenerator":
        """Return a generator for a batch in which each row is repeated `times` times, as by
        `torch.repeat_interleave`.
        """
        total = self.total and self.total * times
        return BatchGenerator(self.seed, self.step, self.first * times, total, self.name)

    def on(self, device: torch.device) -> torch.Generator:
        """Return the underlying torch generator on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._key)
        return self._generators[device]

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw numbers in [0, 1) for this process's rows; shape[0] is how many rows it has."""
        total = self.total or shape[0]
        assert self.first + shape[0] <= total, "more rows than the global batch has"
        whole = torch.rand((total, *shape[1:]), generator=self.on(device), device=device)
        return whole[self.first : self.first + shape[0]]

    def choice(self, count: int) -> int:
        """Draw one integer from 0 to count - 1 for the whole batch, on the CPU."""
        return int(count * uniform_scalar(self))


class RepeatedDraws(BatchGenerator):
    """Keep the random numbers of a step in buffers, so that a recorded CUDA graph of the step can
    be replayed with other numbers (training/graphs.py).

    `redraw` refills the buffers. All streams share two dictionaries. `buffers` maps (name of the
    stream, number of the draw) to the buffer with the numbers of this draw. `choices` maps the name
    of a stream to the argument `count` with which `choice` was last called on it. The graphs need
    `choices`, since the results of `choice` decide the sizes of tensors: each combination of
    results has its own graph.
    """

    def __init__(
        self, seed: int, step: int = 0, stream: str = "", parent: "RepeatedDraws | None" = None
    ):
        super().__init__(seed, step, stream=stream)
        self.buffers: dict[tuple[str, int], Tensor] = parent.buffers if parent else {}
        self.choices: dict[str, int] = parent.choices if parent else {}
        self._count = 0

    def stream(self, name: str) -> "RepeatedDraws":
        return RepeatedDraws(self.seed, self.step, f"{self.name}/{name}", self)

    def repeated(self, times: int) -> "RepeatedDraws":
        return self  # there is one process, which draws as many rows as `shape` says

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        key, self._count = (self.name, self._count), self._count + 1
        if key not in self.buffers:
            self.buffers[key] = super().uniform(shape, device)
        return self.buffers[key]

    def choice(self, count: int) -> int:
        self.choices[self.name] = count
        return super().choice(count)

    def redraw(self, step: int) -> None:
        """Refill all buffers with the numbers that step `step` draws."""
        names = {name for name, _ in self.buffers}
        streams = {name: BatchGenerator(self.seed, step, stream=name) for name in names}
        for (name, _), buffer in self.buffers.items():
            stream = streams[name]
            torch.rand(buffer.shape, generator=stream.on(buffer.device), out=buffer)


def uniform(
    generator: torch.Generator | BatchGenerator | None, shape: tuple[int, ...], device
) -> Tensor:
    """Draw a tensor of numbers in [0, 1); its first axis is the batch.

    generator: None uses torch's global random state.
    """
    device = torch.device(device)
    if isinstance(generator, BatchGenerator):
        return generator.uniform(shape, device)
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


def uniform_scalar(generator: torch.Generator | BatchGenerator | None) -> float:
    """Draw one number in [0, 1) for the whole batch; a `BatchGenerator` draws the same number on
    every process.

    A torch generator draws the number on its own device. Without a generator, the number is drawn
    on the CPU.
    """
    if isinstance(generator, BatchGenerator):
        generator = generator.on(torch.device("cpu"))
    if generator is not None and generator.device.type != "cpu":
        return torch.rand((), generator=generator, device=generator.device).item()
    return torch.rand((), generator=generator, device="cpu").item()


class _SumOverProcesses(torch.autograd.Function):
    """Sum over all processes. In the backward pass the gradients of all processes are summed, since
    every process's loss depends on the result.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, grads[0])


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum x over all processes, with gradient; with only one process, return x."""
    return _SumOverProcesses.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


@cache
def _quickfps():
    """Return the module of the compiled farthest point sampler, or None if it is not installed (pip
    install 'jepa3d[fast]' installs it).
    """
    if importlib.util.find_spec("torch_quickfps") is None:
        return None
    import torch_quickfps

    return torch_quickfps


@cache
def _triton():
    """Return the module of the Triton sampler for GPUs, or None if Triton or the C compiler that it
    needs is missing.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if importlib.util.find_spec("triton") is None or compiler is None:
        return None
    from jepa3d import ops_triton

    return ops_triton


def farthest_point_sample(
    points: Points, num_samples: int, generator: torch.Generator | BatchGenerator | None = None
) -> Int[Tensor, "b m"]:
    """Choose farthest point samples of points [B, N, 3] (Eldar et al. 1997).

    Returns indices [B, num_samples]. Each sample is the point with the largest distance to the
    nearest of the samples before it. With a generator the first sample is random. Without a
    generator it is the point farthest from the centroid, so the samples do not depend on the order
    of points, unless several points tie for the largest distance. In that case torch and Triton
    choose the point with the lowest index, and the compiled back end may choose any of these
    points. Such ties occur on lattices, and in clouds that have fewer different points than
    samples. Raises ValueError unless 1 <= num_samples <= N.
    """
    batch, num_points, _ = points.shape
    if not torch.compiler.is_exporting() and not 1 <= num_samples <= num_points:
        found = f"cannot choose {num_samples} samples of {num_points} points"
        raise ValueError(f"farthest point sampling {found}")
    points = points.detach()
    if generator is None:
        start = (points - points.mean(1, keepdim=True)).square().sum(-1).argmax(1)
    else:
        start = (uniform(generator, (batch,), points.device) * num_points).long()
    if torch.compiler.is_exporting():
        return farthest_point_scan(points, num_samples, start)[0]
    single = points.dtype == torch.float32
    kernel = _triton() if points.is_cuda and single else None
    if kernel and num_points <= kernel.MAX_POINTS:
        return kernel.farthest_point_sample(points, num_samples, start)
    # For fewer than 512 points the batched torch loop is as fast as the compiled function.
    if points.device.type == "cpu" and single and num_points >= 512 and _quickfps():
        return _farthest_point_sample_compiled(points, num_samples, start)
    return _farthest_point_sample_reference(points, num_samples, start)


def sample_one(points: np.ndarray, num_samples: int, start: int) -> np.ndarray:
    """Choose farthest point samples of one float32 cloud [N, 3], with the compiled back end if it
    is installed and the cloud has at least 32 points, else with numpy, which is faster for fewer
    points.

    start: index of the first sample. Returns indices [num_samples].
    """
    if len(points) < 32 or _quickfps() is None:
        return numpy_farthest_point_sample(points, num_samples, start)
    cloud, first = torch.from_numpy(points)[None], torch.tensor([start])
    return _farthest_point_sample_compiled(cloud, num_samples, first)[0].numpy()


def _farthest_point_sample_compiled(points: Points, num_samples: int, start: Tensor) -> Tensor:
    # The compiled function takes one start index for all clouds of a batch. So the start point of
    # each cloud is swapped with row 0 of the cloud, and the returned indices are swapped back. The
    # height of the function's search tree depends on the number of points.
    batch, num_points, _ = points.shape
    rows, height = torch.arange(batch), 3 if num_points <= 4096 else 5 if num_points <= 32768 else 7
    swapped = points.clone(memory_format=torch.contiguous_format)
    swapped[rows, start], swapped[:, 0] = points[:, 0], points[rows, start]
    fast = _quickfps()
    assert fast is not None
    index, start = fast.sample_idx(swapped, num_samples, h=height, start_idx=0), start[:, None]
    return torch.where(index == 0, start, torch.where(index == start, 0, index))


def _farthest_point_sample_reference(points: Points, num_samples: int, start: Tensor) -> Tensor:
    # On a CPU, three contiguous tensors, one per coordinate, are 3-4 times as fast as one tensor
    # [B, N, 3].
    x, y, z = (axis.contiguous() for axis in points.unbind(-1))
    distance = torch.full_like(x, torch.inf)
    picked, current = [], start[:, None]
    for _ in range(num_samples):
        picked.append(current)
        offsets = (x - x.gather(1, current)).square_()
        offsets += (y - y.gather(1, current)).square_()
        offsets += (z - z.gather(1, current)).square_()
        torch.minimum(distance, offsets, out=distance)
        current = distance.argmax(1, keepdim=True)
    return torch.cat(picked, 1)


@no_type_check  # torch.export cannot trace a type check of the inner function
def farthest_point_scan(points: Tensor, num_samples: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Choose farthest point samples with torch's loop operator `scan`, so that an exported graph
    has one repeated step instead of one copy of the step per sample.

    points: [B, N, 3]. start: index of each cloud's first sample, [B]. Returns the indices
    [B, num_samples], and each sample's squared distance from the nearest sample before it (infinite
    for the first).
    """
    from torch._higher_order_ops.scan import scan  # private in torch; only export needs it

    planes = points.transpose(1, 2).contiguous()

    def step(
        state: tuple[Tensor, Tensor], _: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        current, distance = state
        spacing = distance.gather(1, current[:, None])[:, 0]
        x, y, z = (
            (planes - planes.gather(2, current[:, None, None].expand(-1, 3, -1))).square().unbind(1)
        )
        distance = torch.minimum(distance, x + y + z)
        return (distance.argmax(1), distance), (current.clone(), spacing)

    begin = start, torch.full_like(planes[:, 0], torch.inf)
    index, spacing = scan(step, begin, points.new_zeros(num_samples, 1))[1]
    return index.transpose(0, 1), spacing.transpose(0, 1)


def squared_distance(
    a: Float[Tensor, "*#b m 3"], b: Float[Tensor, "*#b n 3"]
) -> Float[Tensor, "*#b m n"]:
    """Compute squared distances (..., M, N) between points (..., M, 3) and (..., N, 3).

    Coordinates are subtracted before they are squared: the faster formula with a matrix product has
    cancellation errors.
    """
    total = (a[..., :, None, 0] - b[..., None, :, 0]).square_()
    for axis in (1, 2):
        total += (a[..., :, None, axis] - b[..., None, :, axis]).square_()
    return total


def knn(query: Float[Tensor, "b m 3"], points: Points, k: int) -> Int[Tensor, "b m k"]:
    """Find the k points [B, N, 3] nearest to each query [B, M, 3].

    Returns indices [B, M, k], nearest first. Raises ValueError unless 1 <= k <= N.
    """
    batch, num_points, _ = points.shape
    if not 1 <= k <= num_points:
        raise ValueError(f"cannot find {k} nearest neighbours in a cloud of {num_points} points")
    rows = max(1, _MAX_PAIRS // (batch * num_points))
    if torch.compiler.is_exporting():
        # no split, since the exported graph must work for any batch size
        rows = query.shape[1]
    query, points = query.detach(), points.detach()
    parts = [
        squared_distance(q, points).topk(k, largest=False).indices for q in query.split(rows, 1)
    ]
    return torch.cat(parts, 1)


def gather_points(values: Float[Tensor, "b n c"], index: Indices) -> Float[Tensor, "b *any c"]:
    """Look up values [B, N, C] at the indices `index` [B, ...]; returns [B, ..., C]."""
    flat = index.flatten(1)
    out = values.gather(1, flat[..., None].expand(-1, -1, values.shape[-1]))
    return out.view(*index.shape, values.shape[-1])


def three_nn_interpolate(
    query: Points, centers: Centers, features: Tokens
) -> Float[Tensor, "b n c"]:
    """Interpolate features [B, M, C] from centers [B, M, 3] to query points [B, N, 3]; returns
    [B, N, C].

    The three nearest centers, or all if there are fewer, are weighted by inverse squared distance
    (PointNet++).
    """
    index = knn(query, centers, min(3, centers.shape[1]))
    distance = (gather_points(centers, index) - query[:, :, None]).square().sum(-1)
    weight = 1 / (distance + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    # The weights are put into a matrix with three entries per row, so that the result is a matrix
    # product, whose gradient is a matrix product too. If three rows of features were gathered
    # instead, the gradient would be a slow scatter.
    dense = weight.new_zeros(*query.shape[:2], centers.shape[1]).scatter_(-1, index, weight)
    return dense.to(features.dtype) @ features


def unit_sphere(points: Points) -> Points:
    """Move each of the clouds [B, N, 3] to centroid 0, and scale it so that its farthest point is
    at distance 1 from the centroid.
    """
    points = points - points.mean(1, keepdim=True)
    radius = points.norm(dim=-1).amax(1)[:, None, None]
    return points / radius.clamp_min(torch.finfo(points.dtype).tiny)


def chamfer_l1(a: Tensor, b: Tensor) -> Tensor:
    """Compute Chamfer-L1 of point sets (B, ..., P, 3) and (B, ..., Q, 3), a scalar.

    This is the mean distance from a point to the nearest point of the other set, averaged over the
    two directions (a to b, b to a).
    """
    one, other = _to_nearest(a, b)
    return (one.norm(dim=-1).mean() + other.norm(dim=-1).mean()) / 2


def chamfer_l2(a: Tensor, b: Tensor) -> Tensor:
    """Compute Chamfer-L2 of point sets (B, ..., P, 3) and (B, ..., Q, 3), a scalar.

    This is the mean squared distance from a point to the nearest point of the other set, summed
    over the two directions (a to b, b to a).
    """
    one, other = _to_nearest(a, b)
    return one.square().sum(-1).mean() + other.square().sum(-1).mean()


def _to_nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Compute, for both sets, each point's offset from the nearest point of the other set.

    Gradients flow through the offsets, but not through the choice of the nearest point.
    """
    with torch.no_grad():
        pairs = squared_distance(a, b)
        of_a, of_b = pairs.argmin(-1).flatten(0, -2), pairs.argmin(-2).flatten(0, -2)
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    return a - gather_points(b, of_a), b - gather_points(a, of_b)
