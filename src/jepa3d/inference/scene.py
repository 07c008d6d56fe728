"""`jepa3d scene`: a feature for every point of a cloud of any size, by overlapping tiles in bounded
memory.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from sklearn.neighbors import KDTree
from torch import Tensor

from jepa3d.data.cloud import TO_Z_UP, ReadError, Reservoir
from jepa3d.data.io import chunks
from jepa3d.inference.cells import (
    RECORD,
    Cells,
    Grid,
    choose_tile,
    median_count,
    sort_points,
    tiles_of,
)
from jepa3d.inference.points import write_las, write_ply
from jepa3d.locking import writing
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import fingerprint, load
from jepa3d.models.tokenizer import group
from jepa3d.ops import three_nn_interpolate

OUTPUTS = (".ply", ".las", ".laz", ".parquet")
DTYPES = ("float32", "float16")
BATCH, _PATCH_POINTS = 32, 32_768  # tiles, and points of their patches, through the encoder at once
SAMPLE = 500_000  # points by which the tile is chosen
_MOST = 32_768  # points of a tile, of which farthest points are drawn
_BLOCK = 512  # points of one cell interpolated at once
_BATCH_POINTS, _BATCH_BLOCKS = 16_384, 128
_PCA_CELLS, _PCA_POINTS = 64, 256


@dataclass(frozen=True)
class Tile:
    """What the encoder says of a tile:

    `origin + radius * centers` are in the scene's z-up frame.
    """

    origin: np.ndarray  # 3 float64
    radius: float
    centers: Tensor  # M 3
    tokens: Tensor  # M C


class Features:
    """Features of the points of cells: of each tile around, interpolated from its tokens, and
    blended.

    A tile weighs most at its middle and nothing at its border. Tiles with fewer points than the
    encoder needs are left out; a cell that has no other takes one grown around it: the nearest
    occupied cells that have enough points.
    """

    def __init__(self, encoder: PointEncoder, cells: Cells):
        self.encoder, self.cells, self.grid = encoder, cells, cells.grid
        self.least = encoder.min_points
        self.corners = self.grid.corners
        self.coords, self.counts, around = tiles_of(self.grid, cells.coords, cells.counts)
        self.slots = np.where(
            self.counts[around] >= self.least, around, -1
        )  # tiles of each cell n k, or -1
        self.alone = np.flatnonzero((self.slots < 0).all(1))
        self.slots[self.alone, 0] = len(self.coords) + np.arange(len(self.alone))
        self._tree = KDTree(cells.coords, metric="chebyshev") if len(self.alone) else None
        self._tiles: dict[int, Tile] = {}

    def of(
        self, chosen: np.ndarray, limit: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Records n and features n C float32 of the points of chosen cells, in some order; of each,
        at most `limit`.

        Tiles of the last call are kept: cells in the order of their keys need each once.
        """
        needed = np.unique(self.slots[chosen])
        needed = needed[needed >= 0].tolist()
        self._tiles = {tile: self._tiles[tile] for tile in needed if tile in self._tiles}
        self._encode([tile for tile in needed if tile not in self._tiles])
        blocks = []
        for cell in chosen.tolist():
            count = min(int(self.cells.counts[cell]), limit or 2**62)
            blocks += [(min(_BLOCK, count - at), cell, at) for at in range(0, count, _BLOCK)]
        blocks.sort()  # so that little is padded
        while blocks:
            number = max(1, min(_BATCH_BLOCKS, _BATCH_POINTS // blocks[-1][0]))
            yield self._blend(blocks[-number:])
            del blocks[-number:]

    def _blend(self, blocks: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Records n and features n C of blocks (count, cell, first point)."""
        records = np.zeros((len(blocks), blocks[-1][0]), RECORD)
        for row, (count, cell, first) in zip(records, blocks, strict=True):
            row[:count] = self.cells.read(cell, first, count)
        used = np.arange(records.shape[1]) < np.array([[count] for count, *_ in blocks])
        cells = np.array([cell for _, cell, _ in blocks])
        xyz, device = records["xyz"], self.encoder.norm.weight.device
        place = self.grid.cells(xyz.reshape(-1, 3))[1].reshape(xyz.shape)
        lone = np.isin(cells, self.alone)
        total, features = torch.zeros(used.shape, device=device), 0.0
        for slot, corner in zip(self.slots[cells].T, self.corners, strict=True):
            rows = np.flatnonzero(slot >= 0)
            if not len(rows):
                continue
            tiles = [self._tiles[tile] for tile in slot[rows].tolist()]
            weight = np.where(corner, 1 - place[rows], place[rows]).prod(-1).clip(1e-6)
            weight[lone[rows]] = 1
            query = xyz[rows] - np.stack([tile.origin for tile in tiles])[:, None]
            query /= np.array([tile.radius for tile in tiles])[:, None, None]
            found = three_nn_interpolate(
                torch.from_numpy(query.astype(np.float32)).to(device),
                torch.stack([tile.centers for tile in tiles]),
                torch.stack([tile.tokens for tile in tiles]),
            )
            weights, at = (
                torch.from_numpy(weight.astype(np.float32)).to(device),
                torch.from_numpy(rows).to(device),
            )
            if isinstance(features, float):
                features = torch.zeros((*used.shape, found.shape[-1]), device=device)
            features.index_add_(0, at, found.mul_(weights[..., None]))
            total.index_add_(0, at, weights)
        assert isinstance(features, Tensor)
        mask = torch.from_numpy(used).to(device)
        return records[used], (features[mask] / total[mask][:, None]).cpu().numpy()

    @torch.inference_mode()
    def _encode(self, wanted: list[int]) -> None:
        device = self.encoder.norm.weight.device
        size = max(
            1, min(BATCH, _PATCH_POINTS // (self.encoder.num_groups * self.encoder.group_size))
        )
        for at in range(0, len(wanted), size):
            names = wanted[at : at + size]
            origins, radii, points = zip(*(self._points(tile) for tile in names), strict=True)
            grouped = group(
                torch.stack(points).to(device), self.encoder.num_groups, self.encoder.group_size
            )
            tokens = self.encoder.features(grouped.patches, grouped.centers)[-1].float()
            for tile, made in zip(
                names, zip(origins, radii, grouped.centers, tokens, strict=True), strict=True
            ):
                self._tiles[tile] = Tile(*made)

    def _points(self, tile: int) -> tuple[np.ndarray, float, Tensor]:
        """Origin, radius, and the num_points 3 in the unit sphere that the encoder sees of a tile."""
        cells = self._members(tile)
        counts = self.cells.counts[cells]
        share = min(1.0, _MOST / counts.sum())
        parts = [
            self.cells.read(cell, 0, int(np.ceil(n * share)))
            for cell, n in zip(cells, counts, strict=True)
        ]
        xyz = np.concatenate(parts)["xyz"]
        seen = self.encoder.frame(xyz, 1)  # copies of one point count as often as they are there
        return seen.center, seen.radius, torch.from_numpy(seen.points)

    def _members(self, tile: int) -> np.ndarray:
        """The occupied cells of a tile."""
        if tile < len(self.coords):
            return self.cells.find(self.coords[tile] + self.corners)
        assert self._tree is not None
        center = self.cells.coords[self.alone[tile - len(self.coords)]]
        near = self._tree.query(
            center[None], min(self.least, len(self.cells.keys)), return_distance=False
        )[0]
        return near[: int(np.searchsorted(np.cumsum(self.cells.counts[near]), self.least)) + 1]


class Colors:
    """The three main directions of features (PCA) as red, green and blue; 2-98 % of each is the
    range.

    Fitted to the points of random cells.
    """

    def __init__(self, features: Features, path: Path, total: int):
        rng, counts = np.random.default_rng(0), features.cells.counts
        number = min(_PCA_CELLS, len(counts))
        chosen = np.sort(rng.choice(len(counts), number, replace=False, p=counts / counts.sum()))
        # One cell at a time: they lie far apart, and so many tiles are not held at once.
        values = np.concatenate(
            [f for cell in chosen for _, f in features.of(chosen[chosen == cell], _PCA_POINTS)]
        )
        self.mean = values.mean(0)
        axes = np.linalg.eigh(np.cov((values - self.mean).T.astype(np.float64)))[1][:, :-4:-1]
        axes *= np.sign(
            axes[np.abs(axes).argmax(0), np.arange(3)]
        )  # else the sign is the library's
        self.axes = axes.astype(np.float32)
        self.low, self.high = np.quantile((values - self.mean) @ self.axes, [0.02, 0.98], axis=0)
        self.path = path
        with path.open("wb") as file:
            file.truncate(3 * total)

    def add(self, index: np.ndarray, features: np.ndarray) -> None:
        """Colour the points at index n in the file, by their features n C."""
        main = (features - self.mean) @ self.axes
        scaled = (main - self.low) / np.maximum(self.high - self.low, 1e-12)
        # Mapped anew, or all pages once written count as ours.
        np.memmap(self.path, np.uint8, "r+").reshape(-1, 3)[index] = (
            (255 * scaled).clip(0, 255).round()
        )


def write_features(
    scan: Path,
    out: Path,
    model: str = "default",
    tile: float | None = None,
    up_axis: str = "z",
    dtype: str = "float32",
) -> None:
    """A feature for every point of `scan`, as colours (.ply, .las, .laz) in the file's order or
    whole (.parquet).

    tile: side of a tile in the file's unit; by default about 2 * num_points lie in the median tile.
    Needs 32 bytes a point beside `out` while it works, 3 more for colours. An interrupted run
    leaves nothing and starts anew. Raises ValueError, and ReadError for a scan that cannot be used.
    """
    began = time.monotonic()
    _check(scan, out, tile, up_axis, dtype)
    encoder = load(model)
    making = {"model": model, "fingerprint": fingerprint(encoder), "up_axis": up_axis}
    if torch.accelerator.is_available():
        encoder = encoder.to(torch.accelerator.current_accelerator())
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with (
        writing(out),
        _scratch(out.with_name(f".{out.name}.partial")) as folder,
        Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress,
    ):
        low, high, total, sample = _survey(scan, up_axis, _shown(progress, "reading", None))
        least = encoder.min_points
        if total < least:
            raise ReadError(f"{scan}: {total} points, at least {least} are needed")
        if (low == high).all():
            raise ReadError(f"{scan}: all points are equal")
        grid = _grid(low, high, sample[:, :3], total, tile, encoder)
        _check_space(
            folder,
            total,
            encoder.width * np.dtype(dtype).itemsize if out.suffix.lower() == ".parquet" else 0,
        )
        shown = _shown(progress, "sorting", 2 * total)
        cells = sort_points(chunks(scan), up_axis, grid, sample, total, folder, shown)
        if cells.counts.sum() != total:
            raise ReadError(f"{scan}: changed while it was read")
        try:
            features = Features(encoder, cells)
            print(_summary(features))
            made = folder / f"made{out.suffix.lower()}"
            shown = _shown(progress, "features", total)
            if out.suffix.lower() == ".parquet":
                _to_parquet(features, made, dtype, making | {"tile": grid.tile}, shown)
            else:
                colors = Colors(features, folder / "colors", total)
                for records, values in _stream(features, shown):
                    colors.add(records["index"], values)
                axes = TO_Z_UP[up_axis]
                box = np.sort([low @ axes, high @ axes], 0)
                shown = _shown(progress, "writing", total)
                ply = out.suffix.lower() == ".ply"
                for done in (
                    write_ply(scan, colors.path, made, total)
                    if ply
                    else write_las(scan, colors.path, made, *box)
                ):
                    shown(done)
        finally:
            cells.close()
        made.replace(out)
    print(
        f"{out}: {total:,} points, {encoder.width} features each, {(time.monotonic() - began) / 60:.1f} min"
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; one that a killed run left there is cleared away
    first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(scan: Path, out: Path, tile: float | None, up_axis: str, dtype: str) -> None:
    if out.suffix.lower() not in OUTPUTS:
        raise ValueError(f"--out {out}: its name must end in {', '.join(OUTPUTS)}")
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(
            f"--out {out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}"
        )
    if out.exists() and scan.exists() and out.samefile(scan):
        raise ValueError(f"--out {out}: is the scan itself")
    if tile is not None and not 0 < tile < np.inf:
        raise ValueError(f"--tile {tile:g}: a length above 0")
    if up_axis not in TO_Z_UP:
        raise ValueError(f"up axis {up_axis!r}: one of {', '.join(TO_Z_UP)}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")


def _grid(
    low: np.ndarray,
    high: np.ndarray,
    sample: np.ndarray,
    total: int,
    tile: float | None,
    encoder: PointEncoder,
) -> Grid:
    """The grid of the tile asked for, or of the one that suits the encoder.

    ValueError for too small a tile.
    """
    if tile is not None:
        grid = Grid(low, high, tile)
        grid.check()
        if median_count(grid, sample) * total / len(sample) >= encoder.min_points:
            return grid
    suitable = Grid(low, high, choose_tile(low, high, sample, total, 2 * encoder.num_points))
    suitable.check()
    if tile is not None:
        few = f"most tiles would have under {encoder.min_points} points"
        raise ValueError(f"--tile {tile:g}: {few}; try {suitable.tile:g}")
    return suitable


def _check_space(folder: Path, total: int, feature: int) -> None:
    """OSError where the disk cannot hold sorted points, and features or colours, before hours are
    spent.
    """
    needed, free = (
        total * (32 + (32 + feature if feature else 3 + 34)),
        shutil.disk_usage(folder).free,
    )
    if free < needed:
        raise OSError(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free"
        )


def _shown(progress: Progress, doing: str, total: int | None) -> Callable[[int], None]:
    """A new bar; the function sets how much is done."""
    for task in progress.task_ids:
        progress.update(task, visible=False)
    task = progress.add_task(doing, total=total)
    return lambda done: progress.update(task, completed=done)


def _survey(
    scan: Path, up_axis: str, shown: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Corners low and high of the z-up box, number of points, and of a random part coordinates and
    index n 4.
    """
    low, high, total, reservoir = np.full(3, np.inf), np.full(3, -np.inf), 0, Reservoir(SAMPLE)

    def tell(unseen: int) -> None:
        if unseen:
            print(
                f"{scan}: {unseen:,} points that are NaN, where nothing was seen, are left out of the output"
            )

    for part in chunks(scan, tell):
        xyz = part @ TO_Z_UP[up_axis].T.astype(np.float64)
        low, high = np.minimum(low, xyz.min(0)), np.maximum(high, xyz.max(0))
        reservoir.add(np.column_stack([xyz, np.arange(total, total + len(xyz))]))
        total += len(xyz)
        shown(total)
    return low, high, total, reservoir.rows()


def _summary(features: Features) -> str:
    alone = f"; {len(features.alone):,} lone cells take a larger one" if len(features.alone) else ""
    counts = features.counts
    return f"tile {features.grid.tile:.6g}: {len(counts):,} tiles, median {np.median(counts):,.0f} points{alone}"


def _stream(
    features: Features, shown: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Records and features of all points, line by line of cells."""
    lines, done = features.grid.lines(features.cells.keys), 0
    for line in np.split(np.arange(len(lines)), np.flatnonzero(np.diff(lines)) + 1):
        for records, values in features.of(line):
            yield records, values
            done += len(records)
            shown(done)


def _to_parquet(
    features: Features, path: Path, dtype: str, making: dict, shown: Callable[[int], None]
) -> None:
    from jepa3d.inference.scene_features import FeatureFile

    file = FeatureFile(path, features.encoder.width, dtype, making)
    axes = TO_Z_UP[making["up_axis"]].astype(np.float64)
    for records, values in _stream(features, shown):
        file.add(records["index"], records["xyz"] @ axes, values)
    file.close()
