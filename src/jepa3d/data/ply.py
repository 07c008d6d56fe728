"""PLY, in text or binary, read whole or in chunks; and the header to write one."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.errors import check_claim
from jepa3d.data.polygons import Rows, mesh, runs, strip, triangles, unix_lines, whole
from jepa3d.data.scans import attributes_of

_OF_C = "char uchar short ushort int uint long ulong float double"
_OF_NUMPY = "int8 uint8 int16 uint16 int32 uint32 int64 uint64 float32 float64"
_KINDS: dict[str, str] = dict(zip(_OF_C.split(), _OF_NUMPY.split(), strict=True))
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LONGEST_HEADER = 1 << 24  # bytes
# the value of each row or, for lists, the length of each and all values
Column = np.ndarray | tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Property:
    name: str
    kind: np.dtype
    length: np.dtype | None = None  # of a list: the type of the number before it


@dataclass(frozen=True)
class Element:
    name: str
    count: int
    properties: list[Property] = field(default_factory=list)

    def add(self, name: str, kind: np.dtype, length: np.dtype | None = None) -> None:
        """Add a property. A repeated name gets a number, so that the first one counts."""
        name, names = name.lower(), [p.name for p in self.properties]
        name = f"{name} {len(names)}" if name in names else name
        self.properties.append(Property(name, kind, length))


@dataclass(frozen=True)
class Header:
    """The header of a PLY file."""

    order: str  # of bytes; "" for text
    elements: list[Element]
    start: int  # byte at which its rows begin
    old_mac: bool  # lines end with CR alone

    @property
    def is_mesh(self) -> bool:
        return any(e.count for e in self.elements if e.name in ("face", "tristrips"))


# --------------------------------------------------------------------------------------- the header


def read_header(path: Path) -> Header:
    """The header of a file. Raises ReadError if it is no PLY or names unknown types."""
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
            if not more or len(text) > _LONGEST_HEADER:
                raise ReadError("damaged or not a PLY file: its header has no end")
            text += more
    lines = re.split(r"[\r\n]+", text[: found.start()].decode("latin-1"))
    rows = [line.split() for line in lines]
    damaged = "damaged PLY header"
    name = next((row[1] for row in rows if row[:1] == ["format"] and row[1:]), None)
    if name not in _ORDERS:
        raise ReadError(f"{damaged}: its format is none of {', '.join(_ORDERS)}")
    order = _ORDERS[name]
    elements: list[Element] = []
    for words in rows:
        match words:
            case ["element", name, count] if count.isdecimal():
                elements.append(Element(name.lower(), int(count)))
            case ["property", "list", length, kind, name] if elements:
                number = _kind(length, order)
                if number.kind == "f":
                    raise ReadError(f"{damaged}: the length of a list is a {length}")
                elements[-1].add(name, _kind(kind, order), number)
            case ["property", kind, name] if elements:
                elements[-1].add(name, _kind(kind, order))
            case ["element" | "property", *_]:
                raise ReadError(f"{damaged}: {' '.join(words)[:80]!r}")
    return Header(order, [e for e in elements if e.properties], found.end(), old_mac)


def _kind(word: str, order: str) -> np.dtype:
    name = _KINDS.get(word.lower(), word.lower())
    if name not in _KINDS.values():
        raise ReadError(f"damaged PLY header: no type is called {word[:40]!r}")
    return np.dtype((order or "=") + np.dtype(name).str[1:])


def header_of(row: np.dtype, count: int, comments: Iterable[str] = ()) -> bytes:
    """The header of a binary PLY of `count` vertices with rows of this type."""
    names = {kind: name for name, kind in _KINDS.items()}
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {text}" for text in comments]
    lines.append(f"element vertex {count}")
    lines += [f"property {names[row[name].name]} {name}" for name in row.names or ()]
    return "\n".join([*lines, "end_header\n"]).encode()


# -------------------------------------------------------------------------------------- whole files


def read_ply(path: Path) -> PointCloud:
    """A mesh of polygons or triangle strips, or a cloud with its normals, colours and labels."""
    header = read_header(path)
    with path.open("rb") as file:
        file.seek(header.start)
        data = file.read()
    found = (_columns_of_bytes if header.order else _columns_of_text)(header, data)
    if "vertex" not in found:
        raise ReadError("no vertices")
    columns = found["vertex"].items()
    vertex = {key: column for key, column in columns if isinstance(column, np.ndarray)}
    if {*"xyz"} - {*vertex}:
        have = ", ".join(vertex) or "nothing"
        raise ReadError(f"its vertices have no x, y, z; they have {have}")
    vertices = np.stack([vertex[axis].astype(np.float64) for axis in "xyz"], 1)
    faces = np.empty((0, 3), np.int64)
    if "face" in found:
        faces = triangles(vertices, *_corners(found["face"], "faces"))
    if "tristrips" in found:
        sizes, corners = _corners(found["tristrips"], "strips")
        faces = np.concatenate([faces, strip(np.insert(corners, np.cumsum(sizes), -1))])
    return mesh(vertices, faces, **attributes_of(vertex))


def _corners(columns: dict[str, Column], what: str) -> tuple[np.ndarray, np.ndarray]:
    """The number of corners of each face, and the vertices of all corners one after the other."""
    lists = {name: c for name, c in columns.items() if isinstance(c, tuple)}
    if not lists:
        have = ", ".join(columns)
        raise ReadError(f"its {what} have no list vertex_indices; they have {have}")
    known = [name for name in ("vertex_indices", "vertex_index") if name in lists]
    sizes, values = lists[[*known, *lists][0]]
    return sizes, whole(values)


def _columns_of_text(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """The columns of every element; a row is a line."""
    rows, found, first = Rows(unix_lines(data)), {}, 0
    for element in header.elements:
        last, columns = first + element.count, {}
        if last > len(rows):
            have = f"{max(len(rows) - first, 0)} of {element.count}"
            raise ReadError(f"truncated: {have} of its {element.name} rows")
        integers = all(p.kind.kind != "f" for p in element.properties)
        values, at = rows.numbers(first, last, integers)
        ends = at + rows.counts[first:last]
        for p in element.properties:
            if p.length is not None and element.count and (at == ends).all():
                continue  # Blender declares lists that it does not write
            _check_rows(element, at < ends)
            if p.length is None:
                columns[p.name], at = values[at], at + 1
                continue
            lengths, at = whole(values[at]), at + 1
            _check_rows(element, (lengths >= 0) & (at + lengths <= ends))
            columns[p.name], at = (lengths, values[runs(at, lengths)]), at + lengths
        found[element.name], first = columns, last
    return found


def _check_rows(element: Element, good: np.ndarray) -> None:
    if not good.all():
        where = f"in row {int(good.argmin())} of its {element.name}"
        raise ReadError(f"truncated or damaged {where}")


def _columns_of_bytes(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """The columns of every element.

    Rows are read as a table if all lists have the lengths of the first row, else one by one.
    """
    found, at = {}, 0
    for element in (e for e in header.elements if e.count):
        smallest = sum((p.length or p.kind).itemsize for p in element.properties)
        if element.count > (fits := (len(data) - at) // smallest):
            have = f"at most {fits} of {element.count}"
            raise ReadError(f"truncated: {have} of its {element.name} rows")
        first, end = _one_by_one(element, header.order, data, at, 1)
        lists = [(name, c) for name, c in first.items() if isinstance(c, tuple)]
        lengths = {name: int(column[0][0]) for name, column in lists}
        fits = min(element.count, (len(data) - at) // (end - at))
        table = np.frombuffer(data, _row_type(element, lengths), fits, at)
        columns: dict[str, Column] = {p.name: table[p.name] for p in element.properties}
        equal = True
        for name, length in lengths.items():
            equal &= bool((table[f"length of {name}"] == length).all())
            columns[name] = (np.full(fits, length), table[name].reshape(-1))
        end = at + table.nbytes
        if fits < element.count or not equal:
            columns, end = _one_by_one(element, header.order, data, at, element.count)
        found[element.name], at = columns, end
    return found


def _row_type(element: Element, lengths: dict[str, int]) -> np.dtype:
    """The type of a binary row whose lists have these lengths."""
    fields: list = []
    for p in element.properties:
        fields += [(f"length of {p.name}", p.length)] if p.length else []
        fields.append((p.name, p.kind, (lengths[p.name],) if p.length else ()))
    return np.dtype(fields)


def _one_by_one(
    element: Element, order: str, data: bytes, at: int, count: int
) -> tuple[dict[str, Column], int]:
    """Columns of `count` binary rows with lists of any lengths, from byte `at` on, and their end."""
    byteorder: Literal["big", "little"] = "big" if order == ">" else "little"
    # for each property: bytes of a list's length, its sign, bytes of a value, lengths, values
    plan = []
    for p in element.properties:
        number = p.length.itemsize if p.length else 0
        signed = bool(p.length and p.length.kind == "i")
        plan.append((number, signed, p.kind.itemsize, [], []))
    for row in range(count):
        for number, signed, width, lengths, pieces in plan:
            if number:
                size = int.from_bytes(data[at : at + number], byteorder, signed=signed)
                lengths.append(size)
                at, width = at + number, max(size, 0) * width
            pieces.append(data[at : at + width])
            at += width
        if at > len(data):
            where = f"in row {row} of {count} of its {element.name}"
            raise ReadError(f"truncated or damaged {where}")
    columns: dict[str, Column] = {}
    for p, (*_, lengths, pieces) in zip(element.properties, plan, strict=True):
        values = np.frombuffer(b"".join(pieces), p.kind)
        columns[p.name] = (np.array(lengths), values) if p.length else values
    return columns, at


# ---------------------------------------------------------------------------------------- in chunks


def ply_rows(path: Path, size: int, attributes: bool) -> Iterator[np.ndarray] | None:
    """The vertices of a cloud, float64 n 3, at most `size` at a time. Raises ReadError for a mesh.

    None for a file whose vertices have lists or do not come first; it must be read whole.
    """
    header = read_header(path)
    if header.is_mesh:
        raise ReadError("a mesh; a scene is a cloud of points")
    vertex = header.elements[0] if header.elements else Element("", 0)
    names = [p.name for p in vertex.properties]
    lists = any(p.length for p in vertex.properties)
    if vertex.name != "vertex" or header.old_mac or {*"xyz"} - {*names} or lists:
        return None
    chunks = _chunks_of_bytes if header.order else _chunks_of_text
    return chunks(path, header.start, vertex, size)


def _chunks_of_bytes(path: Path, start: int, vertex: Element, size: int):
    kind = _row_type(vertex, {})
    check_claim(path, start + vertex.count * kind.itemsize, 1)
    for at in range(0, vertex.count, size):
        count, offset = min(size, vertex.count - at), start + at * kind.itemsize
        table = np.fromfile(path, kind, count, offset=offset)
        yield np.stack([table[axis].astype(np.float64) for axis in "xyz"], 1)


def _chunks_of_text(path: Path, start: int, vertex: Element, size: int):
    names = [p.name for p in vertex.properties]
    columns = [names.index(axis) for axis in "xyz"]
    with path.open("rb") as file:
        file.seek(start)
        lines, done = islice((line for line in file if line.strip()), vertex.count), 0
        while done < vertex.count:
            rows = Rows(b"".join(islice(lines, size)))
            if rows.counts.min(initial=99) <= max(columns) or not len(rows):
                where = f"{done} or a few more of {vertex.count} points"
                raise ReadError(f"truncated or damaged: {where}")
            values, at = rows.numbers()
            yield values[at[:, None] + columns]
            done += len(rows)
