"""What scanners write:

PCD; LAS, LAZ and E57 by the parsers of the `io` extra; PTX, and BIN of named columns.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from jepa3d.data.boundary import check_claim, line, module
from jepa3d.data.cloud import PointCloud, ReadError, Reservoir, to_bytes
from jepa3d.data.text import collected, coordinate_columns, parsed


def columns_of(raw, count: int) -> dict[str, Any]:
    """Normals, colours and part labels among named columns (PLY properties, PCD fields); none is
    checked.
    """
    if raw is None:
        return {}
    names = getattr(raw, "dtype", None)
    have = set(names.names) if names is not None else set(raw)

    def stack(group: tuple[str, ...]) -> np.ndarray:
        return np.stack([np.asarray(raw[name]).reshape(count) for name in group], 1)

    found: dict[str, Any] = {}
    for group in (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")):
        if set(group) <= have:
            found["normals"] = stack(group).astype(np.float32)
    if {"red", "green", "blue"} <= have:
        found["colors"] = to_bytes(stack(("red", "green", "blue")))
    for name in ("rgb", "rgba"):  # PCL's colours: the bytes b, g, r, a of one float or integer
        if name in have and "colors" not in found and np.asarray(raw[name]).dtype.itemsize == 4:
            packed = (
                np.ascontiguousarray(np.asarray(raw[name]).reshape(count))
                .view(np.uint8)
                .reshape(count, 4)
            )
            found["colors"] = packed[:, 2::-1].copy()
    for name in ("part", "label", "class", "classification"):
        if name in have and "parts" not in found:
            found["parts"] = stack((name,))[:, 0]
    return found


# ---------------------------------------------------------------------------------------------- PCD


def read_pcd(path: Path) -> PointCloud:
    """A PCD of any version: ascii, binary or compressed; fields of any type, order and case.

    Raises ReadError.
    """
    with path.open("rb") as file:
        header: dict[str, list[str]] = {}
        above = 0
        while "DATA" not in header and above < 1000 and (text := file.readline(100_000)):
            words, above = text.decode("latin-1").split(), above + 1
            if words and not words[0].startswith("#"):
                header[words[0].upper()] = words[1:]
        row, count = _pcd_row(header)
        way, size = " ".join(header.get("DATA", ())).lower(), count * row.itemsize
        data: Any
        if way == "ascii":
            data = _pcd_ascii(file, above + 1, row, count)
        elif way == "binary":
            check_claim(path, file.tell() + size, 1)
            data = np.frombuffer(file.read(size), row)
            if len(more := file.read(row.itemsize)) == row.itemsize and any(
                more
            ):  # zeros are padding
                raise ReadError(
                    f"damaged: more follows than the {count:,} points that its header says"
                )
        elif way == "binary_compressed":  # all of a field, then all of the next
            packed, unpacked = (int.from_bytes(file.read(4), "little") for _ in range(2))
            check_claim(path, unpacked, 100)  # LZF's best is 88
            content = module("lzf").decompress(file.read(packed), unpacked) or b""
            if not len(content) == unpacked == size:
                raise ReadError(
                    f"truncated or damaged: {len(content):,} bytes of data, {size:,} are needed"
                )
            data, at = np.empty(count, row), 0
            for name in row.names or ():
                end = at + data[name].nbytes
                data[name] = np.frombuffer(content[at:end], data[name].dtype).reshape(
                    data[name].shape
                )
                at = end
        else:
            raise ReadError(
                f"DATA {way or 'is missing'}: known are ascii, binary, binary_compressed"
            )
    return PointCloud.make(
        np.stack([data[axis].astype(np.float64) for axis in "xyz"], 1), **columns_of(data, count)
    )


def _pcd_row(header: dict[str, list[str]]) -> tuple[np.dtype, int]:
    """The type of a point, with names in lower case, and the number of points. Raises ReadError."""
    names, sizes = header.get("FIELDS", header.get("COLUMNS", [])), header.get("SIZE", [])
    kinds, repeats = header.get("TYPE", ["F"] * len(names)), header.get("COUNT", ["1"] * len(names))
    if not names or not len(names) == len(sizes) == len(kinds) == len(repeats):
        told = f"{len(names)} FIELDS, {len(sizes)} SIZE, {len(kinds)} TYPE, {len(repeats)} COUNT"
        raise ReadError(f"damaged or not a PCD file: its header has {told}")
    points, width, height = (
        int((header.get(key) or ["-1"])[0]) for key in ("POINTS", "WIDTH", "HEIGHT")
    )
    grid = width * abs(height) if width >= 0 else -1  # without HEIGHT it is 1
    if points >= 0 and grid >= 0 and points != grid:
        raise ReadError(f"damaged: its header says {points:,} points and {width:,} x {height:,}")
    if (count := max(points, grid)) < 1:
        raise ReadError("no points")
    fields: dict[str, tuple] = {}
    for i, (name, size, kind, repeat) in enumerate(zip(names, sizes, kinds, repeats, strict=True)):
        if (number := f"{kind.lower()}{size}") not in _PCD_KINDS:
            raise ReadError(f"field {name} is of unknown TYPE {kind} and SIZE {size}")
        name = (
            name.lower() if name != "_" and name.lower() not in fields else f"_{i}"
        )  # _: padding, any number of times
        fields[name] = (f"<{number}",) if repeat == "1" else (f"<{number}", (int(repeat),))
    if missing := set("xyz") - {name for name, kind in fields.items() if len(kind) == 1}:
        raise ReadError(f"has no field {min(missing)}; it has {', '.join(names)}")
    return np.dtype([(name, *kind) for name, kind in fields.items()]), count


_PCD_KINDS = {"f2", "f4", "f8"} | {f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)}


def _pcd_ascii(file: IO[bytes], first: int, row: np.dtype, count: int) -> dict[str, np.ndarray]:
    """Columns of text, of the header's types where they fit; fields of several values are left out."""
    at, columns = 0, {}
    for name in row.names or ():
        if row[name].shape == ():
            columns[name] = at
        at += int(np.prod(row[name].shape, dtype=int))
    order = sorted(columns, key=lambda name: name not in {*"xyz"})
    lines = (text.decode("latin-1") for text in file)
    chunks = list(parsed(lines, first, 200_000, None, [columns[name] for name in order]))
    rows = np.concatenate([np.empty((0, len(order))), *chunks])
    if len(rows) != count:
        state = "truncated" if len(rows) < count else "damaged"
        raise ReadError(f"{state}: {len(rows):,} points, but its header says {count:,}")
    data = dict(zip(order, rows.T, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):
        typed = {name: values.astype(row[name]) for name, values in data.items()}
    floats = {name for name in order if row[name].kind == "f"}
    return {
        name: typed[name] if name in floats or (typed[name] == data[name]).all() else data[name]
        for name in order
    }


# ---------------------------------------------------------------------------------------------- LAS


def _check_las(path: Path) -> None:
    """ReadError where a header says fewer points than follow, or what laspy would loop over for
    hours; or no lazrs.
    """
    with path.open("rb") as file:
        head = file.read(375).ljust(375, b"\0")

        def number(at: int, size: int) -> int:
            return int.from_bytes(head[at : at + size], "little")

        start, minor, length = number(96, 4), number(25, 1), number(105, 2)
        check_claim(path, 54 * number(100, 4), 1)  # records of variable length
        if head[104] & 0x80:  # compressed
            module("lazrs")
            file.seek(start)
            table = int.from_bytes(file.read(8), "little", signed=True)
            if table < 0:  # written as a stream: the offset is at the end
                file.seek(-8, 2)
                table = int.from_bytes(file.read(8), "little", signed=True)
            file.seek(max(table, 0) + 4)
            check_claim(
                path, int.from_bytes(file.read(4), "little"), 1
            )  # chunks, or lazrs aborts the process
            return
    behind = [
        number(227, 8) if minor > 2 else 0,
        number(235, 8) if minor > 3 else 0,
    ]  # wave forms, long records
    held = (min(at or path.stat().st_size for at in behind) - start) // max(1, length)
    if held > (said := number(247, 8) if minor > 3 else number(107, 4)):
        raise ReadError(f"damaged: its header says {said:,} points, but {held:,} follow")


def las_records(path: Path, size: int = 500_000) -> Iterator[Any]:
    """laspy's records of a LAS or LAZ file, `size` at a time.

    Raises ReadError, also where some are missing.
    """
    laspy, seen = module("laspy"), 0
    _check_las(path)
    try:
        # one thread: of a damaged chunk table the parallel decompressor allocates what it claims,
        # and aborts
        with laspy.open(path, read_evlrs=False, laz_backend=laspy.LazBackend.Lazrs) as file:
            header, packed = file.header, file.header.are_points_compressed
            check_claim(path, header.point_count * header.point_format.size, 5000 if packed else 1)
            for records in file.chunk_iterator(size):
                seen += len(records)
                yield records
    except laspy.errors.LaspyException as error:
        raise ReadError(f"damaged or not a LAS file ({line(error)})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, no Exception and not importable
            raise
        raise ReadError(f"damaged or not a LAZ file ({line(error)})") from error
    if seen < header.point_count:
        raise ReadError(f"truncated: {seen} of {header.point_count} points")


def read_las(path: Path) -> PointCloud:
    """LAS and LAZ, in chunks; colours and classification come along."""
    reservoir, color = Reservoir(), False
    for records in las_records(path):
        color = "red" in set(records.point_format.dimension_names)
        names = ("x", "y", "z", "classification") + (("red", "green", "blue") if color else ())
        reservoir.add(np.stack([np.asarray(records[name], np.float64) for name in names], 1))
    rows = reservoir.rows()
    colors = to_bytes(rows[:, 4:]) if color else None
    total = reservoir.total if reservoir.total > len(rows) else None
    return PointCloud.make(
        rows[:, :3], parts=rows[:, 3] if len(rows) else None, colors=colors, total=total
    )


# ------------------------------------------------------------------------------------ E57, PTX, BIN


def read_e57(path: Path) -> PointCloud:
    """All scans of an E57 file, each placed by its pose, without the points that are marked as
    invalid.
    """
    pye57 = module("pye57")
    try:
        file = pye57.E57(str(path))
        try:
            counts = [file.get_header(i).point_count for i in range(file.scan_count)]
            check_claim(path, max(counts, default=0), 8)  # a bit each
            scans = [
                file.read_scan(i, ignore_missing_fields=True)
                for i, count in enumerate(counts)
                if count
            ]
        finally:
            file.close()
    except pye57.libe57.E57Exception as error:
        raise ReadError(f"damaged or not an E57 file ({line(error)})") from error
    if not scans:
        raise ReadError("no points" if counts else "no scans")
    xyz = np.concatenate(
        [np.stack([scan[f"cartesian{axis}"] for axis in "XYZ"], 1) for scan in scans]
    )
    return PointCloud.make(xyz, unseen=sum(counts) - len(xyz))


def read_ptx(path: Path) -> PointCloud:
    """All scans of a PTX file, each placed by its matrix, with colours where there are any."""
    return collected(ptx_rows(path), {"colors": 3})


def ptx_rows(path: Path, size: int = 200_000) -> Iterator[np.ndarray]:
    """Chunks of x, y, z and colours of Leica's PTX, float64 n 6; NaN where nothing was seen. Raises
    ReadError.

    A scan is its columns and rows, the scanner's place and axes, a matrix that acts on rows, and a
    line a point: x y z intensity [r g b], zeros where no light came back.
    """
    with path.open(encoding="latin-1") as text:
        file, at = (
            (line.removeprefix("\u00ef\u00bb\u00bf") for line in text if line.strip()),
            0,
        )  # less a BOM
        while head := list(islice(file, 10)):
            if not "".join(head).strip():
                break
            try:
                count = int(head[0]) * int(head[1])
                matrix = np.array([text.split() for text in head[6:]], np.float64).reshape(4, 4)
            except (ValueError, IndexError):
                raise ReadError(
                    f"lines {at + 1} to {at + 10} are no head of a PTX scan: sizes, axes, matrix"
                ) from None
            check_claim(path, 6 * count, 1)
            lines, done = islice(file, count), 0
            first = next(lines, "")
            columns = [0, 1, 2, 4, 5, 6] if len(first.split()) >= 7 else [0, 1, 2]
            for rows in parsed(chain([first], lines), at + 11, size, None, columns):
                rows = np.pad(rows, ((0, 0), (0, 6 - rows.shape[1])), constant_values=np.nan)
                rows[(rows[:, :3] == 0).all(1), :3] = np.nan
                rows[:, :3] = rows[:, :3] @ matrix[:3, :3] + matrix[3, :3]
                done += len(rows)
                yield rows
            if done < count:
                raise ReadError(
                    f"truncated: {done:,} of {count:,} points in the scan from line {at + 1} on"
                )
            at += 10 + count


NO_COLUMNS = (
    "a .bin file does not say what its columns are: jepa3d prepare --columns x y z intensity (KITTI), "
    "or x y z intensity ring (nuScenes)"
)


def read_bin(path: Path, columns: tuple[str, ...] | None) -> PointCloud:
    """Rows of float32, whose columns are named, as lidar data sets have them. Raises ReadError."""
    if columns is None:
        raise ReadError(NO_COLUMNS)
    size = path.stat().st_size
    if size % (4 * len(columns)):
        raise ReadError(
            f"{size:,} bytes are no rows of {len(columns)} float32 ({', '.join(columns)}: --columns)"
        )
    chosen = [columns.index(name) for name in coordinate_columns(columns, None)]
    return PointCloud.make(np.fromfile(path, "<f4").reshape(-1, len(columns))[:, chosen])
