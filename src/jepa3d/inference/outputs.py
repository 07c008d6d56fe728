"""Files that are written point by point: PLY, LAS and Parquet of the points of a scene.

Parquet has one row a point, in any order:

index    the point's row in the scan, from 0
x, y, z  float64, the scan's own
feature  C float32 or float16

The file's metadata `jepa3d` is JSON: format, model, fingerprint, tile and up_axis.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.errors import io_module
from jepa3d.data.io import chunks
from jepa3d.data.ply import header_of
from jepa3d.data.scans import las_records

RGB = ("red", "green", "blue")
FORMAT = "jepa3d-scene-1"
# LAS point formats without colours: the same with them.
_WITH_COLORS = {0: 2, 1: 3, 4: 5, 6: 7, 9: 10}


def ply_row(more: dict[str, str] | None = None) -> np.dtype:
    """A row of a binary PLY: coordinates, colours and `more` properties."""
    types = dict.fromkeys("xyz", "<f8") | dict.fromkeys(RGB, "u1") | (more or {})
    return np.dtype(list(types.items()))


def write_ply(scan: Path, colors: Path, out: Path, count: int) -> Iterator[int]:
    """A scan's points with colours (a file of uint8 n 3) as binary PLY; yields the points done so
    far.
    """
    row, done = ply_row(), 0
    with out.open("wb") as file:
        file.write(header_of(row, count, ["jepa3d scene"]))
        for xyz in chunks(scan):
            rows = np.empty(len(xyz), row)
            values = (*xyz.T, *_read_colors(colors, done, len(xyz)).T)
            for name, column in zip((*"xyz", *RGB), values, strict=True):
                rows[name] = column
            rows.tofile(file)
            done += len(xyz)
            yield done


def write_las(
    scan: Path, colors: Path, out: Path, low: np.ndarray, high: np.ndarray
) -> Iterator[int]:
    """A scan's points with colours as LAS, by its suffix LAZ; yields the points done so far.

    A LAS scan keeps its fields, its header's scale and offset, and its coordinate system; its point
    format becomes the one with colours. Of other scans, whose box is `low` to `high`, the scale is
    a millionth of the extent, at most 0.001 where that fits.
    """
    laspy, done = io_module("laspy"), 0
    from_las = scan.suffix.lower() in (".las", ".laz")
    if from_las:
        header = _with_colors(laspy, scan)
    else:
        header = laspy.LasHeader(version="1.4", point_format=7)
        extent = np.log10((high - low).max())
        fine, coarse = 10 ** np.floor(extent - 6), 10 ** np.ceil(extent - np.log10(2e9))
        header.scales = np.full(3, max(min(1e-3, fine), coarse))
        header.offsets = np.floor(low)
    options: dict[str, Any] = {"mode": "w", "header": header}
    if out.suffix.lower() == ".laz":
        options["laz_backend"] = laspy.LazBackend.Lazrs
    with laspy.open(out, **options) as file:
        for part in las_records(scan) if from_las else chunks(scan):
            records = laspy.ScaleAwarePointRecord.zeros(len(part), header=header)
            if from_las:
                records.copy_fields_from(part)
            else:
                records["x"], records["y"], records["z"] = part.T
            rgb = _read_colors(colors, done, len(part)).T
            for name, values in zip(RGB, rgb, strict=True):
                records[name] = values.astype(np.uint16) * 257
            file.write_points(records)
            done += len(part)
            yield done


def _with_colors(laspy: Any, scan: Path) -> Any:
    """The header of a LAS scan, its point format the one with colours."""
    with laspy.open(scan, read_evlrs=False, laz_backend=laspy.LazBackend.Lazrs) as file:
        header = file.header
    old = header.point_format
    kind = laspy.PointFormat(_WITH_COLORS.get(old.id, old.id))
    kind.dimensions.extend(old.extra_dimensions)
    preferred = laspy.point.dims.preferred_file_version_for_point_format(kind.id)
    newest = laspy.header.Version.from_str(max(str(header.version), preferred))
    header.set_version_and_point_format(newest, kind)
    # The octree of COPC is not kept.
    header.vlrs = [vlr for vlr in header.vlrs if vlr.user_id != "copc"]
    header.evlrs = None
    return header


def _read_colors(path: Path, at: int, count: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, 3 * count, offset=3 * at).reshape(-1, 3)


def write_parquet(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    out: Path,
    width: int,
    dtype: str,
    metadata: dict[str, Any],
) -> None:
    """Parts of index n, coordinates n 3 and features n C as Parquet. Needs the extra `search`."""
    from jepa3d.inference.vectors import pa, to_column, vector_type, write

    columns = {"index": pa.int64()} | dict.fromkeys("xyz", pa.float64())
    columns["feature"] = vector_type(width, dtype)
    kind = pa.schema(columns, {"jepa3d": json.dumps({"format": FORMAT} | metadata)})
    tables = (
        pa.table([index, *xyz.T, to_column(features, width, dtype)], kind)
        for index, xyz, features in parts
    )
    write(tables, out, minimum=32_768)
