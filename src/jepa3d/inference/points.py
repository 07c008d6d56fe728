"""Clouds too large for memory: read in chunks, in the order of the file, and written again with a
colour a point.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.boundary import boundary, module
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.io import read
from jepa3d.data.ply import read_header, vertex_chunks
from jepa3d.data.scans import las_records, ptx_rows
from jepa3d.data.text import Table

CHUNK = 500_000  # points held at once
_WITH_COLORS = {
    0: 2,
    1: 3,
    4: 5,
    6: 7,
    9: 10,
}  # LAS point formats without colours: the same with them
_MESH = "a mesh; a scene is a cloud of points"


# ------------------------------------------------------------------------------------------ reading


def chunks(path: Path, tell: Callable[[int], None] = lambda unseen: None) -> Iterator[np.ndarray]:
    """All points of a file but those of NaN, float64 n 3 a chunk, in its order and coordinates.

    LAS, LAZ, PLY, NPY, PTX and tables need the memory of a chunk; other kinds are read whole. tell:
    is called at the end with the number of points of NaN. Raises ReadError, also for infinite
    coordinates and for meshes.
    """
    reader, row, unseen = _READERS.get(path.suffix.lower(), _others), 0, 0
    with boundary(path):
        if path.stat().st_size == 0:
            raise ReadError("empty file")
        parts = reader(path)
    while True:
        with boundary(path):
            xyz = next(parts, None)
        if xyz is None:
            return tell(unseen)
        wrong = (np.abs(xyz) >= 1e30).any(1)  # False for NaN
        if wrong.any():
            raise ReadError(
                f"{path}: infinite coordinates, first in point {row + int(wrong.argmax()):,}"
            )
        row += len(xyz)
        if (seen := ~np.isnan(xyz).any(1)).any():
            yield xyz if seen.all() else xyz[seen]
        unseen += int((~seen).sum())


def _las(path: Path) -> Iterator[np.ndarray]:
    for records in las_records(path, CHUNK):
        yield np.stack([np.asarray(records[name], np.float64) for name in "xyz"], 1)


def _npy(path: Path) -> Iterator[np.ndarray]:
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
        raise ReadError(
            f"expected an array of points [n, 3], found {values.dtype} {list(values.shape)}"
        )
    for at in range(0, len(values), CHUNK):
        values = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # anew, or all pages once read count as ours
        yield values[at : at + CHUNK, :3].astype(np.float64)


def _table(path: Path) -> Iterator[np.ndarray]:
    return Table(path).rows(CHUNK, attributes=False)


def _ptx(path: Path) -> Iterator[np.ndarray]:
    return (rows[:, :3] for rows in ptx_rows(path, CHUNK))


def _ply(path: Path) -> Iterator[np.ndarray]:
    header = read_header(path)
    if header.is_mesh:
        raise ReadError(_MESH)
    return vertex_chunks(path, header, CHUNK) or _others(path)


def _others(path: Path) -> Iterator[np.ndarray]:
    cloud = _whole(path, path.stat().st_mtime_ns)
    yield cloud.file_coordinates()
    yield np.full((cloud.unseen, 3), np.nan)


@lru_cache(maxsize=1)
def _whole(path: Path, changed: int) -> PointCloud:
    cloud = read(path)
    if cloud.faces is not None:
        raise ReadError(_MESH)
    if cloud.total:
        raise ReadError(
            f"only {len(cloud):,} of its {cloud.total:,} points are read so; unpack it first"
        )
    return cloud


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".las": _las,
    ".laz": _las,
    ".ply": _ply,
    ".npy": _npy,
    ".ptx": _ptx,
    ".xyz": _table,
    ".txt": _table,
    ".csv": _table,
    ".pts": _table,
    ".asc": _table,
}


# ------------------------------------------------------------------------------------------ writing


def write_ply(scan: Path, colors: Path, out: Path, count: int) -> Iterator[int]:
    """A scan's points with colours (a file of uint8 n 3) as binary PLY; yields the points done so
    far.
    """
    row = np.dtype(
        [(axis, "<f8") for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    )
    names = {"<f8": "double", "|u1": "uchar"}
    lines = [f"property {names[row[name].str]} {name}" for name in row.names or ()]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment jepa3d scene",
        f"element vertex {count}",
        *lines,
    ]
    done = 0
    with out.open("wb") as file:
        file.write("\n".join([*header, "end_header\n"]).encode())
        for xyz in chunks(scan):
            rows = np.empty(len(xyz), row)
            for i, name in enumerate(row.names or ()):
                rows[name] = xyz[:, i] if i < 3 else _colors(colors, done, len(xyz))[:, i - 3]
            rows.tofile(file)
            done += len(xyz)
            yield done


def write_las(
    scan: Path, colors: Path, out: Path, low: np.ndarray, high: np.ndarray
) -> Iterator[int]:
    """A scan's points with colours as LAS, by its suffix LAZ; yields the points done so far.

    A LAS scan keeps its fields, its header's scale and offset, and its coordinate system; its point
    format becomes the one with colours. Of other scans the scale is a millionth of the extent, at
    most 0.001 where that fits.
    """
    laspy, done = module("laspy"), 0
    from_las = scan.suffix.lower() in (".las", ".laz")
    if from_las:
        with laspy.open(scan, read_evlrs=False, laz_backend=laspy.LazBackend.Lazrs) as file:
            header = file.header
        old = header.point_format
        kind = laspy.PointFormat(_WITH_COLORS.get(old.id, old.id))
        kind.dimensions.extend(old.extra_dimensions)
        newest = max(
            str(header.version), laspy.point.dims.preferred_file_version_for_point_format(kind.id)
        )
        header.set_version_and_point_format(laspy.header.Version.from_str(newest), kind)
        header.vlrs = [
            vlr for vlr in header.vlrs if vlr.user_id != "copc"
        ]  # its octree is not kept
        header.evlrs = None
    else:
        header = laspy.LasHeader(version="1.4", point_format=7)
        extent = float((high - low).max())
        header.scales = np.full(
            3, max(min(1e-3, _power(1e-6 * extent, np.floor)), _power(extent / 2e9, np.ceil))
        )
        header.offsets = np.floor(low)
    options = {"laz_backend": laspy.LazBackend.Lazrs} if out.suffix.lower() == ".laz" else {}
    with laspy.open(out, mode="w", header=header, **options) as file:
        for part in las_records(scan, CHUNK) if from_las else chunks(scan):
            records = laspy.ScaleAwarePointRecord.zeros(len(part), header=header)
            if from_las:
                records.copy_fields_from(part)
            else:
                records["x"], records["y"], records["z"] = part.T
            for name, values in zip(
                ("red", "green", "blue"), _colors(colors, done, len(part)).T, strict=True
            ):
                records[name] = values.astype(np.uint16) * 257
            file.write_points(records)
            done += len(part)
            yield done


def _power(value: float, rounded: Callable) -> float:
    return float(10 ** rounded(np.log10(value)))


def _colors(path: Path, at: int, count: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, 3 * count, offset=3 * at).reshape(-1, 3)
