"""`jepa3d scene`: compute a feature for every point of a cloud of any size, in bounded memory. The
cloud is split into overlapping tiles, and each tile is encoded like an object.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KDTree
from torch import Tensor
from tqdm import tqdm

from jepa3d.data.cloud import TO_Z_UP, ReadError, Reservoir
from jepa3d.data.errors import io_module, suffix_of
from jepa3d.data.io import chunks
from jepa3d.evaluation.features import default_device
from jepa3d.inference.cells import RECORD, Cells, grid_for, sort_points, tiles_of
from jepa3d.inference.outputs import write_las, write_parquet, write_ply
from jepa3d.locking import writing
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import fingerprint, load
from jepa3d.models.tokenizer import group
from jepa3d.ops import three_nn_interpolate
from jepa3d.plain import log, progress_bar

OUTPUTS = (".ply", ".las", ".laz", ".parquet")
DTYPES = ("float32", "float16")
# At most `BATCH` tiles are encoded at once. The number is smaller if the patches of `BATCH` tiles
# would have more than `_PATCH_POINTS` points together.
BATCH, _PATCH_POINTS = 32, 32_768
SAMPLE = 500_000  # number of random points from which the tile size is chosen
# A tile with more points than this is reduced at random to about this many points before farthest
# point sampling.
_MOST = 32_768
# For interpolation, the points of each cell are divided into blocks of at most this many points.
_BLOCK = 512
# The blocks are interpolated in batches. A batch has at most `_BATCH_BLOCKS` blocks, which have at
# most `_BATCH_POINTS` points together, padding included.
_BATCH_POINTS, _BATCH_BLOCKS = 16_384, 128
# The PCA of the features is fitted to points of at most `_PCA_CELLS` random cells, with at most
# `_PCA_POINTS` points of each cell.
_PCA_CELLS, _PCA_POINTS = 64, 256

Records = np.ndarray  # an array [n] of points, with the dtype `RECORD` (see cells.py)
# Origin [3] (float64), radius, centers [M, 3] and tokens [M, C] of a tile. In the scene's z-up
# coordinates, the centers are at `origin + radius * centers`.
Tile = tuple[np.ndarray, float, Tensor, Tensor]


class Features:
    """Compute the features of the points in cells (see cells.py). For every tile that contains a
    point, the tile's tokens are interpolated to the point. The point's feature is the weighted mean
    of these interpolated tokens, one from each tile.

    The weight of a tile is highest in its middle and falls to almost zero at its border. Tiles with
    fewer points than the encoder needs are left out. If all tiles of a cell are left out, the cell
    gets a tile of its own: the cell and its nearest occupied cells, as many as are needed to have
    enough points.
    """

    def __init__(self, encoder: PointEncoder, cells: Cells):
        self.encoder, self.cells, self.grid = encoder, cells, cells.grid
        tiles = tiles_of(self.grid, cells.coords, cells.counts)
        self.coords, self.counts, around = tiles
        # For each of n cells, the indices [n, k] of its k tiles; -1 for a tile that is left out. A
        # cell whose tiles are all left out gets a tile of its own. The indices of these extra tiles
        # begin after those of the grid's tiles.
        self.slots = np.where(self.counts[around] >= encoder.min_points, around, -1)
        self.alone = np.flatnonzero((self.slots < 0).all(1))
        self.slots[self.alone, 0] = len(self.coords) + np.arange(len(self.alone))
        self._tiles: dict[int, Tile] = {}

    @cached_property
    def _tree(self) -> KDTree:
        return KDTree(self.cells.coords, metric="chebyshev")

    def of(
        self, chosen: np.ndarray, limit: int | None = None
    ) -> Iterator[tuple[Records, np.ndarray]]:
        """Yield records [n] and features [n, C] (float32) of the points in the chosen cells, in no
        particular order.

        chosen: rows of the cells in `cells.coords`. limit: use at most this many points of each
        cell. Encoded tiles are kept for the next call, which deletes those that it does not need.
        So if each call gets the next line of cells (`cells.py::Grid.keys` explains lines and
        strips), a tile that lies in one strip is encoded once, and a tile that lies in two strips
        is encoded twice.
        """
        needed = np.unique(self.slots[chosen])
        needed = needed[needed >= 0].tolist()
        self._tiles = {t: self._tiles[t] for t in needed if t in self._tiles}
        self._encode([tile for tile in needed if tile not in self._tiles])
        blocks = []
        for cell in chosen.tolist():
            count = min(int(self.cells.counts[cell]), limit or 2**62)
            starts = range(0, count, _BLOCK)
            blocks += [(min(_BLOCK, count - at), cell, at) for at in starts]
        blocks.sort()  # by size, so that batches need little padding
        while blocks:
            number = max(1, min(_BATCH_BLOCKS, _BATCH_POINTS // blocks[-1][0]))
            yield self._blend(blocks[-number:])
            del blocks[-number:]

    def _blend(self, blocks: list[tuple[int, int, int]]) -> tuple[Records, np.ndarray]:
        """Compute the features of the points in blocks. Returns the records [n] and features [n, C]
        of these points.

        blocks: tuples (number of points, cell, number of the block's first point in the cell), in
        ascending order.
        """
        device = self.encoder.norm.weight.device
        on_device = partial(torch.as_tensor, dtype=torch.float32, device=device)
        records = np.zeros((len(blocks), blocks[-1][0]), RECORD)
        for row, (count, cell, first) in zip(records, blocks, strict=True):
            row[:count] = self.cells.read(cell, first, count)
        counts, cells, _ = np.array(blocks).T
        used = np.arange(records.shape[1]) < counts[:, None]
        xyz = records["xyz"]
        place = self.grid.cells(xyz.reshape(-1, 3))[1].reshape(xyz.shape)
        alone = np.isin(cells, self.alone)
        total = torch.zeros(used.shape, device=device)
        features = torch.zeros((*used.shape, self.encoder.width), device=device)
        for slot, corner in zip(self.slots[cells].T, self.grid.corners, strict=True):
            rows = np.flatnonzero(slot >= 0)
            if not len(rows):
                continue
            tiles = [self._tiles[tile] for tile in slot[rows].tolist()]
            origin, radius, centers, tokens = zip(*tiles, strict=True)
            weight = np.where(corner, 1 - place[rows], place[rows]).prod(-1).clip(1e-6)
            weight[alone[rows]] = 1
            query = xyz[rows] - np.stack(origin)[:, None]
            query = on_device(query / np.array(radius)[:, None, None])
            known = torch.stack(centers), torch.stack(tokens)
            found = three_nn_interpolate(query, *known)
            weights, at = on_device(weight), torch.from_numpy(rows).to(device)
            features.index_add_(0, at, found.mul_(weights[..., None]))
            total.index_add_(0, at, weights)
        mask = torch.from_numpy(used).to(device)
        return records[used], (features[mask] / total[mask][:, None]).cpu().numpy()

    @torch.inference_mode()
    def _encode(self, wanted: list[int]) -> None:
        """Encode tiles in batches and add them to `_tiles`."""
        encoder = self.encoder
        sizes = encoder.num_groups, encoder.group_size
        step = max(1, min(BATCH, _PATCH_POINTS // (sizes[0] * sizes[1])))
        for at in range(0, len(wanted), step):
            batch = wanted[at : at + step]
            origins, radii, points = zip(*map(self._points, batch), strict=True)
            grouped = group(torch.stack(points).to(encoder.norm.weight.device), *sizes)
            tokens = encoder.features(grouped.patches, grouped.centers)[-1].float()
            made = zip(origins, radii, grouped.centers, tokens, strict=True)
            self._tiles |= zip(batch, made, strict=True)

    def _points(self, tile: int) -> tuple[np.ndarray, float, Tensor]:
        """Return a tile's origin and radius, and its points as the encoder receives them: a tensor
        [num_points, 3] in the unit sphere.
        """
        cells = self._members(tile)
        counts = self.cells.counts[cells]
        share = min(1.0, _MOST / counts.sum())
        taken = np.ceil(counts * share).astype(int).tolist()
        parts = map(self.cells.read, cells, [0] * len(cells), taken)
        xyz = np.concatenate(list(parts))["xyz"]
        # The minimum number of different points is 1 here, not the encoder's min_points. Tiles were
        # chosen by a count that includes duplicates, so a tile may have too few different points.
        # Such a tile must not be refused now.
        seen = self.encoder.frame(xyz, 1)
        return seen.center, seen.radius, torch.from_numpy(seen.points)

    def _members(self, tile: int) -> np.ndarray:
        """Return the occupied cells of a tile, as rows of `cells.coords`."""
        if tile < len(self.coords):
            return self.cells.find(self.coords[tile] + self.grid.corners)
        center = self.cells.coords[self.alone[tile - len(self.coords)]]
        min_points = self.encoder.min_points
        k = min(min_points, len(self.cells.keys))
        near = self._tree.query(center[None], k, return_distance=False)[0]
        points = np.cumsum(self.cells.counts[near])
        return near[: int(np.searchsorted(points, min_points)) + 1]


class Colors:
    """Map features to colours: the first three principal components become red, green and blue.
    Each component is scaled so that its 2 % and 98 % quantiles become 0 and 255.

    The components and quantiles are computed from random points of random cells.
    """

    def __init__(self, features: Features):
        rng, counts = np.random.default_rng(0), features.cells.counts
        number = min(_PCA_CELLS, len(counts))
        share = counts / counts.sum()
        chosen = np.sort(rng.choice(len(counts), number, replace=False, p=share))
        # The cells are processed one at a time, so that only the tiles of one cell are in memory.
        # A tile that two of the cells share is encoded again for the second cell, unless one cell
        # directly follows the other. This only costs time.
        parts = (features.of(np.array([cell]), _PCA_POINTS) for cell in chosen)
        values = np.concatenate([found for part in parts for _, found in part])
        self.components = PCA(3, svd_solver="full")
        main = self.components.fit_transform(values)
        self.low, self.high = np.quantile(main, [0.02, 0.98], axis=0)

    def of(self, features: np.ndarray) -> np.ndarray:
        """Return red, green and blue [n, 3], from 0 to 255, for features [n, C]."""
        main = self.components.transform(features)
        scaled = (main - self.low) / np.maximum(self.high - self.low, 1e-12)
        return (255 * scaled).clip(0, 255).round()


def write_features(
    scan: Path,
    out: Path,
    model: str = "default",
    tile: float | None = None,
    up_axis: str | None = None,
    dtype: str = "float32",
) -> None:
    """Write a feature for every point of `scan`: as a colour, in the scan's order (.ply, .las,
    .laz), or as numbers (.parquet).

    tile: side of a tile in the file's unit. By default, the side is chosen so that the median tile
    has about twice as many points as the encoder sees (its `num_points`). up_axis: the scan's up
    axis, by default y for a glTF file and z for any other file. The disk of `out` needs
    32 bytes of temporary space per point (35 bytes if colours are written), and space for the
    results (see `_check_space`). An interrupted call deletes its temporary files. If its process is
    killed, the next call for the same `out` deletes them. Every call starts from the beginning.

    Raises ValueError for wrong settings, or if another command is writing to `out`. Raises
    ReadError for a scan that cannot be used, and OSError if the disk has too little space.
    """
    began = time.monotonic()
    if up_axis is None:
        up_axis = "y" if suffix_of(scan) in (".glb", ".gltf") else "z"
    _check(scan, out, tile, up_axis, dtype)
    encoder, suffix = load(model).to(default_device()), out.suffix.lower()
    with writing(out), _scratch(out) as folder, progress_bar(unit_scale=True) as bar:
        bar.set_description("reading", refresh=False)
        low, high, total, sample = _survey(scan, up_axis, bar)
        if total < (min_points := encoder.min_points):
            raise ReadError(f"{scan}: {total} points, at least {min_points} are needed")
        if (low == high).all():
            raise ReadError(f"{scan}: all points are equal")
        grid = grid_for(low, high, sample[:, :3], total, tile, encoder)
        parquet = suffix == ".parquet"
        _check_space(folder, total, encoder.width * np.dtype(dtype).itemsize * parquet)
        _restart(bar, "sorting", 2 * total)
        cells = sort_points(chunks(scan), up_axis, grid, sample, total, folder, bar)
        with closing(cells):
            if cells.counts.sum() != total:
                raise ReadError(f"{scan}: changed while it was read")
            features, written = Features(encoder, cells), folder / f"written{suffix}"
            alone, counts = len(features.alone), features.counts
            tiles = f"{len(counts):,} tiles, median {np.median(counts):,.0f} points"
            grown = f"; {alone:,} sparse places get a larger tile" if alone else ""
            log.info(f"tile {grid.tile:.6g}: {tiles}{grown}")
            _restart(bar, "features", total)
            stream = _stream(features, bar)
            # This matrix rotates z-up coordinates back to the scan's axes.
            axes = TO_Z_UP[up_axis].astype(np.float64)
            if parquet:
                parts = ((x["index"], x["xyz"] @ axes, values) for x, values in stream)
                metadata = {"model": model, "fingerprint": fingerprint(encoder)}
                metadata |= {"tile": grid.tile, "up_axis": up_axis}
                write_parquet(parts, written, encoder.width, dtype, metadata)
            else:
                colors, file = Colors(features), folder / "colors"
                np.memmap(file, np.uint8, "w+", shape=3 * total)
                for records, values in stream:
                    # The file is mapped anew each time, since all pages of one mapping would count
                    # as used memory.
                    rgb = np.memmap(file, np.uint8, "r+").reshape(-1, 3)
                    rgb[records["index"]] = colors.of(values)
                _restart(bar, "writing", total)
                if suffix == ".ply":
                    write_ply(scan, file, written, total, bar)
                else:
                    box = np.sort([low @ axes, high @ axes], 0)
                    write_las(scan, file, written, box, bar)
        written.replace(out)
    minutes = (time.monotonic() - began) / 60
    size = f"{total:,} points, {encoder.width} features each"
    log.info(f"{out}: {size}, {minutes:.1f} min")


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Return a context manager that makes an empty folder beside `out` and deletes it at the end.

    If a killed run left this folder behind, its content is deleted first.
    """
    folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(scan: Path, out: Path, tile: float | None, up_axis: str, dtype: str) -> None:
    """Raise ValueError for wrong arguments or a missing package, before the scan is read."""
    if out.suffix.lower() not in OUTPUTS:
        raise ValueError(f"--out {out}: its name must end in {', '.join(OUTPUTS)}")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: must be a file in a folder that exists")
    if out.exists() and scan.exists() and out.samefile(scan):
        raise ValueError(f"--out {out}: is the scan itself")
    if tile is not None and not 0 < tile < np.inf:
        raise ValueError(f"--tile {tile:g}: must be a length above 0")
    if up_axis not in TO_Z_UP:
        raise ValueError(f"up axis {up_axis!r} is unknown: use {', '.join(TO_Z_UP)}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is unknown: use {' or '.join(DTYPES)}")
    if out.suffix.lower() in (".las", ".laz"):
        io_module("laspy")
    if out.suffix.lower() == ".parquet":
        import jepa3d.inference.vectors  # noqa: F401  it says which package is missing


