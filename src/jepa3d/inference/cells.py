"""Sort the points of a scene by grid cell, on disk (an external bucket sort), so that all points of
a cell can be read at once.
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

# The record of a point: its z-up coordinates, and its number in the scan, from 0. NaN points are
# left out before points are numbered.
RECORD = np.dtype([("xyz", "<f8", 3), ("index", "<i8")])
BUCKET = 1_000_000  # approximate number of points that are sorted in memory at once
# Approximate number of cells in a line (see `Grid.keys`). It limits how many tiles are in memory.
_STRIP = 1024
# A sorting key consists of the key of a cell, and of random bits for the order within the cell.
# `_HASH_BITS` is the number of random bits, `_KEY_BITS` the number of bits for the cell's key.
_HASH_BITS, _KEY_BITS = 24, 40


@dataclass(frozen=True)
class Grid:
    """A grid over a scene. The scene is encoded in overlapping cubes, called tiles (see scene.py).
    The cells of the grid are half as long as a tile.

    An axis along which the scene is longer than a tile is split: its cells are numbered from 1, and
    tile t covers the cells t and t + 1. So tiles overlap by half along this axis, and each cell
    lies in two tiles. (Cell 1 lies in the tiles 0 and 1. One half of tile 0 and of the last tile
    lies outside the grid.) An axis that is not split has only cell 1 and tile 1.
    """

    low: np.ndarray  # [3], lowest corner of the scene's bounding box
    high: np.ndarray  # [3], highest corner of the bounding box
    tile: float  # side of a tile

    @cached_property
    def split(self) -> np.ndarray:
        """Bool [3]: which axes are split into cells."""
        return self.high - self.low > self.tile

    @cached_property
    def count(self) -> np.ndarray:
        """Number of cells along each axis [3]."""
        cells = np.ceil((self.high - self.low) / (self.tile / 2))
        return np.where(self.split, cells, 1).astype(np.int64)

    @cached_property
    def corners(self) -> np.ndarray:
        """Offsets [k, 3] between a tile and its k cells. The cells of a tile are tile + corners;
        the tiles of a cell are cell - corners.
        """
        return np.array(list(product(*(range(1 + split) for split in self.split))))

    def cells(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells [n, 3] of points [n, 3], and each point's position in its cell, from 0
        to 1 along each axis (1 along an axis that is not split).
        """
        place = np.where(self.split, (xyz - self.low) / (self.tile / 2), 1.0)
        cells = np.clip(np.floor(place).astype(np.int64) + 1, 1, self.count)
        return cells, np.where(self.split, place - (cells - 1), 1.0)

    @cached_property
    def _line(self) -> tuple[int, int, int, int]:
        """Numbers (0 or 1) of the longer and of the shorter horizontal axis; the width of a strip
        in cells (see `keys`); and the height of the grid in cells, plus a margin of 2, since
        `keys` also numbers tiles, whose coordinates begin at 0.
        """
        major = int(self.count[1] > self.count[0])
        height = int(self.count[2]) + 2
        return major, 1 - major, max(8, _STRIP // height), height

    def keys(self, cells: np.ndarray) -> np.ndarray:
        """Return an integer key for each of the cells or tiles [n, 3]. Cells are processed in
        the order of their keys.

        The grid is cut into strips that run along its longer horizontal axis. Each strip is cut
        across into lines. A line is as wide as its strip and as high as the grid, but only one cell
        long in the direction of the strip. If all cells of a tile lie in one strip, they lie in one
        line or in two consecutive lines.
        """
        major, minor, strip, height = self._line
        lines = (cells[:, minor] // strip) * (self.count[major] + 2) + cells[:, major]
        return (lines * strip + cells[:, minor] % strip) * height + cells[:, 2]

    def lines(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of the line in which each key's cell lies."""
        *_, strip, height = self._line
        return keys // (strip * height)

    def order(self, xyz: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return sorting keys [n] (uint64) that order points [n, 3] by cell, and at random within
        a cell.

        index: the points' numbers [n] in the scan. The random order depends only on these numbers,
        and not on the chunks in which points are read.
        """
        mixed = index.astype(np.uint64)
        # This is the mixing function of the random generator splitmix64, without its last shift.
        # That shift would not change the highest bits, and only these are used.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        keys = self.keys(self.cells(xyz)[0]).astype(np.uint64)
        return (keys << np.uint64(_HASH_BITS)) | (mixed >> np.uint64(64 - _HASH_BITS))


def tiles_of(
    grid: Grid, coords: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the occupied tiles (those that contain points), given the occupied cells `coords` [n, 3]
    and their point counts [n].

    Returns three arrays: the coordinates [t, 3] of the tiles, their point counts [t], and, for each
    cell, the rows [n, k] of its k tiles in the first two arrays.
    """
    around = (coords[:, None] - grid.corners).reshape(-1, 3)
    _, first, inverse, _ = _unique(grid.keys(around))
    total = np.bincount(inverse, np.repeat(counts, len(grid.corners))).astype(np.int64)
    return around[first], total, inverse.reshape(len(coords), -1)


def _unique(keys: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the distinct keys, the row where each of them first occurs, the position of each row's
    key among the distinct keys, and how often each distinct key occurs.
    """
    return np.unique(keys, return_index=True, return_inverse=True, return_counts=True)


def median_count(grid: Grid, points: np.ndarray) -> float:
    """Return the median number of points in the occupied tiles, for points [n, 3]."""
    coords = grid.cells(points)[0]
    _, first, _, counts = _unique(grid.keys(coords))
    return float(np.median(tiles_of(grid, coords[first], counts)[1]))


def choose_tile(
    low: np.ndarray, high: np.ndarray, sample: np.ndarray, total: int, goal: int
) -> float:
    """Choose the tile size for which the median occupied tile holds about `goal` points.

    low, high: corners of the scene's bounding box. sample: a random sample [n, 3] of the scene's
    `total` points. If the scene has few points, the tile size is the largest extent of the scene,
    so that one tile holds all points. A smaller tile size is rounded to two significant digits.
    """
    extent = float((high - low).max())
    larger, points = extent, np.inf  # tile size and median count of the previous step
    for step in range(120):
        tile = extent if step == 0 else float(f"{extent * 2 ** (-step / 4):.2g}")
        median = median_count(Grid(low, high, tile), sample) * total / len(sample)
        if median <= goal:
            return tile if goal / median < points / goal else larger
        larger, points = tile, median
    return extent  # no tile is small enough, for example if only a few points differ


def grid_for(
    low: np.ndarray,
    high: np.ndarray,
    sample: np.ndarray,
    total: int,
    tile: float | None,
    encoder: PointEncoder,
) -> Grid:
    """Return the grid for tiles of side `tile`. If `tile` is None, choose the side for which the
    median tile holds about twice as many points as the encoder sees (`num_points`).

    low, high, sample, total: see `choose_tile`. Raises ValueError if the tiles are so small that
    there are more cells than keys. Also raises ValueError if `tile` is given and the median tile
    has fewer points than the encoder needs.
    """
    choose = partial(choose_tile, low, high, sample, total, 2 * encoder.num_points)
    grid = Grid(low, high, choose() if tile is None else tile)
    most = 2**_KEY_BITS
    if np.prod(grid.count + 2.0) * 8 > most or grid.keys(grid.count[None])[0] >= most:
        extent = " x ".join(f"{size:.6g}" for size in high - low)
        small = f"too small for a scene of {extent}"
        if tile is None:
            chosen = f"tiles of {grid.tile:g}, chosen by the number of points"
            hint = "remove points far from all others, or give --tile"
            raise ValueError(f"{chosen}, are {small}: {hint}")
        raise ValueError(f"--tile {tile:g}: {small}")
    few = median_count(grid, sample) * total / len(sample) < encoder.min_points
    if few and tile is not None:
        raise ValueError(f"--tile {tile:g}: too few points per tile; try {choose():g}")
    return grid


class Cells:
    """The occupied cells of a scene, in the order of their keys, and the file that has the points
    of the cells.

    The points of a cell are in random order, so the first n points are a random sample of the cell.
    """

    def __init__(self, path: Path, grid: Grid, coords: np.ndarray, counts: np.ndarray):
        # coords [n, 3], counts [n]
        self.grid, self.coords, self.counts = grid, coords, counts
        self.keys = grid.keys(coords)
        self.starts = np.cumsum(counts) - counts
        self._file = path.open("rb", buffering=0)

    def read(self, cell: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Read the records of `count` points of a cell, beginning with the cell's point number
        `first` (from 0). If `count` is None, read all points of the cell from there on.

        cell: row of the cell in `self.coords`.
        """
        count = int(self.counts[cell]) - first if count is None else count
        self._file.seek(RECORD.itemsize * (int(self.starts[cell]) + first))
        return np.frombuffer(self._file.read(RECORD.itemsize * count), RECORD)

    def find(self, coords: np.ndarray) -> np.ndarray:
        """Find which of the cells [n, 3] are occupied; returns their rows in `self.coords`."""
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
    """Sort the points of a scene by cell into a file in `folder`, and return the occupied cells.

    parts: the scene's `total` points in chunks [n, 3], in the axes of their file. up_axis: the up
    axis of this file. sample: randomly sampled points, an array [n, 4] of their z-up coordinates
    and their numbers in the scan. Quantiles of this sample divide the points into buckets; each
    bucket is then sorted in memory. bar: a progress bar, which counts a point when it is put into a
    bucket and again when it is sorted.
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
            file.touch()  # a bucket without points has no file yet
            records = np.fromfile(file, RECORD)
            order = grid.order(records["xyz"], records["index"])
            at = np.argsort(order, kind="stable")
            records[at].tofile(out)
            _, first, _, count = _unique(order[at] >> np.uint64(_HASH_BITS))
            found.append((grid.cells(records["xyz"][at[first]])[0], count))
            file.unlink()
            bar.update(len(records))
    # The points of one cell may be spread over several buckets.
    coords, counts = map(np.concatenate, zip(*found, strict=True))
    _, first, inverse, _ = _unique(grid.keys(coords))
    counts = np.bincount(inverse, counts).astype(np.int64)
    return Cells(folder / "sorted", grid, coords[first], counts)
