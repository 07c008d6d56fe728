"""Writers of one random mesh in many valid ways, as OFF, OBJ, PLY, STL and glTF. `rng` chooses the
way.
"""

import base64
import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np


@dataclass
class Polygons:
    """Vertices, convex and concave polygons, and their total area."""

    vertices: np.ndarray  # n 3 float32
    faces: list[list[int]]
    area: float


def polygons(rng: random.Random, sizes: tuple[int, ...] = (3, 3, 4, 4, 5, 6, 8)) -> Polygons:
    """Make random star-shaped polygons, each in its own plane."""
    vertices, faces, area = [], [], 0.0
    while len(faces) < 2 or rng.random() < 0.8:
        count = rng.choice(sizes)
        angles = (
            (np.arange(count) + [rng.uniform(0.25, 0.75) for _ in range(count)]) * 2 * np.pi / count
        )
        radii = np.array([rng.uniform(0.2, 3) for _ in range(count)])
        # All gaps are below pi, so the centre sees every edge.
        gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
        turn = np.linalg.qr(np.array([[rng.gauss(0, 1) for _ in range(3)] for _ in range(3)]))[0]
        flat = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
        faces.append(list(range(len(vertices), len(vertices) + count)))
        vertices += list(flat @ turn[:2] + [rng.uniform(-9, 9) for _ in range(3)])
        area += float((radii * np.roll(radii, -1) * np.sin(gaps)).sum() / 2)
    return Polygons(np.array(vertices, np.float32), faces, area)


def _number(rng: random.Random, value: float) -> str:
    return rng.choice(("{:.9g}", "{:.9e}", "{:.12f}", "{:+.9g}")).format(value)


def _lines(rng: random.Random, lines: list[str], comment: str = "") -> bytes:
    """Join lines with random tabs, spaces, blank lines and line ends. If the format has comments,
    comments are added and the encoding is random too.
    """
    out = []
    for line in lines:
        out.append(
            rng.choice(("", " ", "\t")) * (rng.random() < 0.2)
            + line.replace(" ", rng.choice((" ", "  ", "\t")))
        )
        if comment and rng.random() < 0.2:
            out[-1] += f" {comment} v 1 2 3 Ma\xdf"
        if rng.random() < 0.1:
            out.append(rng.choice(("", "  ", *([comment + " a comment"] if comment else []))))
    text = rng.choice(("\n", "\r\n", "\r")).join([*out, *rng.choice(([], [""]))])
    return text.encode(
        rng.choice(("latin-1", "latin-1", "utf-8-sig", "utf-16")) if comment else "latin-1"
    )


def off(rng: random.Random, shape: Polygons, folder: Path) -> Path:
    magic = rng.choice(("OFF", "COFF", "NOFF", "CNOFF", "STOFF", "STCNOFF"))
    width = 3 * ("N" in magic) + ("C" in magic) * rng.choice((3, 4)) + 2 * ("ST" in magic)
    counts = f"{len(shape.vertices)} {len(shape.faces)} {rng.choice((0, 99))}"
    lines = rng.choice(
        (
            [magic, counts],
            [f"{magic} {counts}"],
            [magic + counts] if magic == "OFF" else [magic, counts],
        )
    )
    for vertex in shape.vertices:
        lines.append(
            " ".join(
                [_number(rng, v) for v in vertex]
                + [_number(rng, rng.random()) for _ in range(width)]
            )
        )
    for face in shape.faces:
        color = rng.choice(([], ["3"], ["255", "0", "9"], ["0.1", "0.5", "1.0", "1"]))
        lines.append(" ".join([str(len(face)), *map(str, face), *color]))
    path = folder / "a.off"
    path.write_bytes(_lines(rng, lines, "#"))
    return path


def obj(rng: random.Random, shape: Polygons, folder: Path) -> Path:
    lines, colors = ["mtllib missing.mtl", "vt 0 0", "vt 0.5 1 0", "vn 0 0 1"], rng.random() < 0.5
    vertices = [
        " ".join(
            [
                "v",
                *(_number(rng, v) for v in vertex),
                *(["0.1 0.2 1"] if colors else rng.choice(([], ["1.0"]))),
            ]
        )
        for vertex in shape.vertices
    ]
    between, done = rng.random() < 0.5, 0  # whether faces stand between the vertices or after them
    lines += [] if between else vertices
    for face in shape.faces:
        if between:
            lines += vertices[done : face[-1] + 1]
            done = face[-1] + 1
        there = done if between else len(vertices)
        refs = [str(i - there if rng.random() < 0.3 else i + 1) for i in face]
        refs = [ref + rng.choice(("", "/1", "//1", "/2/1", "/-1/-1")) for ref in refs]
        at = rng.randrange(1, len(refs))
        line = " ".join(["f", *refs[:at], *(["\\\n"] if rng.random() < 0.2 else []), *refs[at:]])
        lines += [
            *rng.choice(([], ["usemtl a"], ["g b"], ["s off"], ["l 1 2"], ["p 1"], ["o v 1"])),
            line,
        ]
    path = folder / "a.obj"
    path.write_bytes(_lines(rng, lines, "#"))
    return path


