"""Read PLY in text or binary, whole or in chunks, and make the header of a PLY to write."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa3d.data import cloud as clouds
from jepa3d.data.cloud import PointCloud, ReadError, attributes_of
from jepa3d.data.errors import check_claim
from jepa3d.data.meshes import Rows, mesh, runs, strip, triangles, unix_lines, whole

# the names of types in PLY: the older names are those of C, the newer ones those of numpy
_OF_C = "char uchar short ushort int uint long ulong float double"
_OF_NUMPY = "int8 uint8 int16 uint16 int32 uint32 int64 uint64 float32 float64"
_KINDS: dict[str, str] = dict(zip(_OF_C.split(), _OF_NUMPY.split(), strict=True))
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
# If more than this many bytes (16 MiB) have been read and the header has not ended, the file is
# refused.
_MAX_HEADER = 1 << 24
# the values of a property: an array with one value per row; if the rows have lists, a pair of
# arrays instead (the length of each list, and all values concatenated)
Column = np.ndarray | tuple[np.ndarray, np.ndarray]


class Property(NamedTuple):
    """A column in the table of an element."""

    name: str
    kind: np.dtype
    # if each row has a list: the type of the length that stands before the list
    length: np.dtype | None = None


class Element(NamedTuple):
    """A kind of item in a PLY file (vertex, face): a table with `count` rows."""

    name: str
    count: int
    properties: list[Property]


class Header(NamedTuple):
    """The header of a PLY file."""

    order: str  # byte order, "<" or ">"; "" for text
    elements: list[Element]
    start: int  # offset in bytes of the first row
    old_mac: bool  # True if lines end with CR alone


# --------------------------------------------------------------------------------------- the header


def read_header(path: Path) -> Header:
    """Read the header of a file. Raises ReadError if the file is no PLY or its header is damaged."""
    with path.open("rb") as file:
        text = file.read(1000)
        first_line = rb"(?:\xef\xbb\xbf)?\s*ply[ \t]*(\r\n|\r|\n)"
        if not (begin := re.match(first_line, text, re.IGNORECASE)):
            raise ReadError("not a PLY file: its first line is not ply")
        old_mac = begin[1] == b"\r"
        line_end = rb"\r" if old_mac else rb"\r?\n"
        end = re.compile(rb"[\r\n]end_header[ \t]*" + line_end)
        while not (found := end.search(text)):
            more = file.read(len(text))
            if not more or len(text) > _MAX_HEADER:
                raise ReadError("damaged or not a PLY file: its header does not end")
            text += more
    lines = re.split(r"[\r\n]+", text[: found.start()].decode("latin-1"))
    rows = [line.split() for line in lines]
    damaged = "damaged PLY header"
    name = next((row[1] for row in rows if row[:1] == ["format"] and row[1:]), None)
    if name not in _ORDERS:
        raise ReadError(f"{damaged}: its format is not one of {', '.join(_ORDERS)}")
    order = _ORDERS[name]
    elements: list[Element] = []
    for words in rows:
        match words:
            case ["element", name, count] if count.isdecimal():
                elements.append(Element(name.lower(), int(count), []))
            case ["property", "list", _, _, name] | ["property", _, name] if elements:
                kinds = [word for word in words[1:-1] if word != "list"]
                *length, kind = (_kind(word, order) for word in kinds)
                if length and length[0].kind == "f":
                    raise ReadError(f"{damaged}: a list length cannot be a {words[2]}")
                before, name = elements[-1].properties, name.lower()
                # if a name is repeated, a number is added to the names of the later properties
                if name in [p.name for p in before]:
                    name = f"{name} {len(before)}"
                before.append(Property(name, kind, *length))
            case ["element" | "property", *_]:
                raise ReadError(f"{damaged} at {' '.join(words)[:80]!r}")
    return Header(order, [e for e in elements if e.properties], found.end(), old_mac)


def _kind(word: str, order: str) -> np.dtype:
    name = _KINDS.get(word.lower(), word.lower())
    if name not in _KINDS.values():
        raise ReadError(f"damaged PLY header: {word[:40]!r} is none of {_OF_NUMPY}")
    return np.dtype((order or "=") + np.dtype(name).str[1:])


def header_of(row: np.dtype, count: int, comments: Iterable[str] = ()) -> bytes:
    """Make the header of a binary PLY with `count` vertices.

    row: structured type of a row; the names of its fields become the names of the properties.
    """
    names = {kind: name for name, kind in _KINDS.items()}
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {text}" for text in comments]
    lines.append(f"element vertex {count}")
    lines += [f"property {names[row[name].name]} {name}" for name in row.names or ()]
    return "\n".join([*lines, "end_header\n"]).encode()


# -------------------------------------------------------------------------------------- whole files


def read_ply(path: Path) -> PointCloud:
    """Read a mesh of polygons or triangle strips, or a cloud if there are no faces.

    Normals, colours and labels are read too, if the file has them. Raises ReadError if the file is
    damaged, or if its vertices lack x, y or z.
    """
    header = read_header(path)
    with path.open("rb") as file:
        file.seek(header.start)
        data = file.read()
    found = _columns(header, data)
    if "vertex" not in found:
        raise ReadError(f"has no element vertex; it has {', '.join(found) or 'none'}")
    vertex = {k: c for k, c in found["vertex"].items() if isinstance(c, np.ndarray)}
    if {*"xyz"} - {*vertex}:
        raise ReadError(f"its vertices have no x, y, z; they have {', '.join(vertex)}")
    vertices = np.stack([vertex[axis].astype(np.float64) for axis in "xyz"], 1)
    faces = np.empty((0, 3), np.int64)
    if "face" in found:
        faces = triangles(vertices, *_corners(found["face"], "faces"))
    if "tristrips" in found:
        sizes, corners = _corners(found["tristrips"], "strips")
        faces = np.concatenate([faces, strip(np.insert(corners, np.cumsum(sizes), -1))])
    return mesh(vertices, faces, **attributes_of(vertex))


def _corners(columns: dict[str, Column], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of corners of each face or strip, and the vertex indices of all corners.

    what: "faces" or "strips", for the error message.
    """
    lists = {name: c for name, c in columns.items() if isinstance(c, tuple)}
    if not lists:
        have = ", ".join(columns)
        raise ReadError(f"its {what} have no list vertex_indices, only {have}")
    known = [name for name in ("vertex_indices", "vertex_index") if name in lists]
    sizes, values = lists[[*known, *lists][0]]
    return sizes, whole(values)


