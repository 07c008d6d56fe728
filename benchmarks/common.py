"""What the benchmarks share: the machine's name and its GEMM peak, counted FLOPs, random clouds."""

import math
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from jepa3d.ops import unit_sphere

ATTENTION = {  # on a CPU; torch counts that of CUDA only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def count_flops() -> FlopCounterMode:
    """A context whose `get_total_flops()` are those executed by matrix products, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


def machine() -> str:
    """Processor, cores, threads, torch and date of a measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{cpu}, {os.cpu_count()} cores, threads: {threads}, torch {torch.__version__}, {date.today()}"


def gemm_peak(size: int = 2048, tries: int = 5) -> float:
    """FLOP/s of the best of some fp32 products."""
    a, out, best = torch.randn(size, size), torch.empty(size, size), math.inf
    for _ in range(tries):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def random_clouds(batch: int, points: int) -> Tensor:
    return unit_sphere(torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(0)))
