"""Farthest point sampling on a GPU as one Triton kernel, which is faster than the torch loop of
ops.py: that loop launches more than ten kernels per sampled point.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest number of points of a cloud. Registers hold the coordinates and distances of all
# points of a cloud; more points than this would not fit.
MAX_POINTS = 16384


@triton.jit
def _sample(points, start, index, num_points, num_samples: tl.constexpr, BLOCK: tl.constexpr):
    cloud = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    real = place < num_points
    points += cloud * num_points * 3
    index += cloud * num_samples
    x = tl.load(points + 3 * place, mask=real, other=0.0)
    y = tl.load(points + 3 * place + 1, mask=real, other=0.0)
    z = tl.load(points + 3 * place + 2, mask=real, other=0.0)
    distance = tl.where(real, float("inf"), -1.0)  # -1, so that padding is never the farthest
    current = tl.load(start + cloud).to(tl.int32)
    for i in range(num_samples):
        tl.store(index + i, current.to(tl.int64))
        dx = x - tl.load(points + 3 * current)
        dy = y - tl.load(points + 3 * current + 1)
        dz = z - tl.load(points + 3 * current + 2)
        distance = tl.minimum(distance, dx * dx + dy * dy + dz * dz)
        current = tl.argmax(distance, 0)  # at equal distances, the lowest index, as in torch


def farthest_point_sample(points: Tensor, num_samples: int, start: Tensor) -> Tensor:
    """Choose farthest point samples of points [B, N, 3] (float32, on a GPU, N at most
    `MAX_POINTS`).

    start: index of each cloud's first sample, [B]. Returns the indices [B, num_samples] that the
    torch loop would return: products and sums are not fused, so distances are rounded in the same
    way.
    """
    batch, num_points, _ = points.shape
    index = torch.empty(batch, num_samples, dtype=torch.long, device=points.device)
    block = triton.next_power_of_2(num_points)
    warps = min(32, max(1, block // 256))
    # Triton launches kernels on the current device, which may be another GPU.
    with torch.get_device_module(points.device).device(points.device):
        _sample[(batch,)](
            points.contiguous(),
            start,
            index,
            num_points,
            num_samples,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return index
