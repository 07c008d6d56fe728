"""Clouds too large for memory, written again with a colour a point."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import CHUNK
from jepa3d.data.errors import io_module
from jepa3d.data.io import chunks
from jepa3d.data.ply import header_of
from jepa3d.data.scans import las_records

_RGB = ("red", "green", "blue")
# LAS point formats without colours: the same with them
_WITH_COLORS = {0: 2, 1: 3, 4: 5, 6: 7, 9: 10}


def write_ply(scan: Path, colors: Path, out: Path, count: int) -> Iterator[int]:
    """A scan's `count` points with colours (a file of uint8 n 3) as binary PLY.

    Yields the points done so far.
    """
    row = np.dtype([*((axis, "<f8") for axis in "xyz"), *((name, "u1") for name in _RGB)])
    done = 0
    with out.open("wb") as file:
        file.write(header_of(row, count, ["jepa3d scene"]))
        for xyz in chunks(scan):
            rows = np.empty(len(xyz), row)
            columns = [*xyz.T, *_colors(colors, done, len(xyz)).T]
            for name, values in zip(row.names or (), columns, strict=True):
                rows[name] = values
            rows.tofile(file)
            done += len(xyz)
            yield done


def write_las(
    scan: Path, colors: Path, out: Path, low: np.ndarray, high: np.ndarray
) -> Iterator[int]:
    """A scan's points with colours as LAS, by its suffix LAZ; yields the points done so far.

    low, high: corners [3] of the scan's box. A LAS scan keeps its fields, its header's scale and
    offset, and its coordinate system; its point format becomes the one with colours. Of other scans
    the scale is a millionth of the extent, at most 0.001 where that fits.
    """
    laspy, done = io_module("laspy"), 0
    from_las = scan.suffix.lower() in (".las", ".laz")
    if from_las:
        with laspy.open(scan, read_evlrs=False, laz_backend=laspy.LazBackend.Lazrs) as file:
            header = file.header
        kind = laspy.PointFormat(_WITH_COLORS.get(header.point_format.id, header.point_format.id))
        kind.dimensions.extend(header.point_format.extra_dimensions)
        least = laspy.point.dims.preferred_file_version_for_point_format(kind.id)
        version = laspy.header.Version.from_str(max(str(header.version), least))
        header.set_version_and_point_format(version, kind)
        # the octree of COPC is not kept
        header.vlrs = [record for record in header.vlrs if record.user_id != "copc"]
        header.evlrs = None
    else:
        header = laspy.LasHeader(version="1.4", point_format=7)
        extent = float((high - low).max())
        wanted, fits = _power(1e-6 * extent, np.floor), _power(extent / 2e9, np.ceil)
        header.scales = np.full(3, max(min(1e-3, wanted), fits))
        header.offsets = np.floor(low)
    options = {"laz_backend": laspy.LazBackend.Lazrs} if out.suffix.lower() == ".laz" else {}
    with laspy.open(out, mode="w", header=header, **options) as file:
        for part in las_records(scan, CHUNK) if from_las else chunks(scan):
            records = laspy.ScaleAwarePointRecord.zeros(len(part), header=header)
            if from_las:
                records.copy_fields_from(part)
            else:
                records["x"], records["y"], records["z"] = part.T
            rgb = _colors(colors, done, len(part)).astype(np.uint16) * 257
            for name, values in zip(_RGB, rgb.T, strict=True):
                records[name] = values
            file.write_points(records)
            done += len(part)
            yield done


def _power(value: float, rounded: Callable) -> float:
    """The power of ten above or below a value."""
    return float(10 ** rounded(np.log10(value)))


def _colors(path: Path, at: int, count: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, 3 * count, offset=3 * at).reshape(-1, 3)
