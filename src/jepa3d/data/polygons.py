"""What the mesh readers share: lines of numbers, polygons and strips as triangles."""

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError

_MOST_CORNERS = 500  # of a concave polygon that is cut exactly: the time grows with the square


def unix_lines(text: bytes) -> bytes:
    """The text with every line end (CR LF, CR) as LF, and without the mark that Windows' editors put first."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def rows(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All numbers of a text, float64, and where each line that has any begins and how many it has.

    Raises ReadError for a word that is no number.
    """
    data = np.frombuffer(text, np.uint8)
    blank = data <= 32
    words = np.flatnonzero(~blank & np.concatenate([[True], blank[:-1]]))
    counts = np.diff(np.searchsorted(words, np.append(np.flatnonzero(data == 10), len(data))), prepend=0)
    counts = counts[counts > 0]
    try:
        values = np.fromstring(text, sep=" ") if len(words) else np.empty(0)
    except ValueError:
        values = np.empty(0)
    if len(values) != len(words):
        wrong = next((word for word in text.split() if not _is_number(word)), b"?")
        raise ReadError(f"{wrong.decode('latin-1')[:40]!r} where a number should be")
    return values, np.cumsum(counts) - counts, counts


def _is_number(word: bytes) -> bool:
    try:
        return np.isscalar(float(word)) and b"_" not in word
    except ValueError:
        return False


def whole(values: np.ndarray) -> np.ndarray:
    """Numbers of vertices as int64. Raises ReadError for fractions and what no file can hold."""
    if not (np.abs(values) < 2**53).all() or (values != np.floor(values)).any():
        raise ReadError("the vertices of its faces must be whole numbers")
    return values.astype(np.int64)


def mesh(vertices: np.ndarray, faces: np.ndarray, **attributes) -> PointCloud:
    """A mesh, or without faces a cloud. NaN vertices that no face uses are dropped. Raises ReadError."""
    if not len(faces):
        return PointCloud.make(vertices, **attributes)
    _check_range(faces, len(vertices))
    good = np.all(np.isfinite(vertices), axis=1)
    if not good.all() and good[faces].all():
        faces, vertices = (np.cumsum(good) - 1)[faces], vertices[good]
        attributes = {k: v[good] if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
    return PointCloud.make(vertices, faces=faces, **attributes)


def _check_range(corners: np.ndarray, count: int) -> None:
    if len(corners) and (corners.min() < 0 or corners.max() >= count):
        wrong = corners.max() if corners.max() >= count else corners.min()
        raise ReadError(f"a face of vertex {int(wrong)}, but its {count} vertices are 0 to {count - 1}")


def triangles(vertices: np.ndarray, sizes: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Triangles [t, 3] of polygons: `sizes` [f] corners each, one after the other in `corners`.

    Convex polygons become fans, concave ones are cut at their ears; those of fewer than three corners are dropped.
    """
    _check_range(corners, len(vertices))
    starts, found = np.cumsum(sizes) - sizes, [np.empty((0, 3), np.int64)]
    for size in np.unique(sizes[sizes >= 3]):
        polygons = corners[starts[sizes == size][:, None] + np.arange(size)]
        middle = np.arange(1, size - 1)
        fan = np.stack([np.zeros_like(middle), middle, middle + 1], 1)
        if size == 3 or size > _MOST_CORNERS:
            found.append(polygons[:, fan].reshape(-1, 3))
            continue
        spokes = vertices[polygons[:, 1:]] - vertices[polygons[:, :1]]
        normals = np.cross(spokes[:, :-1], spokes[:, 1:])
        whole_normal = normals.sum(1)
        concave = ((normals @ whole_normal[:, :, None])[..., 0] < 0).any(1)
        found.append(polygons[~concave][:, fan].reshape(-1, 3))
        for polygon, normal in zip(polygons[concave], whole_normal[concave], strict=True):
            found.append(polygon[_ears(vertices[polygon], normal)])
    return np.concatenate(found)


def _ears(corners: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Triangles [n - 2, 3] of one concave polygon [n, 3]: cuts off a corner that holds no other, until three are left.

    A polygon that crosses itself has no right answer: what is left of it becomes a fan.
    """
    axis = int(np.abs(normal).argmax())
    flat = np.delete(corners, axis, 1)
    flat = flat if (normal[axis] > 0) != (axis == 1) else flat[:, ::-1]  # counter-clockwise

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (b[0] - a[0]) * (c[..., 1] - a[1]) - (b[1] - a[1]) * (c[..., 0] - a[0])

    left, found = list(range(len(corners))), []
    while len(left) > 3:
        for i in range(len(left)):
            ear = left[i - 1], left[i], left[(i + 1) % len(left)]
            a, b, c = flat[list(ear)]
            others = flat[left]
            inside = (side(a, b, others) > 0) & (side(b, c, others) > 0) & (side(c, a, others) > 0)
            if side(a, b, c) > 0 and not inside.any():
                found.append(ear)
                del left[i]
                break
        else:
            break
    found += [(left[0], left[i], left[i + 1]) for i in range(1, len(left) - 1)]
    return np.array(found)


def strip(corners: np.ndarray) -> np.ndarray:
    """Triangles [t, 3] of a strip, every second one turned over; a negative corner ends a strip and begins another."""
    found = np.stack([corners[:-2], corners[1:-1], corners[2:]], 1)
    ends = np.maximum.accumulate(np.where(corners < 0, np.arange(len(corners)), -1))[: len(found)]
    turned = (np.arange(len(found)) - ends) % 2 == 0
    found[turned] = found[turned][:, [1, 0, 2]]
    return found[(found >= 0).all(1)]