def ply(rng: random.Random, shape: Polygons, folder: Path) -> Path:
    order = rng.choice(("", "<", ">"))
    double, index = rng.random() < 0.5, rng.choice(("uchar", "short", "int", "uint32", "int8"))
    kinds = {
        "uchar": "u1",
        "int8": "i1",
        "short": "i2",
        "int": "i4",
        "uint32": "u4",
        "float": "f4",
        "double": "f8",
    }
    number = rng.choice(("uchar", "int", "short"))
    coordinate = "double" if double else "float"
    vertex = [(axis, coordinate) for axis in "xyz"]
    extra = [
        ("nx", "float"),
        ("quality", "double"),
        ("red", "uchar"),
        ("flags", "int"),
        ("neighbours", "list uchar int"),
    ]
    vertex += rng.sample(extra, rng.randrange(4))
    rng.shuffle(vertex)
    face = [(rng.choice(("vertex_indices", "vertex_index")), f"list {number} {index}")]
    face += rng.sample(
        [("texcoord", "list uchar float"), ("red", "uchar"), ("texnumber", "int")], rng.randrange(3)
    )
    rng.shuffle(face)
    edges = [("vertex1", "int"), ("vertex2", "int")]

    def value(name: str, kind: str, row: int, element: str):
        if name in ("x", "y", "z"):
            return float(shape.vertices[row]["xyz".index(name)])
        if name.startswith("vertex_i"):
            return shape.faces[row]
        if kind.startswith("list"):
            return [rng.randrange(100) for _ in range(rng.randrange(4))]
        return rng.randrange(100)

    elements = {
        "vertex": (len(shape.vertices), vertex),
        "face": (len(shape.faces), face),
        "edge": (3, edges),
    }
    names = rng.sample(list(elements), 3) if rng.random() < 0.5 else ["vertex", "face"]
    form = {"": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}[order]
    header, rows = (
        [
            "ply",
            f"format {form} 1.0",
            "comment Wei\xdf: element vertex 7",
            "obj_info  num_cols 512",
        ],
        [],
    )
    for name in names:
        count, properties = elements[name]
        header += [
            f"element {name} {count}",
            *(f"property {kind} {what}" for what, kind in properties),
        ]
        header += ["comment"] * rng.randrange(2)
        for row in range(count):
            rows.append([(kind, value(what, kind, row, name)) for what, kind in properties])
    end = rng.choice(("\n", "\r\n", "\r"))
    content = (end.join([*header, "end_header"]) + end).encode("latin-1")
    for row in rows:
        words, packed = [], b""
        for kind, values in row:
            if kind.startswith("list"):
                _, length, kind = kind.split()
                words.append(str(len(values)))
                packed += np.array(len(values), (order or "<") + kinds[length]).tobytes()
            many = values if isinstance(values, list) else [values]
            words += [_number(rng, v) if isinstance(v, float) else str(v) for v in many]
            packed += np.array(many, (order or "<") + kinds[kind]).tobytes()
        content += packed if order else (" ".join(words) + end).encode()
    path = folder / "a.ply"
    path.write_bytes(content)
    return path


def stl(rng: random.Random, shape: Polygons, folder: Path) -> Path:
    """Write an STL file, of triangles only."""
    corners, path = shape.vertices[np.array(shape.faces)], folder / "a.stl"
    if rng.random() < 0.5:
        table = np.zeros(
            len(corners), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")]
        )
        table["corners"], table["attribute"] = corners, rng.randrange(65536)
        title = rng.choice((b"", b"solid facet", b"  solid binary", b"\xff" * 80))
        tail = bytes(rng.randrange(256) for _ in range(rng.choice((0, 0, 1, 2, 7, 49))))
        path.write_bytes(
            title.ljust(80, b" ") + len(corners).to_bytes(4, "little") + table.tobytes() + tail
        )
        return path
    solids = rng.randrange(1, len(corners) + 1)
    lines = []
    for some in np.array_split(corners, solids):
        lines += ["solid a part of vertex"]
        for triangle in some:
            lines += ["facet normal 0 0 1", "outer loop"]
            lines += ["vertex " + " ".join(_number(rng, v) for v in corner) for corner in triangle]
            lines += ["endloop", "endfacet"]
        lines += [rng.choice(("endsolid", "endsolid a part"))]
    content = _lines(rng, lines)
    path.write_bytes(content.upper() if rng.random() < 0.3 else content)
    return path


