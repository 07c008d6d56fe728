"""What scanners write: PCD, LAS, LAZ, E57, by the parsers of the `io` extra."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.boundary import check_claim, line, module
from jepa3d.data.cloud import PointCloud, ReadError, Reservoir, to_bytes


def columns_of(raw, count: int) -> dict[str, np.ndarray]:
    """Normals, colours and part labels among named columns (PLY properties, PCD fields)."""
    if raw is None:
        return {}
    names = getattr(raw, "dtype", None)
    have = set(names.names) if names is not None else set(raw)

    def stack(group: tuple[str, ...]) -> np.ndarray:
        return np.stack([np.asarray(raw[name]).reshape(count) for name in group], 1)

    found: dict[str, np.ndarray] = {}
    for group in (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")):
        if set(group) <= have:
            found["normals"] = stack(group).astype(np.float32)
    if {"red", "green", "blue"} <= have:
        found["colors"] = to_bytes(stack(("red", "green", "blue")))
    for name in ("part", "label", "class", "classification"):
        if name in have and "parts" not in found:
            found["parts"] = stack((name,))[:, 0]
    return found


def read_pcd(path: Path) -> PointCloud:
    pypcd4 = module("pypcd4")
    with path.open("rb") as file:
        lines = [file.readline(10_000).decode("utf-8", "replace").strip() for _ in range(30)]
    end = next((i + 1 for i, line in enumerate(lines) if line.startswith("DATA")), len(lines))
    header = pypcd4.MetaData.parse_header(lines[:end])
    check_claim(path, header.points * sum(s * n for s, n in zip(header.size, header.count, strict=True)), 100)
    cloud = pypcd4.PointCloud.from_path(path)
    if {"x", "y", "z"} - set(cloud.fields):
        raise ReadError(f"has no fields x, y, z; it has {', '.join(cloud.fields)}")
    data = cloud.pc_data
    if len(data) != cloud.points:
        raise ReadError(f"truncated: {len(data)} of {cloud.points} points")
    attributes = columns_of(data, len(data))
    if "rgb" in cloud.fields:
        attributes["colors"] = np.asarray(cloud.decode_rgb(data["rgb"]), np.uint8).reshape(-1, 3)
    return PointCloud.make(np.stack([data[axis].astype(np.float64) for axis in "xyz"], 1), **attributes)


def _checkread_las(path: Path) -> None:
    """ReadError for counts over which laspy would loop for hours, or lazrs abort the process: records, LAZ chunks."""
    with path.open("rb") as file:
        head = file.read(108)
        start, records = (int.from_bytes(head[i : i + 4], "little") for i in (96, 100))
        check_claim(path, 54 * records, 1)
        if head[104:105] >= b"\x80":  # compressed: bit 7 of the point format
            file.seek(start)
            table = int.from_bytes(file.read(8), "little", signed=True)
            if table < 0:  # written as a stream: the offset is at the end
                file.seek(-8, 2)
                table = int.from_bytes(file.read(8), "little", signed=True)
            file.seek(max(table, 0) + 4)
            check_claim(path, int.from_bytes(file.read(4), "little"), 1)


def las_records(path: Path, size: int = 500_000) -> Iterator[Any]:
    """laspy's records of a LAS or LAZ file, `size` at a time. Raises ReadError, also where some are missing."""
    laspy, seen = module("laspy"), 0
    _checkread_las(path)
    try:
        # one thread: of a damaged chunk table the parallel decompressor allocates what it claims, and aborts
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
    return PointCloud.make(rows[:, :3], parts=rows[:, 3] if len(rows) else None, colors=colors, total=total)


def read_e57(path: Path) -> PointCloud:
    """All scans of an E57 file, each placed by its pose."""
    pye57 = module("pye57")
    try:
        file = pye57.E57(str(path))
        try:
            for i in range(file.scan_count):
                check_claim(path, file.get_header(i).point_count, 8)  # a bit each
            scans = [file.read_scan(i, ignore_missing_fields=True) for i in range(file.scan_count)]
        finally:
            file.close()
    except pye57.libe57.E57Exception as error:
        raise ReadError(f"damaged or not an E57 file ({line(error)})") from error
    names = [f"cartesian{axis}" for axis in "XYZ"]
    return PointCloud.make(np.concatenate([np.stack([scan[name] for name in names], 1) for scan in scans]))
