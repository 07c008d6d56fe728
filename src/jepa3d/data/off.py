"""OFF: vertices and polygons, a line each."""

import re
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, to_bytes
from jepa3d.data.polygons import Rows, mesh, runs, triangles, unix_lines, whole

_MAGIC = re.compile(rb"\s*((?:ST)?(C?)(N?)(4?n?)(?:OFF|off)([ \t]+BINARY)?)")


def read_off(path: Path) -> PointCloud:
    """OFF in text; how wide its rows are is read from them.

    Colours of vertices are kept, of faces left alone.
    """
    text = re.sub(rb"#.*", b"", unix_lines(path.read_bytes()))
    if not (magic := _MAGIC.match(text)):
        raise ReadError("not an OFF file: it does not begin with OFF")
    name, color, normal, dimensions, binary = magic.groups()
    if dimensions or binary:
        raise ReadError(
            f"{name.decode()} is not read, only text with x, y, z a vertex; convert it to OFF or PLY"
        )
    rows = Rows(text[magic.end() :])
    counts = whole(rows.numbers(0, 1)[0][:2]) if len(rows) else np.empty(0)
    if len(counts) < 2 or min(counts) < 0:
        raise ReadError("an OFF file begins with its numbers of vertices and faces")
    num_vertices, num_faces = (int(n) for n in counts)
    first = num_vertices + 1  # row of the first face
    width = rows.counts[1:first].min(initial=99)
    if len(rows) < first + num_faces or width < 3:
        return _of_any_lines(rows.numbers()[0][min(rows.counts[0], 3) :], num_vertices, num_faces)
    values, at = rows.numbers(1, first)
    vertices, after = values[at[:, None] + np.arange(3)], 6 if normal else 3
    colored = color and width >= after + 3
    colors = to_bytes(values[at[:, None] + np.arange(after, after + 3)]) if colored else None
    values, at = rows.numbers(first, first + num_faces, integers=True)
    sizes = whole(values[at])
    if (wrong := (sizes < 0) | (sizes >= rows.counts[first : first + num_faces])).any():
        face = int(wrong.argmax())
        raise ReadError(
            f"face {face} of {sizes[face]} vertices names {rows.counts[first + face] - 1}"
        )
    return mesh(
        vertices, triangles(vertices, sizes, whole(values[runs(at + 1, sizes)])), colors=colors
    )


def _of_any_lines(values: np.ndarray, num_vertices: int, num_faces: int) -> PointCloud:
    """An OFF file without colours whose numbers are broken into lines anyhow."""
    if len(values) < 3 * num_vertices + num_faces:
        raise ReadError(
            f"truncated: {len(values)} numbers for {num_vertices} vertices and {num_faces} faces"
        )
    vertices, faces, at, sizes = (
        values[: 3 * num_vertices].reshape(-1, 3),
        values[3 * num_vertices :],
        0,
        [],
    )
    while len(sizes) < num_faces and at < len(faces) and faces[at] >= 0:
        sizes.append(int(faces[at]))
        at += 1 + sizes[-1]
    if len(sizes) < num_faces or at != len(faces):
        raise ReadError(
            f"truncated or damaged: it does not hold {num_vertices} vertices and {num_faces} faces"
        )
    corners = (
        np.delete(faces, np.cumsum([0, *sizes[:-1]]) + np.arange(num_faces)) if num_faces else faces
    )
    return mesh(vertices, triangles(vertices, np.array(sizes, np.int64), whole(corners)))
