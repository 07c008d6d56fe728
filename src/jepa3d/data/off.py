"""OFF: vertices and polygons, a line each."""

import re
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.polygons import mesh, rows, triangles, unix_lines, whole
from jepa3d.data.text import to_bytes

_MAGIC = re.compile(rb"\s*((?:ST)?(C?)(N?)(4?n?)(?:OFF|off)([ \t]+BINARY)?)")


def read_off(path: Path) -> PointCloud:
    """OFF in text; how wide its rows are is read from them. Colours of vertices are kept, of faces left alone."""
    text = re.sub(rb"#.*", b"", unix_lines(path.read_bytes()))
    if not (magic := _MAGIC.match(text)):
        raise ReadError("not an OFF file: it does not begin with OFF")
    name, color, normal, dimensions, binary = magic.groups()
    if dimensions or binary:
        raise ReadError(f"{name.decode()} is not read, only text with x, y, z a vertex; convert it to OFF or PLY")
    values, starts, counts = rows(text[magic.end() :])
    if not len(counts) or counts[0] < 2 or (values[:2] < 0).any() or (values[:2] % 1 != 0).any():
        raise ReadError("an OFF file begins with its numbers of vertices and faces")
    num_vertices, num_faces = (int(n) for n in values[:2])
    if len(values) < 3 * num_vertices + num_faces:
        raise ReadError(f"truncated: {len(values)} numbers for {num_vertices} vertices and {num_faces} faces")
    width = counts[1 : num_vertices + 1].min(initial=99)
    if len(counts) <= num_vertices + num_faces or width < 3:  # not a line each
        return _of_any_lines(values[counts[0] :], num_vertices, num_faces)
    at, faces_at = starts[1 : num_vertices + 1, None], starts[num_vertices + 1 :][:num_faces]
    vertices, first = values[at + np.arange(3)], 6 if normal else 3
    colors = to_bytes(values[at + np.arange(first, first + 3)]) if color and width >= first + 3 else None
    sizes = whole(values[faces_at])
    if (wrong := (sizes < 0) | (sizes >= counts[num_vertices + 1 :][:num_faces])).any():
        face = int(wrong.argmax())
        raise ReadError(f"face {face} of {sizes[face]} vertices names {counts[num_vertices + 1 + face] - 1}")
    corners = np.repeat(faces_at + 1 - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    return mesh(vertices, triangles(vertices, sizes, whole(values[corners])), colors=colors)


def _of_any_lines(values: np.ndarray, num_vertices: int, num_faces: int) -> PointCloud:
    """An OFF file without colours whose numbers are broken into lines anyhow."""
    vertices, faces, at, sizes = values[: 3 * num_vertices].reshape(-1, 3), values[3 * num_vertices :], 0, []
    while len(sizes) < num_faces and at < len(faces) and faces[at] >= 0:
        sizes.append(int(faces[at]))
        at += 1 + sizes[-1]
    if len(sizes) < num_faces or at != len(faces):
        raise ReadError(f"truncated or damaged: lines for {num_vertices} vertices and {num_faces} faces are expected")
    corners = np.delete(faces, np.cumsum([0, *sizes[:-1]]) + np.arange(num_faces)) if num_faces else faces
    return mesh(vertices, triangles(vertices, np.array(sizes, np.int64), whole(corners)))
