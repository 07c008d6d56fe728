"""Points of a scene sorted by grid cell on disk, so that any cell is one read: an external bucket
sort.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jepa3d.data.cloud import TO_Z_UP
from jepa3d.models.encoder import PointEncoder

# Z-up coordinates, and the row in the file.
RECORD = np.dtype([("xyz", "<f8", 3), ("index", "<i8")])
BUCKET = 1_000_000  # points sorted at once, about
_STRIP = 1024  # cells of a line, about: bounds the tiles held at once
_HASH_BITS, _KEY_BITS = 24, 40


@dataclass(frozen=True)
class Grid:
    """Cells of half a tile, numbered from 1 along each axis; tile t is cells t and t + 1.

    So tiles overlap by half, and a cell is in two along each axis. An axis no longer than a tile is
    not split: it has cell 1 and tile 1 only.
    """

    low: np.ndarray  # 3
    high: np.ndarray  # 3
    tile: float

    @cached_property
    def split(self) -> np.ndarray:
        """Whether each axis is split."""
        return self.high - self.low > self.tile

    @cached_property
    def count(self) -> np.ndarray:
        """Cells along each axis."""
        cells = np.ceil((self.high - self.low) / (self.tile / 2))
        return np.where(self.split, cells, 1).astype(np.int64)

    @cached_property
    def corners(self) -> np.ndarray:
        """Offsets k 3 between a tile and its cells: cells = tile + corner, tiles = cell - corner."""
        return np.array(list(product(*(range(1 + split) for split in self.split))))

    def cells(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cells n 3 of points n 3, and where in its cell each lies, 0 to 1 along each axis (1 where
        not split).
        """
        place = np.where(self.split, (xyz - self.low) / (self.tile / 2), 1.0)
        cells = np.clip(np.floor(place).astype(np.int64) + 1, 1, self.count)
        return cells, np.where(self.split, place - (cells - 1), 1.0)

    @cached_property
    def _line(self) -> tuple[int, int, int, int]:
        """The longer and the shorter horizontal axis, the cells of a strip and of the vertical
        axis.
        """
        major = int(self.count[1] > self.count[0])
        height = int(self.count[2]) + 2
        return major, 1 - major, max(8, _STRIP // height), height

    def keys(self, cells: np.ndarray) -> np.ndarray:
        """One number n for cells or tiles n 3, in the order of work: strip, line across it, place
        in the line.

        Two lines that follow each other hold all cells of the tiles between them.
        """
        major, minor, strip, height = self._line
        lines = (cells[:, minor] // strip) * (self.count[major] + 2) + cells[:, major]
        return (lines * strip + cells[:, minor] % strip) * height + cells[:, 2]

    def lines(self, keys: np.ndarray) -> np.ndarray:
        *_, strip, height = self._line
        return keys // (strip * height)

    def order(self, xyz: np.ndarray, index: np.ndarray) -> np.ndarray:
        """uint64 n that sorts points by cell, and those of a cell at random, whatever chunks they
        came in.
        """
        mixed = index.astype(np.uint64)
        # Splitmix64.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        keys = self.keys(self.cells(xyz)[0]).astype(np.uint64)
        return (keys << np.uint64(_HASH_BITS)) | (mixed >> np.uint64(64 - _HASH_BITS))


def tiles_of(
    grid: Grid, coords: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The occupied tiles of cells n 3 with counts n: coordinates t 3, counts t, and the tiles n k
    of each cell.
    """
    around = (coords[:, None] - grid.corners).reshape(-1, 3)
    _, first, inverse, _ = _unique(grid.keys(around))
    total = np.bincount(inverse, np.repeat(counts, len(grid.corners))).astype(np.int64)
    return around[first], total, inverse.reshape(len(coords), -1)


def _unique(keys: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of keys n: the different ones, the first row of each, the number of each row's key among them,
    and how many rows each has.
    """
    return np.unique(keys, return_index=True, return_inverse=True, return_counts=True)


def median_count(grid: Grid, points: np.ndarray) -> float:
    """Median number of points in the tiles that hold some of points n 3."""
    coords = grid.cells(points)[0]
    _, first, _, counts = _unique(grid.keys(coords))
    return float(np.median(tiles_of(grid, coords[first], counts)[1]))


def choose_tile(
    low: np.ndarray, high: np.ndarray, sample: np.ndarray, total: int, goal: int
) -> float:
    """The tile whose median count of occupied ones is about `goal`, by a random part n 3 of `total`
    points.

    The whole extent for few points; else rounded to two digits.
    """
    extent = float((high - low).max())
    larger, points = extent, np.inf  # of the step before
    for step in range(120):
        tile = extent if step == 0 else float(f"{extent * 2 ** (-step / 4):.2g}")
        median = median_count(Grid(low, high, tile), sample) * total / len(sample)
        if median <= goal:
            return tile if goal / median < points / goal else larger
        larger, points = tile, median
    return extent


def grid_for(
    low: np.ndarray,
    high: np.ndarray,
    sample: np.ndarray,
    total: int,
    tile: float | None,
    encoder: PointEncoder,
) -> Grid:
    """The grid of the tile asked for, or of the one that suits the encoder.

    sample: a random part n 3 of `total` points in the box from low to high. Raises ValueError for
    too small a tile: with more cells than keys can number, or few points.
    """
    choose = partial(choose_tile, low, high, sample, total, 2 * encoder.num_points)
    grid = Grid(low, high, choose() if tile is None else tile)
    if np.prod(grid.count + 2.0) * 8 > 2**_KEY_BITS:
        extent = " x ".join(f"{size:.6g}" for size in high - low)
        raise ValueError(f"--tile {grid.tile:g}: too small for a scene of {extent}")
    few = median_count(grid, sample) * total / len(sample) < encoder.min_points
    if few and tile is not None:
        raise ValueError(f"--tile {tile:g}: tiles of few points; try {choose():g}")
    return grid


class Cells:
    """The occupied cells of a scene in the order of their keys, and their points in a file.

    The points of a cell are in random order, so its first n are a random part.
    """

    def __init__(self, path: Path, grid: Grid, coords: np.ndarray, counts: np.ndarray):
        self.grid, self.coords, self.counts = grid, coords, counts  # coords n 3, counts n
        self.keys = grid.keys(coords)
        self.starts = np.cumsum(counts) - counts
        self._file = path.open("rb", buffering=0)

    def read(self, cell: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Records of `count` points of a cell (all by default), from its point number `first` on."""
        count = int(self.counts[cell]) - first if count is None else count
        self._file.seek(RECORD.itemsize * (int(self.starts[cell]) + first))
        return np.frombuffer(self._file.read(RECORD.itemsize * count), RECORD)

    def find(self, coords: np.ndarray) -> np.ndarray:
        """The occupied cells among those at coords n 3."""
        keys = self.grid.keys(coords)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return at[self.keys[at] == keys]

    def close(self) -> None:
        self._file.close()


def sort_points(
    parts: Iterator[np.ndarray],
    up_axis: str,
    grid: Grid,
    sample: np.ndarray,
    total: int,
    folder: Path,
    bar: tqdm,
) -> Cells:
    """Sort points, which come in parts n 3 of the file's axes, into a file in `folder`.

    sample: z-up coordinates and index n 4 of a random part of them; its quantiles are the edges of
    buckets, each of which is sorted in memory. bar: counts every
    point twice.
    """
    orders = np.sort(grid.order(sample[:, :3], sample[:, 3]))
    buckets = -(-total // BUCKET)
    edges = orders[np.arange(1, buckets) * len(orders) // buckets]
    files, done = [folder / f"bucket-{i}" for i in range(buckets)], 0
    for part in parts:
        records = np.empty(len(part), RECORD)
        records["xyz"] = part @ TO_Z_UP[up_axis].T
        records["index"] = np.arange(done, done + len(part))
        order = grid.order(records["xyz"], records["index"])
        bucket = np.searchsorted(edges, order, side="right")
        records = records[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=buckets))
        for i in np.unique(bucket):
            with files[i].open("ab") as file:
                records[ends[i - 1] if i else 0 : ends[i]].tofile(file)
        done += len(part)
        bar.update(len(part))
    found = []
    with (folder / "sorted").open("wb") as out:
        for file in files:
            file.touch()  # empty where no point fell
            records = np.fromfile(file, RECORD)
            order = grid.order(records["xyz"], records["index"])
            at = np.argsort(order, kind="stable")
            records[at].tofile(out)
            _, first, _, count = _unique(order[at] >> np.uint64(_HASH_BITS))
            found.append((grid.cells(records["xyz"][at[first]])[0], count))
            file.unlink()
            bar.update(len(records))
    # The points of one cell may be in several buckets.
    coords, counts = map(np.concatenate, zip(*found, strict=True))
    _, first, inverse, _ = _unique(grid.keys(coords))
    counts = np.bincount(inverse, counts).astype(np.int64)
    return Cells(folder / "sorted", grid, coords[first], counts)
