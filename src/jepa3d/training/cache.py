"""Targets of frozen teachers, computed once a shape before training instead of in every step.

RUN/cache/{centers,patches,tokens}.npy    one row a shape, memory-mapped; dropped when the run is finished
RUN/cache/run.json                        how many batches of shapes are done, and what they cost

A variant, not a shortcut to the same numbers: a shape keeps one grouping for the whole run (its patches are the
same points, moved by each step's augmentation), and the teacher has seen the shape as it is, not augmented.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from rich.progress import track
from torch import Tensor

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.protocol import write_json
from jepa3d.models.teacher import Teacher
from jepa3d.models.tokenizer import groups_at
from jepa3d.ops import farthest_point_sample, gather_points, knn
from jepa3d.training.engine import ON_CPU
from jepa3d.training.progress import cpu_seconds

SAVE_EVERY = 50  # batches
START: dict[str, Any] = {"batches": 0, "cost": {"cpu_seconds": 0.0, "wall_seconds": 0.0}}


class CachedTargets:
    """Called with an index (n), gives point indices of centers n M and patches n M K, and teacher tokens n M E."""

    def __init__(self, config: PretrainConfig, num_shapes: int, width: int, folder: Path | None):
        """Arrays in `folder`, made where there are none; None: in memory. ValueError where the disk is too small."""
        encoder, self.folder = config.encoder, folder
        rows, whole = (num_shapes, encoder.num_groups), np.uint16 if encoder.num_points <= 2**16 else np.int32
        layout = {
            "centers": (rows, whole),
            "patches": ((*rows, encoder.group_size), whole),
            "tokens": ((*rows, width), np.float16),
        }
        if folder is None:
            self.arrays: list[np.ndarray] = [np.empty(shape, dtype) for shape, dtype in layout.values()]
            return
        state = PartialState(cpu=ON_CPU)
        if state.is_main_process and not (folder / "run.json").exists():
            folder.mkdir(exist_ok=True)
            needed = sum(np.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
            if needed > (free := shutil.disk_usage(folder).free):
                raise ValueError(f"{folder}: the targets need {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB")
            print(f"targets of {num_shapes:,} shapes: {needed / 1e6:,.0f} MB in {folder}", flush=True)
            for name, (shape, dtype) in layout.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
            write_json(folder / "run.json", START)
        state.wait_for_everyone()
        self.arrays = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in layout]

    def __call__(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        centers, patches, tokens = (array[index] for array in self.arrays)
        return torch.from_numpy(centers.astype(int)), torch.from_numpy(patches.astype(int)), torch.from_numpy(tokens)

    @torch.no_grad()
    def fill(self, teacher: Teacher, clouds: PointClouds, config: PretrainConfig) -> None:
        """Ask the teacher about every shape, in random batches, as its targets may be normalised over a batch.

        Goes on where it was interrupted. Processes share each batch, and so the folder.
        """
        state, size, count = PartialState(cpu=ON_CPU), config.batch_size, len(clouds)
        total, encoder, teacher = -(-count // size), config.encoder, teacher.to(state.device)
        order = np.resize(np.random.default_rng(config.seed).permutation(count), total * size)
        share = size // state.num_processes
        rows = slice(state.process_index * share, (state.process_index + 1) * share)
        record = json.loads((self.folder / "run.json").read_text()) if self.folder else START
        before, cpu, wall = record["cost"], cpu_seconds(), time.perf_counter()
        shown = state.is_main_process and record["batches"] < total
        for batch in track(range(record["batches"], total), "targets of the frozen teachers", disable=not shown):
            index = order[batch * size : (batch + 1) * size][rows]
            points = clouds.batch(index).to(state.device)
            centers = farthest_point_sample(points, encoder.num_groups)
            patches = knn(gather_points(points, centers), points, encoder.group_size)
            grouped = groups_at(points, centers, patches)
            tokens = teacher(grouped.patches, grouped.centers)
            for array, values in zip(self.arrays, (centers, patches, tokens), strict=True):
                array[index] = values.cpu().numpy()
            if self.folder and ((batch + 1) % SAVE_EVERY == 0 or batch + 1 == total):
                for array in self.arrays:
                    cast(np.memmap, array).flush()
                state.wait_for_everyone()
                if state.is_main_process:
                    spent = {"cpu_seconds": cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall}
                    cost = {name: before[name] + value for name, value in spent.items()}
                    write_json(self.folder / "run.json", {"batches": batch + 1, "cost": cost})
        state.wait_for_everyone()
