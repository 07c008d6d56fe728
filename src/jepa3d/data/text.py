"""Tables of numbers: XYZ, TXT, CSV, PTS. Streamed, so that a file of any size needs bounded memory."""

import re
from itertools import chain, islice
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, Reservoir, to_bytes

_CHUNK = 200_000  # lines parsed at once
COMMENT = ("#", "//")
_NORMALS = (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"))
_COLORS = (("r", "g", "b"), ("red", "green", "blue"))
_PARTS = ("part", "label", "classification", "class", "segment")


def read_table(path: Path, columns: tuple[str, ...] | None = None, names: tuple[str, ...] = ()) -> PointCloud:
    """A cloud from lines of numbers; the delimiter is sniffed, as is a header.

    columns: the header's names of x, y and z, where it has others than x, y, z. names: the columns of a file that is
    known to have no header. Without both, the first three columns are x, y, z and others are left alone.
    Raises ReadError, and what numpy raises for rows of other lengths or words.
    """
    with path.open(encoding="utf-8-sig") as file:
        head = list(islice(file, 50))
        header, skip, delimiter = sniff(head)
        names = tuple(header) if header else names
        xyz = coordinate_columns(names, columns) if names else ("0", "1", "2")
        first = next((line for line in head[skip:] if line.strip() and not line.startswith(COMMENT)), "")
        numeric = {name for name, field in zip(names, first.split(delimiter), strict=False) if _is_number(field)}
        used = {"xyz": xyz} | _attributes(numeric - set(xyz))
        order = names or xyz
        usecols = [order.index(name) for group in used.values() for name in group]
        reservoir = Reservoir()
        lines = islice(chain(head, file), skip, None)
        while chunk := [line for line in islice(lines, _CHUNK) if line.strip() and not line.startswith(COMMENT)]:
            reservoir.add(np.loadtxt(chunk, delimiter=delimiter, usecols=usecols, ndmin=2, comments=None))
    rows, at = reservoir.rows(), 3
    if not len(rows):
        raise ReadError("no rows of numbers")
    attributes = {}
    for key in list(used)[1:]:
        width = len(used[key])
        attributes[key] = _typed(key, rows[:, at : at + width])
        at += width
    total = reservoir.total if reservoir.total > len(rows) else None
    return PointCloud.make(rows[:, :3], total=total, **attributes)


def check_table(path: Path) -> None:
    """ReadError for a file whose first lines are no table of numbers."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        sniff(list(islice(file, 50)))


def sniff(head: list[str]) -> tuple[list[str] | None, int, str | None]:
    """Lower-case header names or None, lines to skip, and the delimiter, of a file's first lines."""
    rows = [(i, line) for i, line in enumerate(head) if line.strip() and not line.startswith(COMMENT)]
    if not rows:
        raise ReadError("no rows of numbers")
    delimiter = next((mark for mark in (",", ";") if mark in rows[-1][1]), None)

    def fields(line: str) -> list[str]:
        return [field.strip().strip('"') for field in line.split(delimiter)]

    first, line = rows[0]
    if len(rows) > 1 and len(fields(line)) == 1 and line.strip().isdigit():  # PTS begins with the number of points
        return None, first + 1, delimiter
    if any(not _is_number(field) for field in fields(line)):
        names = [_plain(field) for field in fields(line)]
        if len(rows) < 2 or not any(_is_number(field) for field in fields(rows[1][1])):
            raise ReadError(f"no rows of numbers: the first line is {line.strip()[:60]!r}")
        if len(set(names)) < len(names):
            raise ReadError(f"two columns of one name in its header: {', '.join(names)}")
        return names, first + 1, delimiter
    width = len(fields(line))
    if width < 3:
        raise ReadError(f"{width} columns, at least 3 are needed (x, y, z)")
    for comment in reversed(head[:first]):  # CloudCompare: //X Y Z R G B
        names = [_plain(field) for field in fields(comment.lstrip("#/ ").strip())]
        if len(names) == width and {"x", "y", "z"} <= set(names) and len(set(names)) == width:
            return names, first, delimiter
    return None, first, delimiter


def coordinate_columns(names: tuple[str, ...], columns: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the x, y and z columns; a choice between several is never guessed."""
    if columns:
        wanted = tuple(_plain(name) for name in columns)
        if missing := [name for name in wanted if name not in names]:
            raise ReadError(f"has no column {missing[0]!r} (--columns); it has {', '.join(names)}")
        return wanted
    if {"x", "y", "z"} <= set(names):
        return ("x", "y", "z")
    stems = [re.sub("x", "{}", name, count=1) for name in names if "x" in name]
    triples = [t for t in ([stem.format(axis) for axis in "xyz"] for stem in stems) if set(t) <= set(names)]
    triples = [t for t in triples if not t[0].startswith("n")]
    if len(triples) == 1:
        return tuple(triples[0])
    found = f"{len(triples)} triples: {'; '.join(','.join(t) for t in triples)}" if triples else ", ".join(names)
    raise ReadError(f"no columns x, y, z, but {found}; choose with --columns of jepa3d prepare")


def _attributes(have: set[str]) -> dict[str, tuple[str, ...]]:
    """The columns of normals, colours and part labels among those of numbers."""
    known = {"normals": _NORMALS, "colors": _COLORS, "parts": tuple((name,) for name in _PARTS)}
    found = {key: next((group for group in groups if set(group) <= have), ()) for key, groups in known.items()}
    return {key: group for key, group in found.items() if group}


def _typed(key: str, values: np.ndarray) -> np.ndarray:
    if key == "normals":
        return values.astype(np.float32)
    return to_bytes(values) if key == "colors" else values[:, 0]


def _plain(name: str) -> str:
    """A header's name without quotes, unit and case: 'X [m]' is x."""
    return re.sub(r"\s*[\[(].*[\])]$", "", name.strip().strip('"')).lower()


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
