"""Targets of frozen teachers, computed once a shape before training instead of in every step.

RUN/cache/{centers,patches,tokens}.npy    one row a shape, memory-mapped; dropped when the run is finished
RUN/cache/checksum.npy                    of each shape's row of the three
RUN/cache/run.json                        how many batches of shapes are done, and what they cost

A variant, not a shortcut to the same numbers: a shape keeps one grouping for the whole run (its
patches are the same points, moved by each step's augmentation), and the teacher has seen the shape
as it is, not augmented.
"""

import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from rich.progress import track
from torch import Tensor

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.models.teacher import Teacher
from jepa3d.models.tokenizer import groups_at
from jepa3d.ops import farthest_point_sample, gather_points, knn
from jepa3d.plain import log, naming, read_checked, write_checked
from jepa3d.training.engine import ON_CPU
from jepa3d.training.loop import Interrupted, batch_index
from jepa3d.training.progress import cpu_seconds

SAVE_EVERY = 20  # batches
START: dict[str, Any] = {"batches": 0, "cost": {"cpu_seconds": 0.0, "wall_seconds": 0.0}}


def columns(
    config: PretrainConfig, num_shapes: int, width: int
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of the targets of `num_shapes` shapes by a teacher of that
    width.
    """
    encoder = config.encoder
    rows = (num_shapes, encoder.num_groups)
    whole = np.uint16 if encoder.num_points <= 2**16 else np.int32
    return {
        "centers": (rows, whole),
        "patches": ((*rows, encoder.group_size), whole),
        "tokens": ((*rows, width), np.float16),
        "checksum": ((num_shapes,), np.uint32),
    }


def num_bytes(arrays: dict[str, tuple[tuple[int, ...], type]]) -> int:
    return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in arrays.values())


def check_space(config: PretrainConfig, num_shapes: int, width: int, out: Path) -> None:
    """ValueError where the disk of a run that does not exist yet cannot hold its targets."""
    needed = num_bytes(columns(config, num_shapes, width))
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        raise ValueError(
            f"target.cache needs {needed / 1e9:.1f} GB in {out}, the disk has {free / 1e9:.1f} GB"
        )


class CachedTargets:
    """Called with an index (n), gives point indices of centers n M and patches n M K, and teacher
    tokens n M E.
    """

    def __init__(self, config: PretrainConfig, num_shapes: int, width: int, folder: Path | None):
        """Arrays in `folder`, or in memory for a dry run (None)."""
        self.folder, self.columns = folder, columns(config, num_shapes, width)
        self.arrays = (
            [] if folder else [np.zeros(shape, kind) for shape, kind in self.columns.values()]
        )

    def __call__(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        centers, patches, tokens, _ = (array[index] for array in self.arrays)
        return (
            torch.from_numpy(centers.astype(int)),
            torch.from_numpy(patches.astype(int)),
            torch.from_numpy(tokens),
        )

    @torch.no_grad()
    def fill(self, teacher: Teacher, clouds: PointClouds, config: PretrainConfig) -> None:
        """Ask the teacher about every shape, in random batches, as its targets may be normalised
        over a batch.

        Goes on where it was interrupted. Processes share each batch; the first one writes. Raises
        Interrupted.
        """
        state, size, count = PartialState(cpu=ON_CPU), config.batch_size, len(clouds)
        if state.is_main_process:
            self._open(
                lambda batch: batch_index(config.seed, batch, size, count, clouds.shard_sizes)
            )
        state.wait_for_everyone()  # how far it is, is known
        record = self._record()
        before, cpu, wall = record["cost"], cpu_seconds(), time.perf_counter()
        teacher = teacher.to(state.device)
        share = size // state.num_processes
        total = -(-count // size)
        rows = slice(state.process_index * share, (state.process_index + 1) * share)
        todo = range(record["batches"], total)
        state.wait_for_everyone()  # all have read it
        try:
            for batch in track(
                todo, "targets of the frozen teachers", disable=not (todo and state.is_main_process)
            ):
                index = batch_index(config.seed, batch, size, count, clouds.shard_sizes)
                points = clouds.batch(index[rows]).to(state.device)
                centers = farthest_point_sample(points, config.encoder.num_groups)
                patches = knn(gather_points(points, centers), points, config.encoder.group_size)
                grouped = groups_at(points, centers, patches)
                found = gather([centers, patches, teacher(grouped.patches, grouped.centers)])
                if state.is_main_process:
                    for array, values in zip(self.arrays, found, strict=False):
                        array[index] = values.cpu().numpy()
                    self.arrays[-1][index] = self._checksums(index)
                    if self.folder and ((batch + 1) % SAVE_EVERY == 0 or batch + 1 == total):
                        for array in self.arrays:
                            cast(np.memmap, array).flush()
                        spent = {
                            "cpu_seconds": cpu_seconds() - cpu,
                            "wall_seconds": time.perf_counter() - wall,
                        }
                        cost = {name: before[name] + value for name, value in spent.items()}
                        write_checked(
                            self.folder / "run.json", {"batches": batch + 1, "cost": cost}
                        )
        except KeyboardInterrupt as stop:
            raise Interrupted(
                "stopped while the teachers were asked, saved every few batches"
            ) from stop
        state.wait_for_everyone()
        if todo and state.is_main_process:
            megabytes, seconds = num_bytes(self.columns) / 1e6, time.perf_counter() - wall
            log.info(f"targets of {count:,} shapes: {megabytes:,.1f} MB, asked in {seconds:.1f} s")
        # Only now: what another machine wrote is seen by whoever opens the file after it.
        if self.folder:
            self.arrays = [
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.columns
            ]

    def _checksums(self, index: np.ndarray) -> list[int]:
        """Of each shape's centers, patches and tokens, which a damaged row does not have."""
        crc = np.zeros(len(index), np.uint32).tolist()
        for array in self.arrays[:-1]:
            crc = [
                zlib.crc32(row.tobytes(), before)
                for row, before in zip(array[index], crc, strict=True)
            ]
        return crc

    def _record(self) -> dict[str, Any]:
        """How many batches are done, and what they cost. Raises ValueError where it is damaged."""
        record = self.folder and self.folder / "run.json"
        return read_checked(record) if record and record.exists() else START

    def _open(self, index_of: Callable[[int], np.ndarray]) -> None:
        """Make or open the arrays; the targets of damaged ones, which are named, will be computed
        again.
        """
        if self.folder is None:
            return
        try:
            done = self._record()["batches"]
            self.arrays = [
                np.load(self.folder / f"{name}.npy", mmap_mode="r+")
                for name in self.columns
                if done
            ]
            for batch in range(done):
                index = index_of(batch)
                if (self.arrays[-1][index] != self._checksums(index)).any():
                    raise ValueError(f"the targets of batch {batch} are not those written")
            if done:
                return
        except (OSError, ValueError, EOFError) as error:
            log.info(f"{self.folder}: damaged ({error}); its targets are computed again")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.arrays = []
        for name, (shape, kind) in self.columns.items():
            path = self.folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", kind, shape).flush()
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                with naming(path), path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            self.arrays.append(np.load(path, mmap_mode="r+"))
