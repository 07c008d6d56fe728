"""Compute the targets of frozen teachers once per shape, before training, instead of in every step.

RUN/cache/targets.npy    the targets, one row per shape
RUN/cache/run.json       how many batches of shapes are done, and the time that they took

The folder RUN/cache is deleted when the run is finished.

A cache changes the results of a run. With a cache, a shape keeps the same patches for the whole
run, and the augmentation of a step only moves the points in these patches. The teacher sees each
shape without augmentation.
"""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
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

SAVE_EVERY = 20  # number of batches from one save to the next
FIELDS = ("centers", "patches", "tokens")


def row_type(config: PretrainConfig, width: int) -> np.dtype:
    """Return the numpy type of one shape's row. Its fields: the point indices of the M centers [M],
    the point indices of the M patches of K points [M, K], the teacher's tokens [M, width], and a
    checksum of the other fields.
    """
    encoder = config.encoder
    number = np.uint16 if encoder.num_points <= 2**16 else np.int32
    sizes = (), (encoder.group_size,), (width,)
    kinds = zip(FIELDS, (number, number, np.float16), sizes, strict=True)
    fields = [(name, kind, (encoder.num_groups, *size)) for name, kind, size in kinds]
    return np.dtype([*fields, ("checksum", np.uint32)])


def check_space(config: PretrainConfig, num_shapes: int, width: int, out: Path) -> None:
    """Raise ValueError if the disk has no room for the targets of a new run."""
    needed = num_shapes * row_type(config, width).itemsize
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        found = f"but only {free / 1e9:.1f} GB are free"
        raise ValueError(f"target.cache needs {needed / 1e9:.1f} GB in {out}, {found}")


class CachedTargets:
    """Hold the targets of all shapes. A call with the indices of n shapes returns the point indices
    of centers [n, M] and patches [n, M, K], and the teacher's tokens [n, M, width].
    """

    def __init__(self, config: PretrainConfig, num_shapes: int, width: int, folder: Path | None):
        """Keep the rows in `folder`, or in memory if `folder` is None (dry run)."""
        self.folder, self.file = folder, folder and folder / "targets.npy"
        self.num_shapes, self.kind = num_shapes, row_type(config, width)
        self.rows = np.zeros(0 if folder else num_shapes, self.kind)

    def __call__(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        fields = [torch.from_numpy(self.rows[name][index]) for name in FIELDS]
        centers, patches, tokens = fields
        return centers.long(), patches.long(), tokens

    @torch.no_grad()
    def fill(self, teacher: Teacher, clouds: PointClouds, config: PretrainConfig) -> None:
        """Compute the targets of all shapes. An interrupted computation continues at its last save.

        The batches consist of random shapes, since targets may be normalised over a batch. Each
        process computes a share of every batch, and the first process writes the whole batch.
        Raises Interrupted on Ctrl-C.
        """
        state, size, count = PartialState(cpu=ON_CPU), config.batch_size, len(clouds)
        encoder = config.encoder

        def index_of(batch: int) -> np.ndarray:
            return batch_index(config.seed, batch, size, count, clouds.shard_sizes)

        if state.is_main_process:
            self._open(index_of)
        # All processes wait here, since `_open` may replace the record that they read next.
        state.wait_for_everyone()
        record, start = self._record(), clock()
        # an earlier start, so that the measured time includes that of earlier calls
        start_of_all = {name: start[name] - spent for name, spent in record["cost"].items()}
        teacher = teacher.to(state.device)
        local, total = size // state.num_processes, -(-count // size)
        rows = slice(state.process_index * local, (state.process_index + 1) * local)
        todo = range(record["batches"], total)
        state.wait_for_everyone()  # all have read the record; now the first process may write
        try:
            bar = progress_bar(todo, "targets of the frozen teachers")
            for batch in bar if state.is_main_process else todo:
                index = index_of(batch)
                points = clouds.batch(index[rows]).to(state.device)
                centers = farthest_point_sample(points, encoder.num_groups)
                patches = knn(gather_points(points, centers), points, encoder.group_size)
                grouped = groups_at(points, centers, patches)
                tokens = teacher(grouped.patches, grouped.centers)
                gathered = gather([centers, patches, tokens])
                if state.is_main_process:
                    for name, values in zip(FIELDS, gathered, strict=True):
                        self.rows[name][index] = values.cpu().numpy()
                    self.rows["checksum"][index] = self._checksums(index)
                    done = batch + 1
                    if self.folder and (done % SAVE_EVERY == 0 or done == total):
                        cast(np.memmap, self.rows).flush()
                        record = {"batches": done, "cost": spent_since(start_of_all)}
                        write_checked(self.folder / "run.json", record)
        except KeyboardInterrupt as error:
            problem = "stopped while computing targets of the frozen teachers"
            hint = f"they are saved every {SAVE_EVERY} batches"
            raise Interrupted(f"{problem}; {hint}") from error
        state.wait_for_everyone()
        if todo and state.is_main_process:
            written, spent = self.rows.nbytes / 1e6, spent_since(start)
            computed = f"{written:,.1f} MB, computed in {spent['wall_seconds']:.1f} s"
            log.info(f"targets of {count:,} shapes: {computed}")
        # All processes open the file after the last write: if it was opened earlier, it might not
        # show what a process on another machine has written.
        if self.file:
            self.rows = np.load(self.file, mmap_mode="r")

    def _checksums(self, index: np.ndarray) -> list[int]:
        """Compute the checksum of each row's centers, patches and tokens, to find damaged rows."""
        end = self.kind.itemsize - 4  # the checksum itself is the last 4 bytes
        return [zlib.crc32(row.tobytes()[:end]) for row in self.rows[index]]

    def _record(self) -> dict[str, Any]:
        """Read how many batches are done, and the time they took. Returns zeros if there is no
        record, and raises ValueError if the record is damaged.
        """
        record = self.folder and self.folder / "run.json"
        if record and record.exists():
            return read_checked(record)
        return {"batches": 0, "cost": {"cpu_seconds": 0.0, "wall_seconds": 0.0}}

    def _open(self, index_of: Callable[[int], np.ndarray]) -> None:
        """Open targets.npy. Create it anew if it is damaged, or if no finished batch is recorded.

        Damage is logged, and then all targets are computed again. Targets that are kept in memory
        have no file to open.

        index_of: returns the shape indices of a batch.
        """
        if self.folder is None or self.file is None:
            return
        try:
            if done := self._record()["batches"]:
                self.rows = np.load(self.file, mmap_mode="r+")
                if (self.rows.dtype, self.rows.shape) != (self.kind, (self.num_shapes,)):
                    raise ValueError("its header is wrong")
                for batch in range(done):
                    index = index_of(batch)
                    if (self.rows["checksum"][index] != self._checksums(index)).any():
                        raise ValueError(f"the checksums of batch {batch} are wrong")
                return
        # numpy parses the file's header as Python code, so damage may be an error of syntax
        except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:
            found = f"{self.folder} is damaged ({error})"
            log.info(f"{found}; its targets are computed again")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        shape = (self.num_shapes,)
        np.lib.format.open_memmap(self.file, "w+", self.kind, shape).flush()
        # Reserve the disk space now: if the disk were full at a later write to the memory-mapped
        # file, the process would be killed.
        if hasattr(os, "posix_fallocate"):
            with naming(self.file), self.file.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.file.stat().st_size)
        self.rows = np.load(self.file, mmap_mode="r+")
