"""Read the mesh formats OFF, OBJ and STL; ply.py and gltf.py use the helpers of this file too."""

import re
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, to_bytes

# spellings of NaN and infinity by programs that were built with older Windows compilers; all of
# them are read as NaN
_NAN = re.compile(rb"[-+]?1\.#(?:QNAN|SNAN|IND|INF)\w*")
# the first word of an OFF file; its letters tell which values a vertex has
_OFF = re.compile(rb"\s*((?:ST)?(C?)(N?)(4?n?)(?:OFF|off)([ \t]+BINARY)?)")
# a triangle of a binary STL: normal (field f0), corners (f1), attribute bytes (f2)
_TRIANGLE = np.dtype("(3,)<f4, (3,3)<f4, <u2")
# number of bytes before the triangles of a binary STL: 80 for a title, 4 for the triangle count
_HEAD = 84
_CORNER = re.compile(rb"\bvertex\s+([-+.\dni]\S*\s+[-+.\dni]\S*\s+[-+.\dni]\S*)")
# Largest number of corners of a concave polygon. It limits the time of `_ears`, which may grow with
# the square of this number.
_MOST_CORNERS = 2000


def unix_lines(text: bytes) -> bytes:
    """Convert line ends CR LF and CR to LF, and UTF-16 to UTF-8; remove a byte order mark."""
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = text.decode("utf-16", "replace").encode()
    text = text.removeprefix(b"\xef\xbb\xbf")
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def _without_comments(path: Path) -> bytes:
    """Read a text file without its comments, which begin with #."""
    # the spellings of NaN come first, since they contain a #
    return re.sub(rb"#.*", b"", _NAN.sub(b"nan", unix_lines(path.read_bytes())))


