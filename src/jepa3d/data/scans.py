"""Read formats of scanners: PCD, LAS, LAZ, E57, PTX, and .bin files of float32.

LAS, LAZ, E57 and compressed PCD need the packages of the `io` extra. A damaged file can also raise
errors of other classes here, such as ValueError; `read` and `chunks` in io.py turn all of them into
a ReadError.
"""

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from jepa3d.data import cloud as clouds
from jepa3d.data.cloud import PointCloud, ReadError, attributes_of, collected
from jepa3d.data.errors import check_claim, first_line, io_module
from jepa3d.data.text import coordinate_columns, parsed

Columns = dict[str, np.ndarray]

# ---------------------------------------------------------------------------------------------- PCD


def read_pcd(path: Path) -> PointCloud:
    """Read a PCD of any version and encoding, with fields of any type in any order.

    Raises ReadError.
    """
    with path.open("rb") as file:
        header: dict[str, list[str]] = {}
        above = 0
        for text in islice(iter(lambda: file.readline(100_000), b""), 1000):
            words, above = text.decode("latin-1").split(), above + 1
            if words and not words[0].startswith("#"):
                header[words[0].upper()] = words[1:]
            if "DATA" in header:
                break
        row, count = _pcd_row(header)
        encoding, size = " ".join(header.get("DATA", ())).lower(), count * row.itemsize
        if encoding == "ascii":
            columns = _pcd_ascii(file, above + 1, row, count)
        elif encoding == "binary":
            check_claim(path, file.tell() + size, 1)
            data = np.frombuffer(file.read(size), row)
            columns = {name: data[name] for name in row.names or ()}
            more = file.read(row.itemsize)
            if len(more) == row.itemsize and any(more):  # zeros would be padding
                raise ReadError(f"damaged: more than {count:,} points follow its header")
        elif encoding == "binary_compressed":  # stored field by field
            packed, unpacked = np.frombuffer(file.read(8), "<u4").tolist()
            check_claim(path, unpacked, 100)  # LZF compresses by a factor of at most 88
            content = io_module("lzf").decompress(file.read(packed), unpacked) or b""
            if not len(content) == unpacked == size:
                raise ReadError(f"truncated: unpacks to {len(content)} of {size} bytes")
            columns, at = {}, 0
            # a field of COUNT 0 has no bytes
            for name in (name for name in row.names or () if row[name].itemsize):
                columns[name] = np.frombuffer(content, row[name], count, at)
                at += columns[name].nbytes
        else:
            known = "ascii, binary or binary_compressed"
            raise ReadError(f"DATA must be {known}, found {encoding or 'none'}")
    # only fields with one value per point can be coordinates, or attributes such as colours
    columns = {name: values for name, values in columns.items() if values.ndim == 1}
    xyz = np.stack([columns[axis].astype(np.float64) for axis in "xyz"], 1)
    return PointCloud.make(xyz, **attributes_of(columns))


def _pcd_row(header: dict[str, list[str]]) -> tuple[np.dtype, int]:
    """Return the structured type of a point and the number of points, both from the header.

    The names of the fields are in lower case. Raises ReadError.
    """
    names = header.get("FIELDS", header.get("COLUMNS", []))
    every = {"SIZE": [], "TYPE": ["F"] * len(names), "COUNT": ["1"] * len(names)}
    every = {"FIELDS": names} | {key: header.get(key, of) for key, of in every.items()}
    if not names or len({len(values) for values in every.values()}) > 1:
        found = ", ".join(f"{len(values)} {key}" for key, values in every.items())
        raise ReadError(f"damaged or not a PCD file: its header has {found}")
    keys = ("POINTS", "WIDTH", "HEIGHT")
    points, width, height = (int((header.get(key) or ["-1"])[0]) for key in keys)
    grid = width * abs(height) if width >= 0 else -1  # a missing HEIGHT means 1
    if points >= 0 and grid >= 0 and points != grid:
        raise ReadError(f"has {points:,} POINTS, but WIDTH x HEIGHT {width:,} x {height:,}")
    if (count := max(points, grid)) < 1:
        raise ReadError("has no points")
    fields: dict[str, np.dtype] = {}
    for i, (name, size, kind, repeat) in enumerate(zip(*every.values(), strict=True)):
        number, key = f"{kind.lower()}{size}", name.lower()
        if not re.fullmatch("[iu][1248]|f[248]", number):
            raise ReadError(f"field {name} has the unknown TYPE {kind} and SIZE {size}")
        if name == "_" or key in fields:  # _ marks padding and may occur several times
            key = f"_{i}"
        fields[key] = np.dtype((f"<{number}", () if repeat == "1" else (int(repeat),)))
    single = {name for name, kind in fields.items() if kind.shape == ()}
    if missing := {*"xyz"} - single:
        raise ReadError(f"has no field {min(missing)}; it has {', '.join(names)}")
    return np.dtype([*fields.items()]), count


