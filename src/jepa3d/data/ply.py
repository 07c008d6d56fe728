"""PLY, in text or binary: the only reader of its header and its rows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jepa3d.data.boundary import check_claim
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.polygons import Rows, mesh, runs, strip, triangles, unix_lines, whole
from jepa3d.data.scans import columns_of

_KINDS = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
    "int64": "i8",
    "uint64": "u8",
    "long": "i8",
    "ulong": "u8",
}
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LONGEST_HEADER = 1 << 24  # bytes
Column = (
    np.ndarray | tuple[np.ndarray, np.ndarray]
)  # a value a row; or, of lists, their lengths and all their values


@dataclass(frozen=True)
class Property:
    name: str
    kind: np.dtype
    length: np.dtype | None = None  # of a list: the type of the number before it


@dataclass(frozen=True)
class Element:
    name: str
    count: int
    properties: list[Property]


@dataclass(frozen=True)
class Header:
    """What a PLY file says of itself:

    `order` is "" for text, else the byte order; its rows begin at byte `start`.
    """

    order: str
    elements: list[Element]
    start: int
    old_mac: bool  # lines end with CR alone

    @property
    def is_mesh(self) -> bool:
        return any(e.count for e in self.elements if e.name in ("face", "tristrips"))


# --------------------------------------------------------------------------------------- the header


def read_header(path: Path) -> Header:
    """Raises ReadError for what is no PLY header, or one with types that do not exist."""
    with path.open("rb") as file:
        text = file.read(1000)
        if not (
            begin := re.match(rb"(?:\xef\xbb\xbf)?\s*ply[ \t]*(\r\n|\r|\n)", text, re.IGNORECASE)
        ):
            raise ReadError("not a PLY file: its first line is not ply")
        old_mac = begin[1] == b"\r"
        end = re.compile(rb"[\r\n]end_header[ \t]*" + (rb"\r" if old_mac else rb"\r?\n"))
        while not (found := end.search(text)):
            more = file.read(len(text))
            if not more or len(text) > _LONGEST_HEADER:
                raise ReadError("damaged or not a PLY file: its header has no end")
            text += more
    lines = [line.split() for line in re.split(r"[\r\n]+", text[: found.start()].decode("latin-1"))]
    order = next(
        (_ORDERS.get(words[1]) for words in lines if words[:1] == ["format"] and len(words) > 1),
        None,
    )
    if order is None:
        raise ReadError(f"damaged PLY header: its format is none of {', '.join(_ORDERS)}")
    elements: list[Element] = []
    for words in lines:
        match words:
            case ["element", name, count] if count.isdecimal():
                elements.append(Element(name.lower(), int(count), []))
            case ["property", "list", length, kind, name] if elements:
                number = _kind(length, order)
                if number.kind == "f":
                    raise ReadError(f"damaged PLY header: the length of a list is a {length}")
                elements[-1].properties.append(Property(name.lower(), _kind(kind, order), number))
            case ["property", kind, name] if elements:
                elements[-1].properties.append(Property(name.lower(), _kind(kind, order)))
            case ["element" | "property", *_]:
                raise ReadError(f"damaged PLY header: {' '.join(words)[:80]!r}")
    return Header(order, [e for e in elements if e.properties], found.end(), old_mac)


def _kind(word: str, order: str) -> np.dtype:
    if word.lower() not in _KINDS:
        raise ReadError(f"damaged PLY header: no type is called {word[:40]!r}")
    return np.dtype((order or "=") + _KINDS[word.lower()])


# -------------------------------------------------------------------------------------- whole files


def read_ply(path: Path) -> PointCloud:
    """A mesh of polygons or triangle strips, or a cloud with its normals, colours and labels."""
    header = read_header(path)
    with path.open("rb") as file:
        file.seek(header.start)
        data = file.read()
    found = _columns_of_bytes(header, data) if header.order else _columns_of_text(header, data)
    if "vertex" not in found:
        raise ReadError("no vertices")
    vertex = {
        name: values for name, values in found["vertex"].items() if isinstance(values, np.ndarray)
    }
    if {*"xyz"} - {*vertex}:
        raise ReadError(f"its vertices have no x, y, z; they have {', '.join(vertex) or 'nothing'}")
    vertices = np.stack([vertex[axis].astype(np.float64) for axis in "xyz"], 1)
    faces = np.empty((0, 3), np.int64)
    if "face" in found:
        faces = triangles(vertices, *_corners(found["face"], "faces"))
    if "tristrips" in found:
        sizes, corners = _corners(found["tristrips"], "strips")
        faces = np.concatenate([faces, strip(np.insert(corners, np.cumsum(sizes), -1))])
    return mesh(vertices, faces, **columns_of(vertex, len(vertices)))


def _corners(columns: dict[str, Column], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Number of corners of each face and their vertices one after the other."""
    lists = {name: values for name, values in columns.items() if not isinstance(values, np.ndarray)}
    names = [name for name in ("vertex_indices", "vertex_index") if name in lists] or list(lists)
    if not names:
        raise ReadError(f"its {what} have no list vertex_indices; they have {', '.join(columns)}")
    sizes, values = lists[names[0]]
    return sizes, whole(values)