class Rows:
    """The non-blank lines of a text, whose numbers are parsed only when `numbers` is called.

    `counts` holds the number of words in each line; words are separated by white space.
    """

    def __init__(self, text: bytes):
        self.text = text = _NAN.sub(b"nan", text) if b"#" in text else text
        data = np.frombuffer(text, np.uint8)
        blank = np.concatenate([[True], data <= 32])
        begins = np.flatnonzero(blank[:-1] > blank[1:])  # the first byte of each word
        self._words = np.append(begins, len(data))
        ends = np.searchsorted(begins, np.append(np.flatnonzero(data == 10), len(data)))
        counts = np.diff(ends, prepend=0)
        self.counts = counts[counts > 0]
        # index of the first word of each line, counted from the first word of the text
        self._first = np.append(0, np.cumsum(self.counts))

    def __len__(self) -> int:
        return len(self.counts)

    def numbers(
        self, first: int = 0, last: int | None = None, integers: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Parse the numbers in lines `first` to `last` (excluded).

        Returns all numbers, and for each line the index of its first number. integers: parse the
        numbers as int64, which is ten times as fast as float64; if this fails, parse them as
        float64. Raises ReadError for a word that is no number.
        """
        bounds = self._first[first : None if last is None else last + 1]
        text = self.text[self._words[bounds[0]] : self._words[bounds[-1]]]
        for kind in (np.int64, np.float64) if integers else (np.float64,):
            values = _parsed(text, kind) if text else np.empty(0, kind)
            if len(values) == bounds[-1] - bounds[0]:
                return values, bounds[:-1] - bounds[0]
        words = [word for word in text.split() if len(_parsed(word, np.float64)) != 1]
        wrong = [*words, b"?"][0].decode("latin-1")
        raise ReadError(f"found {wrong[:40]!r} where a number should be")


def _parsed(text: bytes, kind: type) -> np.ndarray:
    try:
        return np.fromstring(text, kind, sep=" ")
    except ValueError:
        return np.empty(0, kind)


def whole(values: np.ndarray) -> np.ndarray:
    """Convert vertex indices to int64.

    Raises ReadError for a float that is no whole number, or whose absolute value is 2^53 or more.
    """
    if values.dtype.kind == "f":
        exact = (np.abs(values) < 2**53) & (values == np.floor(values))
        if not exact.all():
            raise ReadError("the vertex indices of its faces must be whole numbers")
    return values.astype(np.int64)


def runs(at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return at[i], at[i] + 1, ..., at[i] + sizes[i] - 1 for every i, concatenated."""
    return np.repeat(at - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


def mesh(vertices: np.ndarray, faces: np.ndarray, **attributes) -> PointCloud:
    """Make a mesh of vertices [n, 3] and faces [t, 3], or a cloud if t is 0.

    attributes: other fields of `PointCloud`, such as colors. Raises ReadError for a face with a
    vertex that does not exist, and as `PointCloud.make` does.
    """
    _check_range(faces, len(vertices))
    return PointCloud.make(vertices, faces=faces if len(faces) else None, **attributes)


def _check_range(corners: np.ndarray, count: int) -> None:
    if len(corners) and (corners.min() < 0 or corners.max() >= count):
        wrong = corners.max() if corners.max() >= count else corners.min()
        raise ReadError(f"a face names vertex {wrong}; allowed are 0 to {count - 1}")


def triangles(points: np.ndarray, sizes: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Cut polygons into triangles [t, 3] of vertex indices.

    points: vertices [n, 3]. sizes: array [f] with the number of corners of each polygon. corners:
    the vertex indices of all polygons, concatenated. A convex polygon becomes a fan of triangles
    around its first corner. A concave polygon is cut by ear clipping (see `_ears`). Polygons with
    fewer than three corners are dropped. Raises ReadError for a corner that is no vertex, and for a
    concave polygon with more than `_MOST_CORNERS` corners.
    """
    _check_range(corners, len(points))
    starts, found = np.cumsum(sizes) - sizes, [np.empty((0, 3), np.int64)]
    for size in np.unique(sizes[sizes >= 3]):
        polygons = corners[starts[sizes == size][:, None] + np.arange(size)]
        middle = np.arange(1, size - 1)
        fan = np.stack([np.zeros_like(middle), middle, middle + 1], 1)
        if size == 3:
            found.append(polygons[:, fan].reshape(-1, 3))
            continue
        spokes = points[polygons[:, 1:]] - points[polygons[:, :1]]
        normals = np.cross(spokes[:, :-1], spokes[:, 1:])
        normal = normals.sum(1)
        along = (normals @ normal[:, :, None])[..., 0]
        # Here a polygon counts as concave only if a triangle of its fan faces against the polygon's
        # normal. If no triangle does, the fan covers the polygon correctly. The tolerance ignores
        # rounding errors.
        concave = (along < -1e-6 * (normal**2).sum(1, keepdims=True)).any(1)
        if size > _MOST_CORNERS and concave.any():
            raise ReadError(f"has a concave polygon of {size} corners: cut it into triangles")
        found.append(polygons[~concave][:, fan].reshape(-1, 3))
        for polygon, up in zip(polygons[concave], normal[concave], strict=True):
            found.append(polygon[_ears(points[polygon], up)])
    return np.concatenate(found)


def _ears(corners: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Cut one concave polygon [n, 3] into triangles [n - 2, 3] of its corners, by ear clipping.

    An ear is a convex corner whose triangle with its two neighbours contains no other corner. Ears
    are cut off until three corners are left. A polygon that crosses itself may have no ear. If no
    ear is found, or if the limit on tries is reached, the rest of the polygon becomes a fan around
    one corner.
    """
    axis = int(np.abs(normal).argmax())
    flat = np.delete(corners, axis, 1)
    # project the polygon to a plane in which it runs counter-clockwise
    flat = flat if (normal[axis] > 0) != (axis == 1) else flat[:, ::-1]

    def side(a, b, x, y):
        """Return a positive number if (x, y) lies left of the line from a to b."""
        return (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])

    places, others = [tuple(place) for place in flat.tolist()], flat
    left, found, at, missed = list(range(len(corners))), [], 0, 0
    # Without a limit, a file of malicious polygons could take hours. The limit is high enough: even
    # a spiral needs only 20 tries per corner.
    tries = 100 * len(corners)
    while len(left) > 3 and missed < len(left) and tries:
        at, missed = at % len(left), missed + 1
        ear = left[at - 1], left[at], left[(at + 1) % len(left)]
        a, b, c = (places[i] for i in ear)
        if side(a, b, *c) > 0:
            (x, y), tries = others.T, tries - 1
            inside = (side(a, b, x, y) > 0) & (side(b, c, x, y) > 0)
            if not (inside & (side(c, a, x, y) > 0)).any():
                found.append(ear)
                del left[at]
                others, missed = np.delete(others, at, 0), 0
                continue
        at += 1
    found += [(left[0], left[i], left[i + 1]) for i in range(1, len(left) - 1)]
    return np.array(found)


def strip(corners: np.ndarray) -> np.ndarray:
    """Convert strips of vertex indices to triangles [t, 3].

    Each corner of a strip forms a triangle with the two corners before it. In every second triangle
    two corners are swapped, so that all triangles face the same way. A negative number ends a
    strip; the number after it begins another strip.
    """
    found = np.stack([corners[:-2], corners[1:-1], corners[2:]], 1)
    at = np.arange(len(corners))
    ends = np.maximum.accumulate(np.where(corners < 0, at, -1))
    swapped = ((at - ends) % 2 == 0)[: len(found)]
    found[swapped] = found[swapped][:, [1, 0, 2]]
    return found[(found >= 0).all(1)]


def read_off(path: Path) -> PointCloud:
    """Read OFF in text; vertex colours are kept, face colours are skipped. Raises ReadError.

    Vertex normals and texture coordinates are skipped too.
    """
    text = _without_comments(path)
    if not (start := _OFF.match(text)):
        raise ReadError("not an OFF file: it does not begin with OFF")
    name, color, normal, dimensions, binary = start.groups()
    if dimensions or binary:
        allowed = "give OFF in text with x, y, z per vertex, or PLY"
        raise ReadError(f"{name.decode()} is not read; {allowed}")
    rows = Rows(text[start.end() :])
    counts = whole(rows.numbers(0, 1)[0][:2]) if len(rows) else np.empty(0)
    if len(counts) < 2 or min(counts) < 0:
        raise ReadError("an OFF file must begin with its numbers of vertices and faces")
    num_vertices, num_faces = (int(n) for n in counts)
    first = num_vertices + 1  # row of the first face
    width = rows.counts[1:first].min(initial=99)  # 99 if there are no vertices
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
        raise ReadError(f"face {face} names {have[face]} of {sizes[face]} vertices")
    corners = whole(values[runs(at + 1, sizes)])
    return mesh(vertices, triangles(vertices, sizes, corners), colors=colors)


def _any_lines(values: np.ndarray, num_vertices: int, num_faces: int) -> PointCloud:
    """Read an OFF file in which line breaks may stand anywhere between the numbers.

    values: the numbers after the counts of vertices, faces and edges. They must be x, y, z of each
    vertex, and then the faces; colours are not allowed. Raises ReadError if the numbers do not fit
    the counts.
    """
    counts = f"{num_vertices} vertices and {num_faces} faces"
    if len(values) < 3 * num_vertices + num_faces:
        raise ReadError(f"truncated: {len(values)} numbers are too few for {counts}")
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
    """Read the polygons of an OBJ file or, if it has none, its vertices as a cloud.

    Material files are not opened. Raises ReadError.
    """
    text = _without_comments(path)
    text = re.sub(rb"\\[ \t]*\n", b" ", text)
    if surface := re.search(rb"(?m)^[ \t]*(surf|curv2?)[ \t]", text):
        raise ReadError(f"free-form surface ({surface[1].decode()}): use polygons")

    def after(word: bytes) -> bytes:
        return b"\n".join(re.findall(rb"(?m)^[ \t]*" + word + rb"[ \t](.*)", text))

    rows = Rows(after(b"v"))
    if not len(rows):
        raise ReadError("has no vertices: it is empty or not an OBJ file")
    first = int(rows.counts.argmin())
    if rows.counts[first] < 3:
        raise ReadError(f"vertex {first + 1} has {rows.counts[first]} of 3 coordinates")
    (values, at), kept = rows.numbers(), {}
    vertices = values[at[:, None] + np.arange(3)]
    # in a file with colours, each vertex line has x, y, z, red, green, blue and perhaps one more
    # number
    if set(rows.counts) <= {6, 7}:
        kept["colors"] = to_bytes(values[at[:, None] + np.arange(3, 6)])
    # a corner has indices v/vt/vn: keep only v, the index of the vertex
    faces = Rows(re.sub(rb"/\S*", b"", after(b"fo?")))
    corners = whole(faces.numbers(integers=True)[0])
    above = np.ones_like(corners)
    # negative indices count back from the last vertex above their line
    if (corners < 0).any():
        kinds = np.array(re.findall(rb"(?m)^[ \t]*(v|f)o?[ \t]", text))
        above = np.repeat(-np.cumsum(kinds == b"v")[kinds == b"f"], faces.counts)
    corners = corners - np.where(corners < 0, above, 1)
    # normals are kept only if the file is a cloud and has one normal per vertex
    normals = Rows(b"" if len(faces) else after(b"vn")).numbers()[0]
    if len(normals) == 3 * len(vertices):
        kept["normals"] = normals.reshape(-1, 3).astype(np.float32)
    return mesh(vertices, triangles(vertices, faces.counts, corners), **kept)


def read_stl(path: Path) -> PointCloud:
    """Read all solids of an STL file; its triangles share no vertices. Raises ReadError.

    A binary file is accepted even if it begins with the word solid, which should mark a text file.
    It may also have up to 49 bytes after its last triangle.
    """
    data = path.read_bytes()
    claimed = int.from_bytes(data[80:_HEAD], "little")
    have = max(len(data) - _HEAD, 0) // _TRIANGLE.itemsize
    exact = len(data) == _HEAD + claimed * _TRIANGLE.itemsize
    text = rb"\s*solid\b.*(facet\s+normal|endsolid)"
    if not exact and re.match(text, data, re.IGNORECASE | re.DOTALL):
        corners = _stl_in_text(unix_lines(data).lower())
    elif len(data) < _HEAD:
        raise ReadError("not an STL file: has neither the word solid nor a binary header")
    elif claimed != have:
        state = "truncated" if claimed > have else "damaged"
        raise ReadError(f"{state} or not STL: it has {have} of {claimed} triangles")
    else:
        corners = np.frombuffer(data, _TRIANGLE, have, _HEAD)["f1"].reshape(-1, 3)
    if not len(corners):
        raise ReadError("the STL file has no triangles")
    return mesh(corners, np.arange(len(corners)).reshape(-1, 3))


def _stl_in_text(text: bytes) -> np.ndarray:
    corners = Rows(b"\n".join(_CORNER.findall(text))).numbers()[0].reshape(-1, 3)
    facets = text.count(b"endfacet")
    if len(corners) != 3 * facets or text.rfind(b"endsolid") < text.rfind(b"endfacet"):
        counts = f"{facets} whole facets with {len(corners)} vertices (needs 3 each)"
        raise ReadError(f"truncated or damaged: {counts}, or no endsolid")
    return corners