def _columns(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """Parse the columns of every element. data: the text or bytes below the header."""
    return (_columns_of_bytes if header.order else _columns_of_text)(header, data)


def _columns_of_text(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """Parse the columns of every element from text, in which each row is one line."""
    rows, found, first = Rows(unix_lines(data)), {}, 0
    for element in header.elements:
        last, columns = first + element.count, {}
        _check_count(element, max(len(rows) - first, 0))
        integers = all(p.kind.kind != "f" for p in element.properties)
        values, at = rows.numbers(first, last, integers)
        ends = at + rows.counts[first:last]
        for p in element.properties:
            if p.length is not None and element.count and (at == ends).all():
                continue  # missing in all rows: Blender declares lists that it does not write
            _check_rows(element, at < ends)
            if p.length is None:
                columns[p.name], at = _typed(values[at], p.kind), at + 1
                continue
            lengths, at = whole(values[at]), at + 1
            _check_rows(element, (lengths >= 0) & (at + lengths <= ends))
            columns[p.name], at = (lengths, values[runs(at, lengths)]), at + lengths
        found[element.name], first = columns, last
    return found


def _typed(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Convert numbers of a text to the integer type that the header states.

    They stay as they are if the type is no integer, or if a number does not fit it.
    """
    typed = values.astype(kind)
    return typed if kind.kind != "f" and (typed == values).all() else values


def _check_count(element: Element, have: int) -> None:
    if have < element.count:
        raise ReadError(f"truncated: {have} of {element.count} rows of {element.name}")


def _check_rows(element: Element, good: np.ndarray) -> None:
    if not good.all():
        raise ReadError(f"truncated or damaged: row {good.argmin()} of {element.name}")


def _columns_of_bytes(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """Parse the columns of every element from binary data.

    If each list property has the same length in all rows of an element, all rows of this element
    are read as one numpy table. If not, they are read one by one.
    """
    found, at = {}, 0
    for element in (e for e in header.elements if e.count):
        smallest = sum((p.length or p.kind).itemsize for p in element.properties)
        _check_count(element, (len(data) - at) // smallest)
        first, end = _one_by_one(element, data, at, 1)
        lists = [(name, c) for name, c in first.items() if isinstance(c, tuple)]
        lengths = {name: int(column[0][0]) for name, column in lists}
        fits = min(element.count, (len(data) - at) // (end - at))
        table = np.frombuffer(data, _row_type(element, lengths), fits, at)
        columns: dict[str, Column] = {p.name: table[p.name] for p in element.properties}
        is_table = fits == element.count
        for name, length in lengths.items():
            is_table &= bool((table[f"length of {name}"] == length).all())
            columns[name] = (np.full(fits, length), table[name].reshape(-1))
        end = at + table.nbytes
        if not is_table:
            columns, end = _one_by_one(element, data, at, element.count)
        found[element.name], at = columns, end
    return found


def _row_type(element: Element, lengths: dict[str, int]) -> np.dtype:
    """Return the type of a binary row. lengths: the length of each list, by property name."""
    fields: list = []
    for p in element.properties:
        fields += [(f"length of {p.name}", p.length)] if p.length else []
        fields.append((p.name, p.kind, (lengths[p.name],) if p.length else ()))
    return np.dtype(fields)


def _one_by_one(
    element: Element, data: bytes, at: int, count: int
) -> tuple[dict[str, Column], int]:
    """Read `count` binary rows from byte `at` on; their lists may differ in length.

    Returns the columns of the rows, and the byte after the last row.
    """
    lengths = {p.name: [] for p in element.properties}
    pieces = {p.name: [] for p in element.properties}
    for row in range(count):
        for p in element.properties:
            size = 1
            if p.length:
                begin, at = at, at + p.length.itemsize
                size = int(np.frombuffer(data[begin:at].ljust(8), p.length, 1)[0])
                lengths[p.name].append(size)
            begin, at = at, at + size * p.kind.itemsize
            if not begin <= at <= len(data):
                raise ReadError(f"truncated or damaged: row {row} of {element.name}")
            pieces[p.name].append(data[begin:at])
    columns: dict[str, Column] = {}
    for p in element.properties:
        values = np.frombuffer(b"".join(pieces[p.name]), p.kind)
        columns[p.name] = (np.array(lengths[p.name]), values) if p.length else values
    return columns, at


# ---------------------------------------------------------------------------------------- in chunks


def ply_rows(path: Path) -> Iterator[np.ndarray] | None:
    """Return an iterator over the vertices of a cloud in chunks, arrays [n, 3] float64.

    Returns None if the file must be read whole. This is the case if its vertices have lists, lack a
    coordinate or are not the first element, or if its lines end with CR alone. Raises ReadError for
    a mesh, and for a damaged header. The iterator raises ReadError if the vertices are truncated or
    damaged.
    """
    header = read_header(path)
    if any(e.count for e in header.elements if e.name in ("face", "tristrips")):
        raise ReadError("is a mesh, but a scene must be a cloud of points")
    vertex = header.elements[0] if header.elements else Element("", 0, [])
    names = [p.name for p in vertex.properties if not p.length]
    lists = len(names) < len(vertex.properties)
    if vertex.name != "vertex" or header.old_mac or {*"xyz"} - {*names} or lists:
        return None
    return _chunks(path, header, vertex)


def _chunks(path: Path, header: Header, vertex: Element) -> Iterator[np.ndarray]:
    # the number of bytes of a row; 0 for text, whose rows differ in length
    width = _row_type(vertex, {}).itemsize if header.order else 0
    check_claim(path, header.start + vertex.count * width, 1)
    with path.open("rb") as file:
        file.seek(header.start)
        lines = (line for line in file if line.strip())
        for at in range(0, vertex.count, clouds.CHUNK):
            count = min(clouds.CHUNK, vertex.count - at)
            data = file.read(count * width) if width else b"".join(islice(lines, count))
            piece = header._replace(elements=[vertex._replace(count=count)])
            columns = _columns(piece, data)["vertex"]
            yield np.stack([np.asarray(columns[axis], np.float64) for axis in "xyz"], 1)