def gltf(rng: random.Random, shape: Polygons, folder: Path) -> Path:
    """Write a glTF file of triangles, with random primitives, nodes, buffers and accessors."""
    views, accessors, data = [], [], b""

    def accessor(
        values: np.ndarray, kind: int, normalized: bool = False, sparse: bool = False
    ) -> int:
        nonlocal data

        def view(array: np.ndarray, gap: int = 0) -> int:
            nonlocal data
            size = array.dtype.itemsize * array.shape[1]
            rows = np.zeros((len(array), size + gap), np.uint8)
            rows[:, :size] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).reshape(
                -1, size
            )
            data += bytes(-len(data) % 4)
            views.append({"buffer": 0, "byteOffset": len(data), "byteLength": rows.size})
            if gap:
                views[-1]["byteStride"] = size + gap
            data += rows.tobytes()
            return len(views) - 1

        found = {
            "componentType": kind,
            "count": len(values),
            "type": {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[values.shape[1]],
        }
        if normalized:
            found["normalized"] = True
        if sparse:  # the last row is stored separately
            base = values.copy()
            base[-1] = 0
            found["bufferView"] = view(base)
            found["sparse"] = {
                "count": 1,
                "indices": {
                    "bufferView": view(np.array([[len(values) - 1]], np.uint16)),
                    "componentType": 5123,
                },
                "values": {"bufferView": view(values[-1:])},
            }
        else:
            found["bufferView"] = view(values, rng.choice((0, 0, 4)) if values.shape[1] == 3 else 0)
        accessors.append(found)
        return len(accessors) - 1

    meshes, nodes, used = [], [], []
    for some in np.array_split(np.array(shape.faces), rng.randrange(1, len(shape.faces) + 1)):
        points = shape.vertices[some.ravel()].astype(np.float64)
        low, size = points.min(0), float(np.ptp(points, axis=0).max())
        node: dict = {"translation": low.tolist(), "scale": [size] * 3}
        inside = (points - low) / size
        if rng.random() < 0.3:  # mirrored, and the node mirrors it back
            inside, node["scale"] = inside * [-1, 1, 1], [-size, size, size]
        elif rng.random() < 0.3:
            turn = np.diag([size, size, size, 1.0])
            turn[:3, 3] = low
            node = {"matrix": turn.T.ravel().tolist()}
        if rng.random() < 0.3 and (inside >= 0).all():
            attributes = {
                "POSITION": accessor(np.round(inside * 65535).astype(np.uint16), 5123, True)
            }
            used = ["KHR_mesh_quantization"]
        else:
            attributes = {
                "POSITION": accessor(inside.astype(np.float32), 5126, sparse=rng.random() < 0.3)
            }
        count, primitives = len(points), []
        indices = np.arange(count)
        for triangle in indices.reshape(-1, 3) if rng.random() < 0.4 else [indices]:
            kind = rng.choice(((5121, np.uint8), (5123, np.uint16), (5125, np.uint32)))
            primitive = {
                "attributes": attributes,
                "indices": accessor(triangle[:, None].astype(kind[1]), kind[0]),
            }
            if len(triangle) == 3:
                primitive["mode"] = rng.choice((4, 5, 6))
            primitives.append(primitive)
        if len(primitives) == 1 and rng.random() < 0.5:
            del primitives[0]["indices"]
        meshes.append({"primitives": primitives})
        nodes.append({"mesh": len(meshes) - 1, **node})
    roots = list(range(len(nodes)))
    if rng.random() < 0.5:  # a parent with the inverse translation of its child
        nodes += [{"children": roots, "translation": [1, 2, 3]}]
        nodes += [
            {"children": [len(nodes) - 1], "translation": [-1, -2, -3], "rotation": [0, 0, 0, 1]}
        ]
        roots = [len(nodes) - 1]
    scene: dict = {
        "asset": {"version": "2.0"},
        "meshes": meshes,
        "accessors": accessors,
        "bufferViews": views,
    }
    scene |= {"nodes": nodes, "extensionsUsed": [*used, "KHR_materials_unlit"], "materials": [{}]}
    if rng.random() < 0.8:
        scene["scenes"] = [{"nodes": roots}, {"nodes": []}]
        scene |= {"scene": 0} if rng.random() < 0.7 else {}
    scene["buffers"] = [{"byteLength": len(data)}]
    if rng.random() < 0.4:
        text = json.dumps(scene).encode()
        text += b" " * (-len(text) % 4)
        data += bytes(-len(data) % 4)
        chunks = [
            len(text).to_bytes(4, "little"),
            b"JSON",
            text,
            len(data).to_bytes(4, "little"),
            b"BIN\0",
            data,
        ]
        body = b"".join(chunks)
        path = folder / "a.glb"
        path.write_bytes(
            b"glTF" + (2).to_bytes(4, "little") + (12 + len(body)).to_bytes(4, "little") + body
        )
        return path
    if rng.random() < 0.5:
        uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    else:
        name = rng.choice(("a.bin", "a b.bin", "m\xfcller 100%.bin"))
        (folder / name).write_bytes(data)
        uri = rng.choice((quote(name), name.replace("%", "%25")))
    scene["buffers"][0]["uri"] = uri
    path = folder / "a.gltf"
    path.write_text(json.dumps(scene))
    return path


def packed(path: Path) -> Path:
    """Compress a file. Returns the path of the .gz file."""
    found = path.with_name(path.name + ".gz")
    found.write_bytes(gzip.compress(path.read_bytes()))
    return found