def _check_space(folder: Path, total: int, feature_bytes: int) -> None:
    """Raise OSError if the disk has too little space for the sorted points and the results. Without
    this check, the command might fail after hours.

    feature_bytes: number of bytes of a point's feature, or 0 if colours are written.
    """
    # The sorted file needs 32 bytes per point. A Parquet file needs 32 bytes per point for index
    # and coordinates, and `feature_bytes`. For a PLY or LAS file, 34 bytes per point are counted:
    # PLY needs 27, and the usual point formats of LAS need 34 or 36. The temporary file of the
    # colours needs 3 bytes per point.
    needed = total * (32 + (32 + feature_bytes if feature_bytes else 3 + 34))
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free"
        raise OSError(f"{folder.parent}: {sizes}")


def _restart(bar: tqdm, doing: str, total: int) -> None:
    bar.set_description(doing, refresh=False)
    bar.reset(total)


def _survey(scan: Path, up_axis: str, bar: tqdm) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Read a scan once. Returns the lowest and the highest corner of its bounding box, the number
    of its points, and a random sample of the points: an array [n, 4], whose rows are the three
    coordinates of a point and its number in the scan. Corners and coordinates are z-up.
    """
    low, high, total = np.full(3, np.inf), np.full(3, -np.inf), 0
    reservoir = Reservoir(SAMPLE)

    def tell(unseen: int) -> None:
        if unseen:
            why = "points are NaN (the scanner saw nothing) and are left out"
            log.info(f"{scan}: {unseen:,} {why} of the output")

    for part in chunks(scan, tell):
        xyz = part @ TO_Z_UP[up_axis].T.astype(np.float64)
        low, high = np.minimum(low, xyz.min(0)), np.maximum(high, xyz.max(0))
        reservoir.add(np.column_stack([xyz, np.arange(total, total + len(xyz))]))
        total += len(xyz)
        bar.update(len(xyz))
    return low, high, total, reservoir.rows()


def _stream(features: Features, bar: tqdm) -> Iterator[tuple[Records, np.ndarray]]:
    """Yield records and features of all points, line by line (lines of cells: see `Grid.keys`)."""
    lines = features.grid.lines(features.cells.keys)
    for line in np.split(np.arange(len(lines)), np.flatnonzero(np.diff(lines)) + 1):
        for records, values in features.of(line):
            yield records, values
            bar.update(len(records))
