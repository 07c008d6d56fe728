"""Targets of frozen teachers, computed once a shape before training instead of in every step.

RUN/cache/targets.npy    a row a shape, memory-mapped; dropped when the run is finished
RUN/cache/run.json       how many batches of shapes are done, and what they cost

A variant, not a shortcut to the same numbers: a shape keeps one grouping for the whole run (its
patches are the same points, moved by each step's augmentation), and the teacher has seen the shape
as it is, not augmented.
"""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.models.teacher import Teacher
from jepa3d.models.tokenizer import groups_at
from jepa3d.ops import farthest_point_sample, gather_points, knn
from jepa3d.plain import log, naming, progress_bar, read_checked, write_checked
from jepa3d.training.engine import ON_CPU
from jepa3d.training.loop import Interrupted, batch_index
from jepa3d.training.progress import clock, spent_since

SAVE_EVERY = 20  # batches
FIELDS = ("centers", "patches", "tokens")


def row_type(config: PretrainConfig, width: int) -> np.dtype:
    """What is kept of a shape: indices of the points of centers M and patches M K, tokens M E of a
    teacher of that width, and a checksum of the three.
    """
    encoder = config.encoder
    number = np.uint16 if encoder.num_points <= 2**16 else np.int32
    sizes = (), (encoder.group_size,), (width,)
    kinds = zip(FIELDS, (number, number, np.float16), sizes, strict=True)
    fields = [(name, kind, (encoder.num_groups, *size)) for name, kind, size in kinds]
    return np.dtype([*fields, ("checksum", np.uint32)])


def check_space(config: PretrainConfig, num_shapes: int, width: int, out: Path) -> None:
    """ValueError where the disk of a run that does not exist yet cannot hold its targets."""
    needed = num_shapes * row_type(config, width).itemsize
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        found = f"the disk has {free / 1e9:.1f} GB"
        raise ValueError(f"target.cache needs {needed / 1e9:.1f} GB in {out}, {found}")


class CachedTargets:
    """Called with an index (n), gives point indices of centers n M and patches n M K, and teacher
    tokens n M E.
    """

    def __init__(self, config: PretrainConfig, num_shapes: int, width: int, folder: Path | None):
        """Rows in `folder`, or in memory for a dry run (None)."""
        self.folder, self.file = folder, folder and folder / "targets.npy"
        self.num_shapes, self.kind = num_shapes, row_type(config, width)
        self.rows = np.zeros(0 if folder else num_shapes, self.kind)

    def __call__(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        found = [torch.from_numpy(self.rows[name][index]) for name in FIELDS]
        centers, patches, tokens = found
        return centers.long(), patches.long(), tokens

    @torch.no_grad()
    def fill(self, teacher: Teacher, clouds: PointClouds, config: PretrainConfig) -> None:
        """Ask the teacher about every shape, in random batches, as its targets may be normalised
        over a batch.

        Goes on where it was interrupted. Processes share each batch; the first one writes. Raises
        Interrupted.
        """
        state, size, count = PartialState(cpu=ON_CPU), config.batch_size, len(clouds)
        encoder = config.encoder

        def index_of(batch: int) -> np.ndarray:
            return batch_index(config.seed, batch, size, count, clouds.shard_sizes)

        if state.is_main_process:
            self._open(index_of)
        state.wait_for_everyone()  # how far it is, is known
        record = self._record()
        began = clock()
        teacher = teacher.to(state.device)
        share, total = size // state.num_processes, -(-count // size)
        rows = slice(state.process_index * share, (state.process_index + 1) * share)
        todo = range(record["batches"], total)
        state.wait_for_everyone()  # all have read it
        try:
            shown = progress_bar(todo, "targets of the frozen teachers")
            for batch in shown if state.is_main_process else todo:
                index = index_of(batch)
                points = clouds.batch(index[rows]).to(state.device)
                centers = farthest_point_sample(points, encoder.num_groups)
                patches = knn(gather_points(points, centers), points, encoder.group_size)
                grouped = groups_at(points, centers, patches)
                tokens = teacher(grouped.patches, grouped.centers)
                found = gather([centers, patches, tokens])
                if state.is_main_process:
                    for name, values in zip(FIELDS, found, strict=True):
                        self.rows[name][index] = values.cpu().numpy()
                    self.rows["checksum"][index] = self._checksums(index)
                    done = batch + 1
                    if self.folder and (done % SAVE_EVERY == 0 or done == total):
                        cast(np.memmap, self.rows).flush()
                        spent, before = spent_since(began), record["cost"]
                        cost = {name: before[name] + value for name, value in spent.items()}
                        kept = {"batches": done, "cost": cost}
                        write_checked(self.folder / "run.json", kept)
        except KeyboardInterrupt as stop:
            found = "stopped while the teachers were asked, saved every few batches"
            raise Interrupted(found) from stop
        state.wait_for_everyone()
        if todo and state.is_main_process:
            written, spent = self.rows.nbytes / 1e6, spent_since(began)
            asked = f"{written:,.1f} MB, asked in {spent['wall_seconds']:.1f} s"
            log.info(f"targets of {count:,} shapes: {asked}")
        # only now: what another machine wrote is seen by whoever opens it later
        if self.file:
            self.rows = np.load(self.file, mmap_mode="r")

    def _checksums(self, index: np.ndarray) -> list[int]:
        """Of each shape's centers, patches and tokens, which a damaged row does not have."""
        end = self.kind.itemsize - 4  # where the checksum itself begins
        return [zlib.crc32(row.tobytes()[:end]) for row in self.rows[index]]

    def _record(self) -> dict[str, Any]:
        """How many batches are done, and what they cost. Raises ValueError where it is damaged."""
        record = self.folder and self.folder / "run.json"
        if record and record.exists():
            return read_checked(record)
        return {"batches": 0, "cost": {"cpu_seconds": 0.0, "wall_seconds": 0.0}}

    def _open(self, index_of: Callable[[int], np.ndarray]) -> None:
        """Make or open the file; the targets of a damaged one, which is named, will be computed
        again.
        """
        if self.folder is None or self.file is None:
            return
        try:
            if done := self._record()["batches"]:
                self.rows = np.load(self.file, mmap_mode="r+")
                for batch in range(done):
                    index = index_of(batch)
                    if (self.rows["checksum"][index] != self._checksums(index)).any():
                        raise ValueError(f"batch {batch} is not as it was written")
                return
        except (OSError, ValueError, EOFError) as error:
            found = f"{self.folder}: damaged ({error})"
            log.info(f"{found}; its targets are computed again")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        shape = (self.num_shapes,)
        np.lib.format.open_memmap(self.file, "w+", self.kind, shape).flush()
        # a disk that fills up later would kill the process
        if hasattr(os, "posix_fallocate"):
            with naming(self.file), self.file.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.file.stat().st_size)
        self.rows = np.load(self.file, mmap_mode="r+")
