"""glTF 2.0 and GLB: the meshes of a scene, each where its nodes put it.

What is not known by name here is refused.
"""

import binascii
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.polygons import mesh, strip

_KINDS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_MOST = 50_000_000  # vertices and corners of a scene, whose nodes may show one mesh many times
_GEOMETRY = (
    "KHR_mesh_quantization",
    "EXT_mesh_gpu_instancing",
    "KHR_node_visibility",
)  # extensions that change shapes and are read
# Those that change none: how a surface looks, lights, notes.
_LOOKS = re.compile(
    r"(KHR|EXT|MSFT|ADOBE)_(materials|technique|texture|lights|xmp|animation|audio)\w*"
)
_DRACO, _MESHOPT, _INSTANCING = (
    "KHR_draco_mesh_compression",
    "meshopt_compression",
    "EXT_mesh_gpu_instancing",
)


def read_gltf(path: Path) -> PointCloud:
    """The triangles of a file's scene, or if it has none its points.

    The y axis is up, as the standard says.
    """
    return _Scene(path).read()


class _Scene:
    """A file's JSON, and its buffers as they are asked for."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        self.path, self.binary = path, b""
        if data[:4] == b"glTF":
            data, self.binary = _chunks(data)
        self.json: dict[str, Any] = json.loads(data)
        version = str(self.json["asset"]["version"])
        if version.split(".")[0] != "2":
            raise ReadError(f"glTF {version} is not read, only 2.0")
        for name in self.json.get("extensionsRequired", ()):
            if name not in _GEOMETRY and not _LOOKS.fullmatch(name):
                raise ReadError(f"needs {name}, which is not read; save it without")
        self.nodes: list[dict] = self.json.get("nodes", [])
        self.places: dict[int, np.ndarray] = {}  # of each node of the scene its matrix
        self.hidden: set[int] = set()  # nodes of the scene that are not shown
        self.buffers: dict[int, bytes] = {}

    def read(self) -> PointCloud:
        self._place_nodes()
        primitives = [
            (at, node, place, primitive)
            for at, (node, place) in enumerate(self._shown())
            for primitive in self.json["meshes"][node["mesh"]]["primitives"]
            if "POSITION" in primitive["attributes"]
        ]
        solid = [item for item in primitives if item[3].get("mode", 4) > 3]
        chosen = solid or [item for item in primitives if item[3].get("mode", 4) == 0]
        if not chosen:
            raise ReadError("a scene of lines only" if primitives else "a scene without meshes")
        accessors = [
            i
            for _, _, _, p in chosen
            for i in (p["attributes"]["POSITION"], p.get("indices"))
            if i is not None
        ]
        if sum(self.json["accessors"][i]["count"] for i in accessors) > _MOST:
            raise ReadError(f"a scene of more than {_MOST:,} vertices and corners")
        vertices, faces, colors, known, total = [], [], [], {}, 0
        for at, node, place, primitive in chosen:
            attributes = primitive["attributes"]
            # primitives of one shape may share its vertices
            shared = f"{at} {attributes} {primitive.get('targets')}"
            if shared not in known:
                known[shared], points = total, self._positions(node, place, primitive)
                vertices.append(points)
                total += len(points)
                if "COLOR_0" in attributes:
                    colors.append(
                        (255 * self._values(attributes["COLOR_0"])[:, :3].clip(0, 1))
                        .round()
                        .astype(np.uint8)
                    )
            if solid:
                corners = (
                    _triangles(self._indices(primitive), primitive.get("mode", 4)) + known[shared]
                )
                faces.append(corners[:, ::-1] if np.linalg.det(place[:3, :3]) < 0 else corners)
        kept = {"colors": np.concatenate(colors)} if len(colors) == len(vertices) else {}
        return mesh(
            np.concatenate(vertices),
            np.concatenate([np.empty((0, 3), np.int64), *faces]),
            up="y",
            **kept,
        )

    # ---------------------------------------------------------------------------------------- nodes

    def _place_nodes(self) -> None:
        """Matrices of the nodes in the scene: the one that the file names, or its first; without
        scenes, all nodes.
        """
        if scenes := self.json.get("scenes"):
            roots = scenes[self.json.get("scene", 0)].get("nodes", [])
        else:
            roots = sorted(
                set(range(len(self.nodes)))
                - {c for node in self.nodes for c in node.get("children", ())}
            )
        waiting = [(root, np.eye(4), True) for root in roots]
        while waiting:
            i, above, visible = waiting.pop()
            if i in self.places or i < 0:
                raise ReadError(f"node {i} is reached twice")
            self.places[i] = above @ _matrix(self.nodes[i])
            visible &= (
                self.nodes[i]
                .get("extensions", {})
                .get("KHR_node_visibility", {})
                .get("visible", True)
            )
            self.hidden |= set() if visible else {i}
            waiting += [
                (child, self.places[i], visible) for child in self.nodes[i].get("children", ())
            ]

    def _shown(self) -> list[tuple[dict, np.ndarray]]:
        """Nodes with meshes and where they are, one entry an instance."""
        if not self.nodes:
            return [({"mesh": i}, np.eye(4)) for i in range(len(self.json.get("meshes", ())))]
        shown = []
        for i, place in sorted(self.places.items()):
            node = self.nodes[i]
            if "mesh" not in node or i in self.hidden:
                continue
            copies = [np.eye(4)]
            if instances := node.get("extensions", {}).get(_INSTANCING):
                found = {
                    name.lower(): self._values(i) for name, i in instances["attributes"].items()
                }
                count = min(len(values) for values in found.values())
                copies = [
                    _matrix({name: values[n] for name, values in found.items()})
                    for n in range(count)
                ]
            shown += [(node, place @ copy) for copy in copies]
        return shown

    # ------------------------------------------------------------------------------------- geometry

    def _positions(self, node: dict, place: np.ndarray, primitive: dict) -> np.ndarray:
        """Vertices n 3 in the scene: of the shape's weights and, where a skin moves it, in the pose
        of its joints.
        """
        attributes = primitive["attributes"]
        packed = _DRACO in primitive.get("extensions", {})
        if packed and "bufferView" not in self.json["accessors"][attributes["POSITION"]]:
            raise ReadError(f"needs {_DRACO}, which is not read; save it without")
        points = self._values(attributes["POSITION"]).astype(np.float64)
        weights = node.get("weights", self.json["meshes"][node["mesh"]].get("weights", ()))
        for weight, target in zip(weights, primitive.get("targets", ()), strict=False):
            if weight and "POSITION" in target:
                points += weight * self._values(target["POSITION"])
        if "skin" not in node or "JOINTS_0" not in attributes:
            return points @ place[:3, :3].T + place[:3, 3]
        skin = self.json["skins"][node["skin"]]
        bind = np.tile(np.eye(4), (len(skin["joints"]), 1, 1))
        if "inverseBindMatrices" in skin:
            bind = (
                self._values(skin["inverseBindMatrices"])
                .reshape(-1, 4, 4)
                .transpose(0, 2, 1)[: len(bind)]
            )
        if outside := set(skin["joints"]) - self.places.keys():
            raise ReadError(f"a skin whose joint {min(outside)} is not in the scene")
        moves, out = (
            np.stack([self.places[joint] for joint in skin["joints"]]) @ bind,
            np.zeros_like(points),
        )
        total = np.zeros((len(points), 1))
        for set_ in range(sum(name.startswith("JOINTS_") for name in attributes)):
            joints, parts = (
                self._values(attributes[f"JOINTS_{set_}"]),
                self._values(attributes[f"WEIGHTS_{set_}"]),
            )
            for joint, part in zip(joints.T, parts.T, strict=True):
                move = moves[joint]
                out += part[:, None] * (
                    np.einsum("nij,nj->ni", move[:, :3, :3], points) + move[:, :3, 3]
                )
                total += part[:, None]
        return np.where(total > 0, out / np.where(total > 0, total, 1), points)

    def _indices(self, primitive: dict) -> np.ndarray:
        """The corners of a primitive's faces, vertices of its own from 0."""
        count = self.json["accessors"][primitive["attributes"]["POSITION"]]["count"]
        if "indices" not in primitive:
            return np.arange(count)
        accessor = self.json["accessors"][primitive["indices"]]
        if accessor["count"] and "bufferView" not in accessor and "sparse" not in accessor:
            packed = (
                _DRACO if _DRACO in primitive.get("extensions", {}) else "indices without a buffer"
            )
            raise ReadError(f"needs {packed}, which is not read; save it without")
        corners = self._values(primitive["indices"])[:, 0].astype(np.int64)
        if len(corners) and corners.max() >= count:
            raise ReadError(f"a face of vertex {corners.max()}, but only {count} vertices")
        return corners

    # ------------------------------------------------------------------------------------ accessors

    def _values(self, i: int) -> np.ndarray:
        """An accessor's values n D, fractions where it says that its integers are such."""
        accessor = self.json["accessors"][i]
        count, width = accessor["count"], _WIDTHS[accessor["type"]]
        kind = np.dtype(_KINDS[accessor["componentType"]])
        if not 0 <= count <= _MOST:
            raise ReadError(f"an accessor of {count} values")
        if "bufferView" in accessor:
            values = self._view(
                accessor["bufferView"], accessor.get("byteOffset", 0), count, width, kind
            )
        else:
            values = np.zeros((count, width), kind)
        if sparse := accessor.get("sparse"):
            at, new = sparse["indices"], sparse["values"]
            some = np.dtype(_KINDS[at["componentType"]])
            where = self._view(at["bufferView"], at.get("byteOffset", 0), sparse["count"], 1, some)[
                :, 0
            ]
            values = values.copy()
            values[where] = self._view(
                new["bufferView"], new.get("byteOffset", 0), sparse["count"], width, kind
            )
        if accessor.get("normalized") and kind.kind != "f":
            values = np.maximum(values / np.iinfo(kind).max, -1)
        return values

    def _view(self, i: int, offset: int, count: int, width: int, kind: np.dtype) -> np.ndarray:
        view = self.json["bufferViews"][i]
        if packed := [name for name in view.get("extensions", {}) if name.endswith(_MESHOPT)]:
            raise ReadError(f"needs {packed[0]}, which is not read; save it without")
        begin, stride = (
            view.get("byteOffset", 0),
            view.get("byteStride", 0) or width * kind.itemsize,
        )
        data = memoryview(self._buffer(view["buffer"]))[begin : begin + view["byteLength"]]
        if min(begin, offset, stride) < 0 or (
            count and offset + (count - 1) * stride + width * kind.itemsize > len(data)
        ):
            raise ReadError(f"truncated or damaged: a view of {len(data)} bytes for {count} values")
        return np.ndarray((count, width), kind, data, offset, (stride, kind.itemsize))

    def _buffer(self, i: int) -> bytes:
        if i not in self.buffers:
            self.buffers[i] = self._load(self.json["buffers"][i].get("uri"))
            if (claimed := self.json["buffers"][i]["byteLength"]) > len(self.buffers[i]):
                raise ReadError(
                    f"truncated: buffer {i} has {len(self.buffers[i])} of {claimed} bytes"
                )
        return self.buffers[i]

    def _load(self, uri: str | None) -> bytes:
        if uri is None:
            return self.binary
        if uri[:5].lower() == "data:":
            head, _, data = uri.partition(",")
            if not head.lower().endswith(";base64"):
                return unquote_to_bytes(data)
            return binascii.a2b_base64(unquote(data).replace("-", "+").replace("_", "/"))
        for name in (unquote(uri), uri):
            if "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ReadError(f"its buffer {name} is not in its folder: only those are opened")
            if (file := self.path.parent / name).is_file():
                return file.read_bytes()
        raise ReadError(f"its buffer {unquote(uri)} is not beside it")


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """JSON and binary part of a GLB."""
    version, length = (int.from_bytes(data[i : i + 4], "little") for i in (4, 8))
    if version != 2:
        raise ReadError(f"GLB version {version} is not read, only 2")
    if length > len(data):
        raise ReadError(f"truncated: {len(data)} of {length} bytes")
    found, at = {}, 12
    while at + 8 <= length:
        size, kind = int.from_bytes(data[at : at + 4], "little"), data[at + 4 : at + 8]
        found.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    return found[b"JSON"].rstrip(b"\0 "), found.get(b"BIN\0", b"")


def _matrix(node: dict) -> np.ndarray:
    """A node's transform [4, 4]: its matrix, or translation, rotation and scale."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    turned = np.asarray(node.get("rotation", (0, 0, 0, 1)), np.float64)
    x, y, z, w = turned / (
        np.linalg.norm(turned) or 1.0
    )  # those of whole numbers have about unit length only
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    found = np.eye(4)
    found[:3, :3] = turn * np.asarray(node.get("scale", (1, 1, 1)), np.float64)
    found[:3, 3] = node.get("translation", (0, 0, 0))
    return found


def _triangles(corners: np.ndarray, mode: int) -> np.ndarray:
    """Triangles [t, 3] of a list (mode 4), strip (5) or fan (6) of vertices."""
    if mode == 5:
        return strip(corners)
    if mode == 6:
        return np.stack(
            [np.repeat(corners[:1], max(len(corners) - 2, 0)), corners[1:-1], corners[2:]], 1
        )
    if mode != 4 or len(corners) % 3:
        raise ReadError(
            f"{len(corners)} corners of triangles"
            if mode == 4
            else f"no primitives are of mode {mode}"
        )
    return corners.reshape(-1, 3)
