"""OBJ: vertices and polygons; materials are never opened."""

import re
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, to_bytes
from jepa3d.data.polygons import Rows, mesh, triangles, unix_lines, whole


def read_obj(path: Path) -> PointCloud:
    """The polygons of an OBJ file; without any its vertices as a cloud, whatever lines join them."""
    text = re.sub(rb"\\[ \t]*\n", b" ", re.sub(rb"#.*", b"", unix_lines(path.read_bytes())))
    if surface := re.search(rb"(?m)^[ \t]*(surf|curv2?)[ \t]", text):
        raise ReadError(
            f"free-form surfaces ({surface[1].decode()}) are not read; convert it to polygons"
        )

    def after(word: bytes) -> bytes:
        return b"\n".join(re.findall(rb"(?m)^[ \t]*" + word + rb"[ \t](.*)", text))

    rows = Rows(after(b"v"))
    if not len(rows):
        raise ReadError("no vertices: not an OBJ file, or an empty one")
    if rows.counts.min() < 3:
        raise ReadError(
            f"vertex {int(rows.counts.argmin()) + 1} has {rows.counts.min()} coordinates"
        )
    (values, at), kept = rows.numbers(), {}
    vertices = values[at[:, None] + np.arange(3)]
    if set(rows.counts) <= {6, 7}:
        kept["colors"] = to_bytes(values[at[:, None] + np.arange(3, 6)])
    faces = Rows(re.sub(rb"/\S*", b"", after(b"fo?")))  # of v/vt/vn the first
    corners = whole(faces.numbers(integers=True)[0])
    if (corners < 0).any():  # counted back from the vertices above the line
        kinds = np.array(re.findall(rb"(?m)^[ \t]*(v|f)o?[ \t]", text))
        above = np.repeat(np.cumsum(kinds == b"v")[kinds == b"f"], faces.counts)
        corners = np.where(corners < 0, corners + above, corners - 1)
    else:
        corners = corners - 1
    if not len(faces) and len(normals := Rows(after(b"vn")).numbers()[0]) == 3 * len(vertices):
        kept["normals"] = normals.reshape(-1, 3).astype(np.float32)
    return mesh(vertices, triangles(vertices, faces.counts, corners), **kept)