def _columns_of_text(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """Every element's columns; a row is a line."""
    rows, found, first = Rows(unix_lines(data)), {}, 0
    for element in header.elements:
        last, columns = first + element.count, {}
        if last > len(rows):
            raise ReadError(
                f"truncated: {max(len(rows) - first, 0)} of {element.count} of its {element.name} rows"
            )
        values, at = rows.numbers(
            first, last, integers=all(p.kind.kind != "f" for p in element.properties)
        )
        ends = at + rows.counts[first:last]
        for p in element.properties:
            if p.length is not None and element.count and (at == ends).all():
                continue  # Blender declared lists that it did not write
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
        raise ReadError(f"truncated or damaged in row {int(good.argmin())} of its {element.name}")


def _columns_of_bytes(header: Header, data: bytes) -> dict[str, dict[str, Column]]:
    """Every element's columns; rows of lists are walked one by one, unless all are as long as the
    first.
    """
    found, at = {}, 0
    for element in (e for e in header.elements if e.count):
        most = (len(data) - at) // sum((p.length or p.kind).itemsize for p in element.properties)
        if element.count > most:
            raise ReadError(
                f"truncated: at most {most} of {element.count} of its {element.name} rows"
            )
        first, end = _walked(element, header.order, data, at, 1)
        lengths = {i: int(c[0][0]) for i, c in enumerate(first.values()) if isinstance(c, tuple)}
        table = np.frombuffer(
            data, row_type(element, lengths), min(element.count, (len(data) - at) // (end - at)), at
        )
        if len(table) < element.count or any(
            (table[f"length {i}"] != n).any() for i, n in lengths.items()
        ):
            found[element.name], at = _walked(element, header.order, data, at, element.count)
            continue
        found[element.name] = {
            p.name: (np.full(len(table), lengths[i]), table[f"{i}"].reshape(-1))
            if i in lengths
            else table[f"{i}"]
            for i, p in enumerate(element.properties)
        }
        at += table.nbytes
    return found


def row_type(element: Element, lengths: dict[int, int]) -> np.dtype:
    """The type of a binary row whose lists, by the number of the property, have these lengths."""
    fields: list = []
    for i, p in enumerate(element.properties):
        fields += (
            [(f"length {i}", p.length), (f"{i}", p.kind, (lengths[i],))]
            if p.length
            else [(f"{i}", p.kind)]
        )
    return np.dtype(fields)


def _walked(
    element: Element, order: str, data: bytes, at: int, count: int
) -> tuple[dict[str, Column], int]:
    """Columns of `count` binary rows of any lengths from byte `at` on, and where they end."""
    byteorder = "big" if order == ">" else "little"
    plan = [
        (
            p.length and p.length.itemsize,
            p.length is not None and p.length.kind == "i",
            p.kind.itemsize,
            [],
            [],
        )
        for p in element.properties
    ]
    for row in range(count):
        for number, signed, width, lengths, pieces in plan:
            if number:
                lengths.append(int.from_bytes(data[at : at + number], byteorder, signed=signed))
                at, width = at + number, max(lengths[-1], 0) * width
            pieces.append(data[at : at + width])
            at += width
        if at > len(data):
            raise ReadError(
                f"truncated or damaged in row {row} of {element.count} of its {element.name}"
            )
    columns: dict[str, Column] = {}
    for p, (number, _, _, lengths, pieces) in zip(element.properties, plan, strict=True):
        values = np.frombuffer(b"".join(pieces), p.kind)
        columns[p.name] = (np.array(lengths), values) if number else values
    return columns, at


# ---------------------------------------------------------------------------------------- in chunks


def vertex_chunks(path: Path, header: Header, size: int) -> Iterator[np.ndarray] | None:
    """The vertices, float64 n 3, at most `size` at once;

    None where other rows or lists are in the way.
    """
    vertex = header.elements[0] if header.elements else Element("", 0, [])
    names = [p.name for p in vertex.properties]
    if (
        vertex.name != "vertex"
        or header.old_mac
        or {*"xyz"} - {*names}
        or any(p.length for p in vertex.properties)
    ):
        return None
    columns = [names.index(axis) for axis in "xyz"]
    return (_chunks_of_bytes if header.order else _chunks_of_text)(
        path, header.start, vertex, columns, size
    )


def _chunks_of_bytes(
    path: Path, start: int, vertex: Element, columns: list[int], size: int
) -> Iterator[np.ndarray]:
    kind = row_type(vertex, {})
    check_claim(path, start + vertex.count * kind.itemsize, 1)
    for at in range(0, vertex.count, size):
        table = np.fromfile(
            path, kind, min(size, vertex.count - at), offset=start + at * kind.itemsize
        )
        yield np.stack([table[f"{i}"].astype(np.float64) for i in columns], 1)


def _chunks_of_text(
    path: Path, start: int, vertex: Element, columns: list[int], size: int
) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        file.seek(start)
        lines = islice((line for line in file if line.strip()), vertex.count)
        done = 0
        while done < vertex.count:
            rows = Rows(b"".join(islice(lines, size)))
            if rows.counts.min(initial=99) <= max(columns) or not len(rows):
                raise ReadError(
                    f"truncated or damaged: {done} or a few more of {vertex.count} points"
                )
            values, at = rows.numbers()
            yield values[at[:, None] + columns]
            done += len(rows)
