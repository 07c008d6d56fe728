"""Sampling and neighbourhood operators on batched point clouds.

Each has one plain torch reference that runs on any device. A faster back end is chosen in exactly
one place, `farthest_point_sample`, and returns the same indices.

Axes: B batch, N points, M queries, K neighbours, C channels. `points` is float B N 3.
"""

import hashlib
import importlib.util
import os
import shutil
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jepa3d.frame import farthest_point_sample as numpy_farthest_point_sample

_MAX_PAIRS = 2**26  # distances held at once by `knn`: 256 MiB of float32


class BatchGenerator:
    """Random draws for one process's rows of a global batch.

    Every draw is made for the whole batch from (seed, step, stream) and cut to this process's rows.
    So P processes together draw what one process would, a resumed run draws what an uninterrupted
    one would, and a checkpoint has no generator state to keep.
    """

    def __init__(
        self, seed: int, step: int = 0, first: int = 0, total: int | None = None, stream: str = ""
    ):
        self.seed, self.step, self.first, self.total, self.name = seed, step, first, total, stream
        key = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=7).digest()
        self._key, self._generators = int.from_bytes(key, "big"), {}

    def stream(self, name: str) -> "BatchGenerator":
        """An independent generator for one use, so that one use's draws never shift another's."""
        return BatchGenerator(self.seed, self.step, self.first, self.total, f"{self.name}/{name}")

    def repeated(self, times: int) -> "BatchGenerator":
        """A generator for the batch in which each row is repeated `times` times, copies side by
        side.
        """
        total = self.total and self.total * times
        return BatchGenerator(self.seed, self.step, self.first * times, total, self.name)

    def on(self, device: torch.device) -> torch.Generator:
        """The underlying generator, which lives where its draws are needed."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._key)
        return self._generators[device]

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """This process's rows, `shape`, of draws in [0, 1) for the whole batch."""
        total = self.total or shape[0]
        assert self.first + shape[0] <= total, "more rows than the global batch has"
        whole = torch.rand((total, *shape[1:]), generator=self.on(device), device=device)
        return whole[self.first : self.first + shape[0]]

    def choice(self, count: int) -> int:
        """A whole number below `count`, one for the whole batch; made on the CPU."""
        return int(count * uniform_scalar(self))


class RepeatedDraws(BatchGenerator):
    """Draws in buffers that `redraw` fills anew, so that a recorded step (training/graphs.py) can
    be repeated.

    All its streams share `buffers`, (stream, shape) in the order of their first use, and `choices`.
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
        return self

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        key, self._count = (self.name, self._count), self._count + 1
        if key not in self.buffers:
            self.buffers[key] = super().uniform(shape, device)
        return self.buffers[key]

    def choice(self, count: int) -> int:
        self.choices[self.name] = count
        return super().choice(count)

    def redraw(self, step: int) -> None:
        """The draws of another step into the buffers."""
        streams: dict[str, BatchGenerator] = {}
        for (name, _), buffer in self.buffers.items():
            stream = streams.setdefault(name, BatchGenerator(self.seed, step, stream=name))
            torch.rand(buffer.shape, generator=stream.on(buffer.device), out=buffer)


def uniform(
    generator: torch.Generator | BatchGenerator | None, shape: tuple[int, ...], device
) -> Tensor:
    """Uniform draws in [0, 1) of `shape` whose first axis is the batch.

    None draws from torch's own state.
    """
    device = torch.device(device)
    if isinstance(generator, BatchGenerator):
        return generator.uniform(shape, device)
    made_on = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=made_on).to(device)


def uniform_scalar(generator: torch.Generator | BatchGenerator | None) -> float:
    """One uniform draw shared by the whole batch, the same on every process; made on the CPU."""
    if isinstance(generator, BatchGenerator):
        generator = generator.on(torch.device("cpu"))
    if generator is not None and generator.device.type != "cpu":
        return torch.rand((), generator=generator, device=generator.device).item()
    return torch.rand((), generator=generator, device="cpu").item()


class _SumOverProcesses(torch.autograd.Function):
    """All-reduced sum; so is its gradient, since every process's loss depends on it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, grads[0])


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's x, with gradient; x itself on a single process."""
    return _SumOverProcesses.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


