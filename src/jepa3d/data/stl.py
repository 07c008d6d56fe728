"""STL, in text or binary: triangles that share no vertices."""

import re
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.polygons import Rows, mesh, unix_lines

_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_HEAD = 84  # bytes: a title of 80 and the number of triangles
_CORNER = re.compile(rb"\bvertex\s+([-+.\dni]\S*\s+[-+.\dni]\S*\s+[-+.\dni]\S*)")


def read_stl(path: Path) -> PointCloud:
    """All solids of an STL file.

    A binary one may begin with the word solid, and have a few bytes too many.
    """
    data = path.read_bytes()
    claimed = int.from_bytes(data[80:_HEAD], "little")
    have = max(len(data) - _HEAD, 0) // _TRIANGLE.itemsize
    exact = len(data) == _HEAD + claimed * _TRIANGLE.itemsize
    if not exact and re.match(
        rb"\s*solid\b.*(facet\s+normal|endsolid)", data, re.IGNORECASE | re.DOTALL
    ):
        corners = _in_text(unix_lines(data).lower())
    elif len(data) < _HEAD:
        raise ReadError(
            "not an STL file: neither text that begins with solid nor long enough for a binary header"
        )
    elif claimed != have:
        what = "truncated" if claimed > have else "damaged"
        raise ReadError(
            f"{what} or not an STL file: its header counts {claimed} triangles, it has {have}"
        )
    else:
        corners = np.frombuffer(data, _TRIANGLE, have, _HEAD)["corners"].reshape(-1, 3)
    if not len(corners):
        raise ReadError("an STL file without triangles")
    return mesh(corners, np.arange(len(corners)).reshape(-1, 3))


def _in_text(text: bytes) -> np.ndarray:
    corners = Rows(b"\n".join(_CORNER.findall(text))).numbers()[0].reshape(-1, 3)
    facets = text.count(b"endfacet")
    if len(corners) != 3 * facets or text.rfind(b"endsolid") < text.rfind(b"endfacet"):
        raise ReadError(
            f"truncated or damaged: {facets} whole facets, {len(corners)} vertices, no endsolid at the end"
        )
    return corners
