"""Write the results of `jepa3d scene`: a colour for every point as PLY or LAS, or a feature for
every point as Parquet.

A Parquet file has one row per point. The rows are in no particular order; their columns are:

index    the point's number in the scan, from 0; points with NaN coordinates are not counted
x, y, z  float64, in the scan's coordinates
feature  the point's feature, a vector of float32 or float16

The entry `jepa3d` of the file's metadata is JSON with the keys format, model, fingerprint (a hash
of the model's weights), tile (the side of a tile, see scene.py) and up_axis.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jepa3d.data.errors import io_module
from jepa3d.data.io import chunks
from jepa3d.data.ply import header_of
from jepa3d.data.scans import las_records

RGB = ("red", "green", "blue")
FORMAT = "jepa3d-scene-1"
# LAS point formats without colours -> the corresponding formats with colours.
_WITH_COLORS = {0: 2, 1: 3, 4: 5, 6: 7, 9: 10}


def ply_row(more: dict[str, str] | None = None) -> np.dtype:
    """Return the dtype of a row of a binary PLY: coordinates, colours, and further properties.

    more: dict from the name of a further property to its type.
    """
    types = dict.fromkeys("xyz", "<f8") | dict.fromkeys(RGB, "u1") | (more or {})
    return np.dtype(list(types.items()))


def write_ply(scan: Path, colors: Path, out: Path, count: int, bar: tqdm) -> None:
    """Write the `count` points of a scan with their colours as a binary PLY.

    colors: a file of colours [n, 3] uint8, in the order of the scan's points.
    """
    row = ply_row()
    with out.open("wb") as file:
        file.write(header_of(row, count, ["jepa3d scene"]))
        for xyz, rgb in _with_rgb(chunks(scan), colors, bar):
            np.rec.fromarrays([*xyz.T, *rgb.T], dtype=row).tofile(file)


def write_las(scan: Path, colors: Path, out: Path, box: np.ndarray, bar: tqdm) -> None:
    """Write a scan's points with their colours as LAS, or as LAZ if `out` ends in .laz.

    colors: a file of colours [n, 3] uint8, in the order of the scan's points. box: an array [2, 3]
    of the lowest and the highest corner of the scan's bounding box.

    If the scan itself is LAS or LAZ, the output keeps the scan's fields, coordinate system, scale
    and offset. If the scan's point format has colours, the output has the same point format;
    otherwise the output has the corresponding format with colours.

    For any other scan, the scale (the resolution of coordinates) is a millionth of the largest
    extent of `box`, rounded down to a power of ten, but at most 0.001. If coordinates would then
    not fit into 32 bits, the scale is the smallest power of ten for which they do.
    """
    laspy = io_module("laspy")
    from_las = scan.suffix.lower() in (".las", ".laz")
    if from_las:
        header = _with_colors(laspy, scan)
    else:
        header = laspy.LasHeader(version="1.4", point_format=7)
        header.offsets = np.floor(box[0])
        fine = 10 ** np.floor(np.log10((box[1] - box[0]).max()) - 6)
        largest = (box[1] - header.offsets).max()
        coarse = 10 ** np.ceil(np.log10(largest) - np.log10(2e9))
        header.scales = np.full(3, max(min(1e-3, fine), coarse))
    lazrs = laspy.LazBackend.Lazrs  # used for LAZ only
    with laspy.open(out, mode="w", header=header, laz_backend=lazrs) as file:
        parts = las_records(scan) if from_las else chunks(scan)
        for part, rgb in _with_rgb(parts, colors, bar):
            records = laspy.ScaleAwarePointRecord.zeros(len(part), header=header)
            if from_las:
                records.copy_fields_from(part)
            else:
                records["x"], records["y"], records["z"] = part.T
            for name, values in zip(RGB, rgb.T, strict=True):
                records[name] = values.astype(np.uint16) * 257
            file.write_points(records)


def _with_colors(laspy: Any, scan: Path) -> Any:
    """Return the header of a LAS or LAZ scan, changed to the corresponding point format with
    colours.
    """
    with laspy.open(scan, read_evlrs=False, laz_backend=laspy.LazBackend.Lazrs) as file:
        header = file.header
    old = header.point_format
    kind = laspy.PointFormat(_WITH_COLORS.get(old.id, old.id))
    kind.dimensions.extend(old.extra_dimensions)
    preferred = laspy.point.dims.preferred_file_version_for_point_format(kind.id)
    newest = laspy.header.Version.from_str(max(str(header.version), preferred))
    header.set_version_and_point_format(newest, kind)
    # A COPC file is a LAZ file whose points are ordered by an octree. Its special records describe
    # where the octree's nodes lie in the old file, which is wrong for the new file. So these
    # records are dropped. All extended records (EVLRs) are dropped too, since they are not read.
    header.vlrs = [vlr for vlr in header.vlrs if vlr.user_id != "copc"]
    header.evlrs = None
    return header


def _with_rgb(parts: Iterable[Any], colors: Path, bar: tqdm) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield the chunks of a scan, each with its colours [n, 3].

    colors: a file of colours [n, 3] uint8, in the order of the scan's points.
    """
    with colors.open("rb") as file:
        for part in parts:
            yield part, np.fromfile(file, np.uint8, 3 * len(part)).reshape(-1, 3)
            bar.update(len(part))


def write_parquet(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    out: Path,
    width: int,
    dtype: str,
    metadata: dict[str, Any],
) -> None:
    """Write chunks of (index [n], coordinates [n, 3], features [n, C]) as Parquet.

    width: the number C. dtype: number type of the features. metadata: keys and values of the
    metadata entry `jepa3d` besides `format`. The packages of the extra `search` must be installed.
    """
    from jepa3d.inference.vectors import pa, to_column, vector_type, write

    columns = {"index": pa.int64()} | dict.fromkeys("xyz", pa.float64())
    columns["feature"] = vector_type(width, dtype)
    kind = pa.schema(columns, {"jepa3d": json.dumps({"format": FORMAT} | metadata)})
    tables = (
        pa.table([index, *xyz.T, to_column(features, width, dtype)], kind)
        for index, xyz, features in parts
    )
    write(tables, out, minimum=32_768)