def _pcd_ascii(file: IO[bytes], first: int, row: np.dtype, count: int) -> Columns:
    """Read the columns of a text PCD.

    Only fields with one value per point are returned. A column gets the type that the header
    states; but an integer column with values that do not fit this type becomes float64. first:
    number of the line with the first point, for error messages.
    """
    names = row.names or ()
    widths = [math.prod(row[name].shape) for name in names]
    starts = dict(zip(names, np.cumsum([0, *widths]).tolist(), strict=False))
    single = [name for name in names if row[name].shape == ()]
    order = sorted(single, key=lambda name: name not in {*"xyz"})
    lines = (text.decode("latin-1") for text in file)
    chunks = parsed(lines, first, None, [starts[name] for name in order])
    rows = np.concatenate([np.empty((0, len(order))), *chunks])
    if len(rows) != count:
        state = "truncated" if len(rows) < count else "damaged"
        raise ReadError(f"{state}: {len(rows):,} points, but its header says {count:,}")
    found = dict(zip(order, rows.T, strict=True))
    for name, values in found.items():
        typed = values.astype(row[name])
        if row[name].kind == "f" or (typed == values).all():
            found[name] = typed
    return found


# ---------------------------------------------------------------------------------------------- LAS


def _check_las(path: Path) -> None:
    """Raise ReadError for a damaged header that would make laspy run for hours, or make lazrs (the
    decompressor of LAZ) abort the process.
    """
    with path.open("rb") as file:
        file.seek(96)
        # offset of the points, number of variable length records, and format of the points
        start, records, kind = struct.unpack("<IIB", file.read(9))
        # a variable length record takes at least 54 bytes
        check_claim(path, 54 * records, 1)
        if kind & 0x80:  # compressed
            io_module("lazrs")
            file.seek(start)
            # the offset of the chunk table; -1 if the file was written as a stream
            (table,) = struct.unpack("<q", file.read(8))
            if table < 0:  # then the last 8 bytes of the file are the offset
                file.seek(-8, 2)
                (table,) = struct.unpack("<q", file.read(8))
            # after 4 bytes for its version, the table begins with its number of chunks
            file.seek(max(table, 0) + 4)
            check_claim(path, int.from_bytes(file.read(4), "little"), 1)


def las_records(path: Path) -> Iterator[Any]:
    """Yield the points of a LAS or LAZ file in chunks, as records of laspy.

    Raises ReadError for a damaged file, for example if points are missing.
    """
    laspy, seen = io_module("laspy"), 0
    _check_las(path)
    try:
        # use the decompressor with one thread: the parallel one allocates whatever memory a
        # damaged chunk table claims, and then aborts the process
        lazrs = laspy.LazBackend.Lazrs
        with laspy.open(path, read_evlrs=False, laz_backend=lazrs) as file:
            header = file.header
            count, size = header.point_count, header.point_format.size
            # LAZ can be thousands of times smaller than LAS if the points are regular
            factor = 5000 if header.are_points_compressed else 1
            check_claim(path, count * size, factor)
            waves = header.start_of_waveform_data_packet_record
            ends = waves, header.start_of_first_evlr, path.stat().st_size
            found = (min(filter(None, ends)) - header.offset_to_point_data) // size
            if factor == 1 and found > count:
                raise ReadError(f"its header says {count} points, but {found} follow")
            for records in file.chunk_iterator(clouds.CHUNK):
                seen += len(records)
                yield records
    except BaseException as error:
        # a Rust panic is no Exception, and its class cannot be imported
        rust = type(error).__name__ == "PanicException"
        if not rust and not isinstance(error, laspy.errors.LaspyException):
            raise
        raise ReadError(f"damaged or not a LAS file ({first_line(error)})") from error
    if seen < count:
        raise ReadError(f"truncated: it has {seen} of {count} points")


def las_rows(path: Path, names: Sequence[str] = "xyz") -> Iterator[np.ndarray]:
    """Yield the named columns of a LAS file in chunks: float64 arrays [n, len(names)].

    A column that the file lacks is filled with NaN.
    """
    for records in las_records(path):
        have = {*"xyz", *records.point_format.dimension_names}
        missing = np.full(len(records), np.nan)
        columns = [records[name] if name in have else missing for name in names]
        yield np.stack(columns, 1)