@cache
def _quickfps():
    """The compiled farthest point sampler of the `fast` extra, or None."""
    if importlib.util.find_spec("torch_quickfps") is None:
        return None
    import torch_quickfps

    return torch_quickfps


@cache
def _triton():
    """The sampler as one kernel on a GPU, where there is Triton and the C compiler that it needs;
    or None.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if importlib.util.find_spec("triton") is None or compiler is None:
        return None
    from jepa3d import ops_triton

    return ops_triton


def farthest_point_sample(
    points: Tensor, num_samples: int, generator: torch.Generator | BatchGenerator | None = None
) -> Tensor:
    """Indices B num_samples of points each farthest from those before it (Eldar et al. 1997).

    Without a generator the first is the point farthest from the centroid, whatever the order of the
    points; with one it is a random point. Of equally far points the reference takes the lowest
    index, the compiled back end any (lattices; clouds with duplicates beyond their distinct
    points).
    """
    batch, num_points, _ = points.shape
    if not torch.compiler.is_exporting() and not 1 <= num_samples <= num_points:
        raise ValueError(
            f"farthest point sampling: {num_samples} samples asked of {num_points} points"
        )
    points = points.detach()
    if generator is None:
        start = (points - points.mean(1, keepdim=True)).square().sum(-1).argmax(1)
    else:
        start = (uniform(generator, (batch,), points.device) * num_points).long()
    if torch.compiler.is_exporting():
        return farthest_point_scan(points, num_samples, start)[0]
    if (
        points.is_cuda
        and points.dtype == torch.float32
        and (kernel := _triton())
        and num_points <= kernel.MAX_POINTS
    ):
        return kernel.farthest_point_sample(points, num_samples, start)
    # Below some hundred points the batched loop is as fast.
    wanted = points.device.type == "cpu" and points.dtype == torch.float32 and num_points >= 512
    sample = (
        _farthest_point_sample_compiled
        if wanted and _quickfps()
        else _farthest_point_sample_reference
    )
    return sample(points, num_samples, start)


def sample_one(points: np.ndarray, num_samples: int, start: int) -> np.ndarray:
    """Indices of `farthest_point_sample` for one cloud N 3 float32; by numpy where there is no
    compiled back end.
    """
    if len(points) < 32 or _quickfps() is None:
        return numpy_farthest_point_sample(points, num_samples, start)
    first = torch.tensor([start])
    return _farthest_point_sample_compiled(torch.from_numpy(points)[None], num_samples, first)[
        0
    ].numpy()


def _farthest_point_sample_compiled(points: Tensor, num_samples: int, start: Tensor) -> Tensor:
    # The kernel takes a batch but one start for all: each cloud's own is swapped to its row 0 and
    # back.
    batch, num_points, _ = points.shape
    rows, height = torch.arange(batch), 3 if num_points <= 4096 else 5 if num_points <= 32768 else 7
    swapped = points.clone(memory_format=torch.contiguous_format)
    swapped[rows, start], swapped[:, 0] = points[:, 0], points[rows, start]
    fast = _quickfps()
    assert fast is not None
    index, start = fast.sample_idx(swapped, num_samples, h=height, start_idx=0), start[:, None]
    return torch.where(index == 0, start, torch.where(index == start, 0, index))


def _farthest_point_sample_reference(points: Tensor, num_samples: int, start: Tensor) -> Tensor:
    # Three contiguous coordinate arrays: 3-4 times faster on a CPU than one strided B N 3 tensor.
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


def farthest_point_scan(points: Tensor, num_samples: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, as one step that an exported graph repeats instead of a thousand copies of
    it.

    Returns the indices B num_samples, and of each its squared distance from those before it
    (infinite for the first).
    """
    from torch._higher_order_ops.scan import scan  # private in torch, and only export needs it

    planes = points.transpose(1, 2).contiguous()

    def step(
        state: tuple[Tensor, Tensor], _: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        current, distance = state
        apart = distance.gather(1, current[:, None])[:, 0]
        x, y, z = (
            (planes - planes.gather(2, current[:, None, None].expand(-1, 3, -1))).square().unbind(1)
        )
        distance = torch.minimum(distance, x + y + z)
        return (distance.argmax(1), distance), (current.clone(), apart)

    begin = start, torch.full_like(planes[:, 0], torch.inf)
    index, apart = scan(step, begin, points.new_zeros(num_samples, 1))[1]
    return index.transpose(0, 1), apart.transpose(0, 1)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (..., M, N) of (..., M, 3) and (..., N, 3), without the cancellation of the
    matmul form.
    """
    total = (a[..., :, None, 0] - b[..., None, :, 0]).square_()
    for axis in (1, 2):
        total += (a[..., :, None, axis] - b[..., None, :, axis]).square_()
    return total


def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices B M k of the k points nearest to each query (B M 3), nearest first."""
    batch, num_points, _ = points.shape
    if not 1 <= k <= num_points:
        raise ValueError(f"nearest neighbours: k = {k}, but a cloud has {num_points} points")
    # An exported graph holds for any batch, so nothing in it may be split by the batch's size.
    rows = (
        query.shape[1]
        if torch.compiler.is_exporting()
        else max(1, _MAX_PAIRS // (batch * num_points))
    )
    query, points = query.detach(), points.detach()
    parts = [
        squared_distance(q, points).topk(k, largest=False).indices for q in query.split(rows, 1)
    ]
    return torch.cat(parts, 1)


def gather_points(values: Tensor, index: Tensor) -> Tensor:
    """values (B N C) at index (B ...) as (B ... C)."""
    flat = index.flatten(1)
    out = values.gather(1, flat[..., None].expand(-1, -1, values.shape[-1]))
    return out.view(*index.shape, values.shape[-1])


def three_nn_interpolate(query: Tensor, centers: Tensor, features: Tensor) -> Tensor:
    """Features B M C of centers (B M 3) at query (B N 3): three nearest, inverse squared distance
    (PointNet++).
    """
    index = knn(query, centers, 3)
    distance = (gather_points(centers, index) - query[:, :, None]).square().sum(-1)
    weight = 1 / (distance + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    # As a product with a matrix of three entries a row: its gradient is a product too, not a
    # scatter.
    dense = weight.new_zeros(*query.shape[:2], centers.shape[1]).scatter_(-1, index, weight)
    return dense.to(features.dtype) @ features


def unit_sphere(points: Tensor) -> Tensor:
    """Points B N 3 moved to centroid 0 and scaled so that the farthest one lies at distance 1."""
    points = points - points.mean(1, keepdim=True)
    radius = points.norm(dim=-1).amax(1)[:, None, None]
    return points / radius.clamp_min(torch.finfo(points.dtype).tiny)


def chamfer_l1(a: Tensor, b: Tensor) -> Tensor:
    """Chamfer-L1 of point sets (B, ..., P, 3) and (B, ..., Q, 3): half the sum of mean nearest
    distances each way.
    """
    one, other = _to_nearest(a, b)
    return (one.norm(dim=-1).mean() + other.norm(dim=-1).mean()) / 2


def chamfer_l2(a: Tensor, b: Tensor) -> Tensor:
    """Chamfer-L2 of point sets (B, ..., P, 3) and (B, ..., Q, 3): mean squared nearest distances,
    both ways summed.
    """
    one, other = _to_nearest(a, b)
    return one.square().sum(-1).mean() + other.square().sum(-1).mean()


def _to_nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of each point to the nearest of the other set; neighbours carry no gradient,
    distances to them do.
    """
    with torch.no_grad():
        pairs = squared_distance(a, b)
        of_a, of_b = pairs.argmin(-1).flatten(0, -2), pairs.argmin(-2).flatten(0, -2)
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    return a - gather_points(b, of_a), b - gather_points(a, of_b)
