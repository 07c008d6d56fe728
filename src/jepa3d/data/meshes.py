"""Meshes with one kind of row for each thing: OFF, OBJ and STL."""

import re
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, to_bytes
from jepa3d.data.polygons import Rows, mesh, runs, triangles, unix_lines, whole

_OFF = re.compile(rb"\s*((?:ST)?(C?)(N?)(4?n?)(?:OFF|off)([ \t]+BINARY)?)")
# normal, corners, attribute: fields f0, f1, f2
_TRIANGLE = np.dtype("(3,)<f4, (3,3)<f4, <u2")
_HEAD = 84  # bytes of a binary STL: a title of 80 and the number of triangles
_CORNER = re.compile(rb"\bvertex\s+([-+.\dni]\S*\s+[-+.\dni]\S*\s+[-+.\dni]\S*)")


def read_off(path: Path) -> PointCloud:
    """OFF in text. Colours of vertices are kept, those of faces are not. Raises ReadError."""
    text = re.sub(rb"#.*", b"", unix_lines(path.read_bytes()))
    if not (start := _OFF.match(text)):
        raise ReadError("not an OFF file: it does not begin with OFF")
    name, color, normal, dimensions, binary = start.groups()
    if dimensions or binary:
        allowed = "only text with x, y, z a vertex; convert it to OFF or PLY"
        raise ReadError(f"{name.decode()} is not read, {allowed}")
    rows = Rows(text[start.end() :])
    counts = whole(rows.numbers(0, 1)[0][:2]) if len(rows) else np.empty(0)
    if len(counts) < 2 or min(counts) < 0:
        raise ReadError("an OFF file begins with its numbers of vertices and faces")
    num_vertices, num_faces = (int(n) for n in counts)
    first = num_vertices + 1  # row of the first face
    width = rows.counts[1:first].min(initial=99)
    if len(rows) < first + num_faces or width < 3:
        values = rows.numbers()[0][min(rows.counts[0], 3) :]
        return _any_lines(values, num_vertices, num_faces)
    values, at = rows.numbers(1, first)
    rows_of_3, after, colors = at[:, None] + np.arange(3), 6 if normal else 3, None
    vertices = values[rows_of_3]
    if color and width >= after + 3:
        colors = to_bytes(values[rows_of_3 + after])
    values, at = rows.numbers(first, first + num_faces, integers=True)
    sizes, have = whole(values[at]), rows.counts[first : first + num_faces] - 1
    if (wrong := (sizes < 0) | (sizes > have)).any():
        face = int(wrong.argmax())
        raise ReadError(f"face {face} of {sizes[face]} vertices names {have[face]}")
    corners = whole(values[runs(at + 1, sizes)])
    return mesh(vertices, triangles(vertices, sizes, corners), colors=colors)


def _any_lines(values: np.ndarray, num_vertices: int, num_faces: int) -> PointCloud:
    """An OFF file without colours whose lines do not end where its rows do."""
    counts = f"{num_vertices} vertices and {num_faces} faces"
    if len(values) < 3 * num_vertices + num_faces:
        raise ReadError(f"truncated: {len(values)} numbers for {counts}")
    vertices, faces = np.split(values, [3 * num_vertices])
    vertices, at, starts = vertices.reshape(-1, 3), 0, []
    while len(starts) < num_faces and at < len(faces) and faces[at] >= 0:
        starts.append(at)
        at += 1 + int(faces[at])
    if len(starts) < num_faces or at != len(faces):
        raise ReadError(f"truncated or damaged: it does not hold {counts}")
    sizes, corners = faces[starts].astype(np.int64), np.delete(faces, starts)
    return mesh(vertices, triangles(vertices, sizes, whole(corners)))


def read_obj(path: Path) -> PointCloud:
    """The polygons of an OBJ file, or its vertices as a cloud if it has none. Raises ReadError.

    Materials are not opened.
    """
    text = re.sub(rb"#.*", b"", unix_lines(path.read_bytes()))
    text = re.sub(rb"\\[ \t]*\n", b" ", text)
    if surface := re.search(rb"(?m)^[ \t]*(surf|curv2?)[ \t]", text):
        what = f"free-form surfaces ({surface[1].decode()})"
        raise ReadError(f"{what} are not read; convert it to polygons")

    def after(word: bytes) -> bytes:
        return b"\n".join(re.findall(rb"(?m)^[ \t]*" + word + rb"[ \t](.*)", text))

    rows = Rows(after(b"v"))
    if not len(rows):
        raise ReadError("no vertices: not an OBJ file, or an empty one")
    first = int(rows.counts.argmin())
    if rows.counts[first] < 3:
        raise ReadError(f"vertex {first + 1} has {rows.counts[first]} coordinates")
    (values, at), kept = rows.numbers(), {}
    vertices = values[at[:, None] + np.arange(3)]
    if set(rows.counts) <= {6, 7}:
        kept["colors"] = to_bytes(values[at[:, None] + np.arange(3, 6)])
    # only the first number of v/vt/vn
    faces = Rows(re.sub(rb"/\S*", b"", after(b"fo?")))
    corners = whole(faces.numbers(integers=True)[0])
    above = np.ones_like(corners)
    if (corners < 0).any():  # counted back from the last vertex above the line
        kinds = np.array(re.findall(rb"(?m)^[ \t]*(v|f)o?[ \t]", text))
        above = np.repeat(-np.cumsum(kinds == b"v")[kinds == b"f"], faces.counts)
    corners = corners - np.where(corners < 0, above, 1)
    normals = Rows(b"" if len(faces) else after(b"vn")).numbers()[0]
    if len(normals) == 3 * len(vertices):
        kept["normals"] = normals.reshape(-1, 3).astype(np.float32)
    return mesh(vertices, triangles(vertices, faces.counts, corners), **kept)


def read_stl(path: Path) -> PointCloud:
    """All solids of an STL file; triangles share no vertices. Raises ReadError.

    A binary file may begin with the word solid and have a few bytes too many.
    """
    data = path.read_bytes()
    claimed = int.from_bytes(data[80:_HEAD], "little")
    have = max(len(data) - _HEAD, 0) // _TRIANGLE.itemsize
    exact = len(data) == _HEAD + claimed * _TRIANGLE.itemsize
    text = rb"\s*solid\b.*(facet\s+normal|endsolid)"
    if not exact and re.match(text, data, re.IGNORECASE | re.DOTALL):
        corners = _stl_in_text(unix_lines(data).lower())
    elif len(data) < _HEAD:
        what = "no text that begins with solid, and no binary header"
        raise ReadError(f"not an STL file: {what}")
    elif claimed != have:
        state = "truncated" if claimed > have else "damaged"
        counts = f"its header counts {claimed} triangles, it has {have}"
        raise ReadError(f"{state} or not an STL file: {counts}")
    else:
        corners = np.frombuffer(data, _TRIANGLE, have, _HEAD)["f1"].reshape(-1, 3)
    if not len(corners):
        raise ReadError("an STL file without triangles")
    return mesh(corners, np.arange(len(corners)).reshape(-1, 3))


def _stl_in_text(text: bytes) -> np.ndarray:
    corners = Rows(b"\n".join(_CORNER.findall(text))).numbers()[0].reshape(-1, 3)
    facets = text.count(b"endfacet")
    if len(corners) != 3 * facets or text.rfind(b"endsolid") < text.rfind(b"endfacet"):
        counts = f"{facets} whole facets, {len(corners)} vertices"
        raise ReadError(f"truncated or damaged: {counts}, no endsolid at the end")
    return corners