def read_las(path: Path) -> PointCloud:
    """Read LAS and LAZ, with colours and classification. Raises ReadError."""
    names = (*"xyz", "classification", "red", "green", "blue")
    cloud = collected(las_rows(path, names), names)
    # a byte again, as in the file: `to_parts` takes its largest value, 255, as no label
    return replace(cloud, parts=np.asarray(cloud.parts, np.uint8))


# ------------------------------------------------------------------------------------ E57, PTX, BIN


def read_e57(path: Path) -> PointCloud:
    """Read all scans of an E57 file, each placed by its pose.

    Points that the file marks as invalid are left out. Raises ReadError.
    """
    pye57 = io_module("pye57")
    try:
        with pye57.E57(str(path)) as file:
            counts = [file.get_header(i).point_count for i in range(file.scan_count)]
            # a point takes at least one bit
            check_claim(path, max(counts, default=0), 8)
            filled = [i for i, count in enumerate(counts) if count]
            scans = [file.read_scan(i, ignore_missing_fields=True) for i in filled]
    except pye57.libe57.E57Exception as error:
        raise ReadError(f"damaged or not an E57 file ({first_line(error)})") from error
    if not scans:
        raise ReadError("has no points" if counts else "has no scans")
    axes = (np.concatenate([scan[f"cartesian{a}"] for scan in scans]) for a in "XYZ")
    xyz = np.stack([*axes], 1)
    return PointCloud.make(xyz, unseen=sum(counts) - len(xyz))


def read_ptx(path: Path) -> PointCloud:
    """Read all scans of a PTX file, each placed by its matrix, with colours if it has them.

    Raises ReadError.
    """
    return collected(ptx_rows(path), (*"xyz", "red", "green", "blue"))


def ptx_rows(path: Path) -> Iterator[np.ndarray]:
    """Yield x, y, z, red, green, blue of Leica's PTX in chunks: float64 arrays [n, 6], with NaN for
    missing values.

    A scan begins with 10 lines: the number of columns (1 line), the number of rows (1 line), the
    position of the scanner (1 line), its axes (3 lines), and a matrix [4, 4] (4 lines) such that
    the coordinates in the scene are [x y z 1] @ matrix. One line per point follows: x y z intensity
    [r g b]. If no light came back, x, y and z are 0 in the file; they are returned as NaN. Raises
    ReadError.
    """
    with path.open(encoding="latin-1") as text:
        # skip blank lines, and the byte order mark that editors on Windows write
        file = (line.removeprefix("\xef\xbb\xbf") for line in text if line.strip())
        at = 0
        while (head := list(islice(file, 10))) and "".join(head).strip():
            try:
                count = int(head[0]) * int(head[1])
                rows = [text.split() for text in head[6:]]
                matrix = np.array(rows, np.float64).reshape(4, 4)
            except (ValueError, IndexError):
                raise ReadError(f"no PTX scan begins at line {at + 1}") from None
            check_claim(path, 6 * count, 1)  # the shortest line has 6 bytes
            lines, done = islice(file, count), 0
            first = next(lines, "")
            columns = [0, 1, 2, 4, 5, 6] if len(first.split()) >= 7 else [0, 1, 2]
            for found in parsed(chain([first], lines), at + 11, None, columns):
                rows = np.full((len(found), 6), np.nan)
                rows[:, : len(columns)] = found
                rows[(rows[:, :3] == 0).all(1), :3] = np.nan
                rows[:, :3] = rows[:, :3] @ matrix[:3, :3] + matrix[3, :3]
                done += len(rows)
                yield rows
            if done < count:
                raise ReadError(f"truncated: {done} of {count} points after line {at}")
            at += 10 + count


NO_COLUMNS = (
    "a .bin file does not say what its columns are: give jepa3d prepare --columns "
    "x y z intensity (KITTI), or x y z intensity ring (nuScenes)"
)


def read_bin(path: Path, columns: tuple[str, ...] | None) -> PointCloud:
    """Read a file of float32 rows, the format of lidar data sets such as KITTI.

    columns: the names of all columns; only the coordinates are kept. Raises ReadError, also if
    `columns` is None.
    """
    if columns is None:
        raise ReadError(NO_COLUMNS)
    size, width = path.stat().st_size, len(columns)
    if size % (4 * width):
        wrong = f"{size:,} bytes are not whole rows of {width} float32 values"
        raise ReadError(f"{wrong}; does --columns name all columns?")
    names = tuple(map(str.lower, columns))
    chosen = [names.index(name) for name in coordinate_columns(names, None)]
    return PointCloud.make(np.fromfile(path, "<f4").reshape(-1, width)[:, chosen])
