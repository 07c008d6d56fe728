"""What the mesh readers share: lines of numbers, and triangles of polygons and strips."""

import re

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError

# NaN as older compilers of Windows write it
_NAN = re.compile(rb"[-+]?1\.#(?:QNAN|SNAN|IND|INF)\w*")
_MOST_CORNERS = 2000  # of a concave polygon, whose time may grow with the cube


def unix_lines(text: bytes) -> bytes:
    """Text with LF for every line end (CR LF, CR), in an 8-bit encoding, without byte order mark."""
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = text.decode("utf-16", "replace").encode()
    text = text.removeprefix(b"\xef\xbb\xbf")
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


class Rows:
    """The lines of a text that are not blank, parsed when numbers are asked for.

    `counts` has the number of words of each line.
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
        # the number of each row's first word
        self._first = np.append(0, np.cumsum(self.counts))

    def __len__(self) -> int:
        return len(self.counts)

    def numbers(
        self, first: int = 0, last: int | None = None, integers: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """All numbers of some lines, and the index of each line's first number.

        integers: int64 instead of float64 if all are integers, which is ten times as fast. Raises
        ReadError for a word that is no number.
        """
        bounds = self._first[first : None if last is None else last + 1]
        text = self.text[self._words[bounds[0]] : self._words[bounds[-1]]]
        for kind in (np.int64, np.float64) if integers else (np.float64,):
            values = _parsed(text, kind) if text else np.empty(0, kind)
            if len(values) == bounds[-1] - bounds[0]:
                return values, bounds[:-1] - bounds[0]
        words = [word for word in text.split() if len(_parsed(word, np.float64)) != 1]
        wrong = [*words, b"?"][0].decode("latin-1")
        raise ReadError(f"{wrong[:40]!r} where a number should be")


def _parsed(text: bytes, kind: type) -> np.ndarray:
    try:
        return np.fromstring(text, kind, sep=" ")
    except ValueError:
        return np.empty(0, kind)


def whole(values: np.ndarray) -> np.ndarray:
    """Numbers of vertices as int64. Raises ReadError for fractions and for numbers beyond 2^53."""
    if values.dtype.kind == "f":
        exact = (np.abs(values) < 2**53) & (values == np.floor(values))
        if not exact.all():
            raise ReadError("the vertices of its faces must be whole numbers")
    return values.astype(np.int64)


def runs(at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The indices at[i], at[i] + 1, ... of sizes[i] items, for every i, one after the other."""
    return np.repeat(at - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


def mesh(vertices: np.ndarray, faces: np.ndarray, **attributes) -> PointCloud:
    """A mesh, or a cloud if there are no faces. Raises ReadError.

    Vertices with NaN are dropped if no face uses them.
    """
    if not len(faces):
        return PointCloud.make(vertices, **attributes)
    _check_range(faces, len(vertices))
    good = np.all(np.isfinite(vertices), axis=1)
    if not good.all() and good[faces].all():
        faces, vertices = (np.cumsum(good) - 1)[faces], vertices[good]
        for name, values in attributes.items():
            if isinstance(values, np.ndarray):
                attributes[name] = values[good]
    return PointCloud.make(vertices, faces=faces, **attributes)


def _check_range(corners: np.ndarray, count: int) -> None:
    if len(corners) and (corners.min() < 0 or corners.max() >= count):
        wrong = corners.max() if corners.max() >= count else corners.min()
        allowed = f"its {count} vertices are 0 to {count - 1}"
        raise ReadError(f"a face of vertex {int(wrong)}, but {allowed}")


def triangles(vertices: np.ndarray, sizes: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Triangles [t, 3] of polygons with `sizes` [f] corners, which follow each other in `corners`.

    Convex polygons become fans, concave ones are cut by their ears. Polygons of one or two corners
    are dropped. Raises ReadError for a corner that is no vertex.
    """
    _check_range(corners, len(vertices))
    starts, found = np.cumsum(sizes) - sizes, [np.empty((0, 3), np.int64)]
    for size in np.unique(sizes[sizes >= 3]):
        polygons = corners[starts[sizes == size][:, None] + np.arange(size)]
        middle = np.arange(1, size - 1)
        fan = np.stack([np.zeros_like(middle), middle, middle + 1], 1)
        if size == 3:
            found.append(polygons[:, fan].reshape(-1, 3))
            continue
        spokes = vertices[polygons[:, 1:]] - vertices[polygons[:, :1]]
        normals = np.cross(spokes[:, :-1], spokes[:, 1:])
        normal = normals.sum(1)
        along = (normals @ normal[:, :, None])[..., 0]
        concave = (along < -1e-6 * (normal**2).sum(1, keepdims=True)).any(1)
        if size > _MOST_CORNERS and concave.any():
            what = f"a concave polygon of {size} corners, more than {_MOST_CORNERS}"
            raise ReadError(f"{what}: cut it into triangles")
        found.append(polygons[~concave][:, fan].reshape(-1, 3))
        for polygon, up in zip(polygons[concave], normal[concave], strict=True):
            found.append(polygon[_ears(vertices[polygon], up)])
    return np.concatenate(found)


def _ears(corners: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Triangles [n - 2, 3] of one concave polygon [n, 3], by ear clipping.

    A corner that contains no other is cut off until three are left. A polygon that crosses itself
    has no right answer; its rest becomes a fan.
    """
    axis = int(np.abs(normal).argmax())
    flat = np.delete(corners, axis, 1)
    # seen so that it runs counter-clockwise
    flat = flat if (normal[axis] > 0) != (axis == 1) else flat[:, ::-1]

    def side(a, b, x, y):
        """Positive if (x, y) lies left of the line from a to b."""
        return (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])

    places, others = [tuple(place) for place in flat.tolist()], flat
    left, found, at, missed = list(range(len(corners))), [], 0, 0
    # a limit for hostile polygons; a spiral needs 20 tries a corner
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
    """Triangles [t, 3] of a strip; every second one is turned over.

    A negative corner ends a strip; the next corner begins another.
    """
    found = np.stack([corners[:-2], corners[1:-1], corners[2:]], 1)
    at = np.arange(len(corners))
    ends = np.maximum.accumulate(np.where(corners < 0, at, -1))
    turned = ((at - ends) % 2 == 0)[: len(found)]
    found[turned] = found[turned][:, [1, 0, 2]]
    return found[(found >= 0).all(1)]
