"""Helpers that several benchmarks share: flags, a description of the machine and the peak speed of
its matrix products (GEMM peak), FLOP counts, random clouds, and a training step.
"""

import argparse
import math
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.data.transforms import augment
from jepa3d.ops import BatchGenerator, unit_sphere
from jepa3d.training.engine import compile_blocks
from jepa3d.training.graphs import Repeated, can_repeat
from jepa3d.training.optim import adamw
from jepa3d.training.pretrain import make_task, with_cache

ATTENTION = {  # FLOP counts of attention on a CPU, since torch counts attention only on CUDA
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def labelled_arguments(text: str | None) -> argparse.ArgumentParser:
    """Return a parser for a benchmark on labelled shapes; its help starts with `text`."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=kind)
    parser.add_argument("data")
    parser.add_argument("--labels-key", default="labels")
    parser.add_argument("--up-axis", default="z")
    return parser


def count_flops() -> FlopCounterMode:
    """Return a context manager whose `get_total_flops()` counts the FLOPs of matrix products,
    convolutions and attention.
    """
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


def machine() -> str:
    """Describe the processor, cores, threads, torch version and date of a measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine()
    )
    threads = torch.get_num_threads()
    return f"{cpu}, {os.cpu_count()} cores, threads: {threads}, torch {torch.__version__}, {date.today()}"


def gemm_peak(size: int = 2048, tries: int = 5) -> float:
    """Multiply two fp32 matrices some times; returns the FLOP/s of the fastest product."""
    a, out, best = torch.randn(size, size), torch.empty(size, size), math.inf
    for _ in range(tries):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def random_clouds(batch: int, points: int) -> Tensor:
    """Make clouds [batch, points, 3] of normally distributed points, the same at every call."""
    return unit_sphere(torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(0)))


class Training:
    """The pretraining of jepa3d in one process.

    A call with points B N 3 takes one training step, as training/loop.py does, and returns the
    loss.
    """

    def __init__(
        self, config: PretrainConfig, objective: str = "jepa", where: torch.device | None = None
    ):
        # Only 32 clouds calibrate BatchNorm, so that calibration doesn't determine peak memory.
        self.clouds = PointClouds(
            "random", "", random_clouds(32, config.encoder.num_points).numpy()
        )
        self.config = config
        self.task = with_cache(
            make_task(config, objective, self.clouds, {}), self.clouds, config, None
        )
        self.where = where or torch.device("cpu")
        self.model = self.task.objective.train().to(self.where)
        if config.compile == "yes":
            compile_blocks(self.model)
        self.repeated = (
            Repeated(self.one_pass, self.model) if can_repeat(config, 1, self.where) else None
        )
        self.optimizer, self.number = adamw(self.model, self.task.schedule), 0

    def __call__(self, points: Tensor) -> Tensor:
        generator = BatchGenerator(self.config.seed, self.number)
        output = (self.repeated or self.one_pass)(points, generator)
        self.update()
        self.number += 1
        return output.loss.detach()

    def one_pass(self, points: Tensor, generator: BatchGenerator) -> Any:
        """Run the forward and the backward pass."""
        config, task = self.config, self.task
        if task.augments:
            points = augment(points, config.scale, config.rotate, config.translate, generator)
        # Clouds beyond the 32nd use the cached targets of the first 32; reading takes equally long.
        targets = task.targets(np.arange(len(points)) % len(self.clouds)) if task.targets else ()
        with torch.autocast(
            self.where.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16"
        ):
            output = self.model(points, generator, 0.0, *targets)
        output.loss.backward()
        return output

    def update(self) -> None:
        """Clip the gradients, take an AdamW step, and update the moving average of the teacher."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.task.schedule.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step(0.0)
