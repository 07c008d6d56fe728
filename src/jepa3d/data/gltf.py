"""Read the meshes of a scene from a glTF 2.0 or GLB file.

A scene is a tree of nodes. Each node has a matrix, which moves the node and its children. A node
may show a mesh. A mesh is a list of primitives, each with vertices and perhaps the indices of its
triangles. Vertices and indices lie in buffers; accessors describe their types and their places in
the buffers. A file that requires an extension which this module does not know is refused.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, rotation
from jepa3d.data.meshes import mesh, strip

# numbers of component types in glTF -> numpy types
_KINDS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
# largest number of vertices plus corners of triangles in a scene, and largest number of elements of
# one accessor; these limits are needed, since a small file may show one mesh many times, or have an
# accessor of any length without a buffer, which means zeros
_MAX_VALUES = 50_000_000
# extensions that change shapes and that this module applies
_GEOMETRY = ("KHR_mesh_quantization", "EXT_mesh_gpu_instancing", "KHR_node_visibility")
# extensions that change no shape (materials, lights, metadata and so on) and are ignored
_LOOKS = re.compile(
    r"(KHR|EXT|MSFT|ADOBE)_(materials|technique|texture|lights|xmp|animation|audio)\w*"
)
_DRACO, _MESHOPT = "KHR_draco_mesh_compression", "meshopt_compression"
_UNREAD = "extension {} is not read: save the file without it"


def read_gltf(path: Path, folder: Path) -> PointCloud:
    """Read the triangles of the scene, or its points if it has no triangles.

    folder: holds the buffers that lie in files of their own. The up axis is y, as the glTF standard
    says. Raises ReadError.
    """
    return _Scene(path, folder).read()


class _Scene:
    """The JSON of a file and its buffers; each buffer is loaded when it is first used."""

    def __init__(self, path: Path, folder: Path):
        data = path.read_bytes()
        self.folder, self.binary = folder, b""
        if data[:4] == b"glTF":
            data, self.binary = _chunks(data)
        self.json: dict[str, Any] = json.loads(data)
        version = str(self.json["asset"]["version"])
        if version.split(".")[0] != "2":
            raise ReadError(f"is glTF {version}, but only glTF 2.0 is read")
        for name in self.json.get("extensionsRequired", ()):
            if name not in _GEOMETRY and not _LOOKS.fullmatch(name):
                raise ReadError(_UNREAD.format(name))
        self.nodes: list[dict] = self.json.get("nodes", [])
        # node in the scene -> matrix [4, 4] from its coordinates to those of the scene
        self.places: dict[int, np.ndarray] = {}
        self.shown: dict[int, bool] = {}  # node in the scene -> True if visible
        self.buffers: dict[int, bytes] = {}

    def read(self) -> PointCloud:
        self._place_nodes()
        primitives = [
            (at, node, place, primitive)
            for at, (node, place) in enumerate(self._shown())
            for primitive in self.json["meshes"][node["mesh"]]["primitives"]
            if "POSITION" in primitive["attributes"]
        ]
        # modes 4 to 6 are triangles, mode 0 is points, and modes 1 to 3 are lines
        solid = [item for item in primitives if item[3].get("mode", 4) > 3]
        chosen = solid or [item for item in primitives if item[3].get("mode", 4) == 0]
        if not chosen:
            what = "has only lines" if primitives else "has no meshes"
            raise ReadError(f"the scene {what}; it must have triangles or points")
        used = [p["attributes"]["POSITION"] for *_, p in chosen]
        used += [p["indices"] for *_, p in chosen if "indices" in p]
        if sum(self.json["accessors"][i]["count"] for i in used) > _MAX_VALUES:
            raise ReadError(f"the scene has over {_MAX_VALUES:,} vertices and corners")
        vertices, faces, colors, known = [], [np.empty((0, 3), np.int64)], [], {}
        shown, total = [], 0
        for at, node, place, primitive in chosen:
            attributes = primitive["attributes"]
            # primitives of one node often share their vertices: read shared vertices once
            shared = f"{at} {attributes} {primitive.get('targets')}"
            if shared not in known:
                known[shared], points = total, self._positions(node, place, primitive)
                vertices.append(points)
                total += len(points)
                if "COLOR_0" in attributes:
                    fractions = self._values(attributes["COLOR_0"])[:, :3].clip(0, 1)
                    colors.append((255 * fractions).round().astype(np.uint8))
            if not solid:
                shown.append(self._indices(primitive) + known[shared])
            else:
                corners = _triangles(self._indices(primitive), primitive.get("mode", 4))
                # convert indices of the primitive's vertices to indices of all vertices
                corners = corners + known[shared]
                # a mirrored mesh is inside out; reversing the corners of its triangles undoes that
                mirrored = np.linalg.det(place[:3, :3]) < 0
                faces.append(corners[:, ::-1] if mirrored else corners)
        rgb = np.concatenate(colors) if len(colors) == len(vertices) else None
        xyz = np.concatenate(vertices)
        if shown:  # a point that no index names is not part of the scene
            kept = np.unique(np.concatenate(shown))
            xyz, rgb = xyz[kept], None if rgb is None else rgb[kept]
        return mesh(xyz, np.concatenate(faces), up="y", colors=rgb)

    # ---------------------------------------------------------------------------------------- nodes

    def _place_nodes(self) -> None:
        """Set `places` and `shown` for the nodes of the default scene.

        If the file names no default scene, the first scene is used; if it has no scenes, all nodes
        are used. Raises ReadError if the nodes do not form a tree.
        """
        if scenes := self.json.get("scenes"):
            roots = scenes[self.json.get("scene", 0)].get("nodes", [])
        else:
            inner = {child for node in self.nodes for child in node.get("children", ())}
            roots = sorted(set(range(len(self.nodes))) - inner)
        waiting = [(root, np.eye(4), True) for root in roots]
        while waiting:
            i, above, visible = waiting.pop()
            if i in self.places or i < 0:
                raise ReadError(f"node {i} is reached twice; nodes must form a tree")
            node = self.nodes[i]
            self.places[i] = above @ _matrix(node)
            visible &= _extension(node, "KHR_node_visibility").get("visible", True)
            self.shown[i] = visible
            children = node.get("children", ())
            waiting += [(child, self.places[i], visible) for child in children]

    def _shown(self) -> list[tuple[dict, np.ndarray]]:
        """Return pairs (node, matrix) of the visible nodes that have a mesh.

        If a node has instances, there is one pair per instance. If the file has no nodes, there is
        one pair per mesh.
        """
        if not self.nodes:
            meshes = self.json.get("meshes", ())
            return [({"mesh": i}, np.eye(4)) for i in range(len(meshes))]
        shown = []
        for i, place in sorted(self.places.items()):
            node = self.nodes[i]
            if "mesh" not in node or not self.shown[i]:
                continue
            copies = [{}]
            if instances := _extension(node, "EXT_mesh_gpu_instancing"):
                attributes = instances["attributes"]
                rows = zip(*map(self._values, attributes.values()), strict=False)
                names = [name.lower() for name in attributes]
                copies = [dict(zip(names, row, strict=True)) for row in rows]
            shown += [(node, place @ _matrix(copy)) for copy in copies]
        return shown

    # ------------------------------------------------------------------------------------- geometry

    def _positions(self, node: dict, place: np.ndarray, primitive: dict) -> np.ndarray:
        """Return the vertices [n, 3] of a primitive in scene coordinates.

        Morph targets, if there are any, move the vertices first. Then the skin places the vertices
        in the scene. Without a skin, the matrix `place` of the node does this. Raises ReadError for
        a compressed primitive, for a skin with a joint outside the scene, and as `_values` does.
        """
        attributes = primitive["attributes"]
        self._check_packed(primitive, attributes["POSITION"])
        points = self._values(attributes["POSITION"]).astype(np.float64)
        weights = self.json["meshes"][node["mesh"]].get("weights", ())
        weights = node.get("weights", weights)
        for weight, target in zip(weights, primitive.get("targets", ()), strict=False):
            if weight and "POSITION" in target:
                points += weight * self._values(target["POSITION"])
        if "skin" not in node or "JOINTS_0" not in attributes:
            return points @ place[:3, :3].T + place[:3, 3]
        skin = self.json["skins"][node["skin"]]
        if outside := set(skin["joints"]) - self.places.keys():
            raise ReadError(f"has a skin with joint {min(outside)} outside the scene")
        moves = np.stack([self.places[joint] for joint in skin["joints"]])
        if "inverseBindMatrices" in skin:
            bind = self._values(skin["inverseBindMatrices"]).reshape(-1, 4, 4)
            moves = moves @ bind.transpose(0, 2, 1)[: len(moves)]
        out, total = np.zeros_like(points), np.zeros((len(points), 1))
        for number in range(sum(name.startswith("JOINTS_") for name in attributes)):
            joints = self._values(attributes[f"JOINTS_{number}"])
            shares = self._values(attributes[f"WEIGHTS_{number}"])
            for joint, share in zip(joints.T, shares.T[..., None], strict=True):
                rotated = np.einsum("nij,nj->ni", moves[joint, :3, :3], points)
                out += share * (rotated + moves[joint, :3, 3])
                total += share
        return np.where(total > 0, out / np.where(total > 0, total, 1), points)

    def _indices(self, primitive: dict) -> np.ndarray:
        """Return the corners of a primitive's faces, as indices of its vertices.

        Raises ReadError if the indices are compressed or have no buffer, if an index is larger than
        that of the last vertex, and as `_values` does.
        """
        count = self.json["accessors"][primitive["attributes"]["POSITION"]]["count"]
        if "indices" not in primitive:
            return np.arange(count)
        self._check_packed(primitive, primitive["indices"])
        corners = self._values(primitive["indices"])[:, 0].astype(np.int64)
        if len(corners) and corners.max() >= count:
            raise ReadError(f"a face names vertex {corners.max()}, but the last is {count - 1}")
        return corners

    def _check_packed(self, primitive: dict, i: int) -> None:
        """Raise ReadError if accessor `i` is compressed or holds face indices without a buffer."""
        accessor = self.json["accessors"][i]
        if accessor["count"] and not {"bufferView", "sparse"} & accessor.keys():
            if _DRACO in primitive.get("extensions", {}):
                raise ReadError(_UNREAD.format(_DRACO))
            if i == primitive.get("indices"):
                raise ReadError("has face indices without a buffer, which are not read")

    # ------------------------------------------------------------------------------------ accessors

    def _values(self, i: int) -> np.ndarray:
        """Return the values [n, D] of an accessor; normalised integers become fractions.

        Raises ReadError if the accessor has too many elements, or if its buffer is missing,
        truncated or compressed.
        """
        accessor = self.json["accessors"][i]
        count, width = accessor["count"], _WIDTHS[accessor["type"]]
        kind = np.dtype(_KINDS[accessor["componentType"]])
        if not 0 <= count <= _MAX_VALUES:
            raise ReadError(f"accessor {i} has {count:,} values, over {_MAX_VALUES:,}")
        values = np.zeros((count, width), kind)
        if "bufferView" in accessor:
            values = self._view(accessor, count, width, kind)
        if sparse := accessor.get("sparse"):
            at = np.dtype(_KINDS[sparse["indices"]["componentType"]])
            where = self._view(sparse["indices"], sparse["count"], 1, at)[:, 0]
            values = values.copy()
            values[where] = self._view(sparse["values"], sparse["count"], width, kind)
        if accessor.get("normalized") and kind.kind != "f":
            values = np.maximum(values / np.iinfo(kind).max, -1)
        return values

    def _view(self, where: dict, count: int, width: int, kind: np.dtype) -> np.ndarray:
        """Return values [count, width] of a buffer view, without a copy.

        where: an accessor, or one of the two parts of a sparse accessor (indices, values). It names
        the view and the first byte to read in the view.
        """
        view = self.json["bufferViews"][where["bufferView"]]
        offset = where.get("byteOffset", 0)
        for name in view.get("extensions", {}):
            if name.endswith(_MESHOPT):
                raise ReadError(_UNREAD.format(name))
        begin, size = view.get("byteOffset", 0), width * kind.itemsize
        stride = view.get("byteStride", 0) or size
        end = begin + view["byteLength"]
        data = memoryview(self._buffer(view["buffer"]))[begin:end]
        needed = offset + (count - 1) * stride + size if count else 0
        if min(begin, offset, stride) < 0 or needed > len(data):
            raise ReadError(f"truncated: a buffer has {len(data)} bytes for {count} values")
        return np.ndarray((count, width), kind, data, offset, (stride, kind.itemsize))

    def _buffer(self, i: int) -> bytes:
        if i not in self.buffers:
            buffer = self.json["buffers"][i]
            self.buffers[i] = data = self._load(buffer.get("uri"))
            if (size := buffer["byteLength"]) > len(data):
                raise ReadError(f"truncated buffer {i}: {len(data)} of {size} bytes")
        return self.buffers[i]

    def _load(self, uri: str | None) -> bytes:
        """Load a buffer from the file itself or from `folder`.

        A buffer without a URI is the binary chunk of a GLB. Raises ReadError for a buffer that is
        missing or lies outside the folder.
        """
        if uri is None:
            return self.binary
        if uri[:5].lower() == "data:":
            head, _, data = uri.partition(",")
            if not head.lower().endswith(";base64"):
                return unquote_to_bytes(data)
            return base64.urlsafe_b64decode(unquote(data))
        for name in (unquote(uri), uri):
            if "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ReadError(f"its buffer {name} is outside its folder")
            if (file := self.folder / name).is_file():
                return file.read_bytes()
        raise ReadError(f"its folder has no file {unquote(uri)}, which it needs as a buffer")


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """Split a GLB into its JSON and its binary chunk."""
    version, length = (int.from_bytes(data[i : i + 4], "little") for i in (4, 8))
    if version != 2:
        raise ReadError(f"is GLB version {version}, but only version 2 is read")
    if length > len(data):
        raise ReadError(f"truncated: it has {len(data)} of {length} bytes")
    found, at = {}, 12
    while at + 8 <= length:
        size, kind = int.from_bytes(data[at : at + 4], "little"), data[at + 4 : at + 8]
        found.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    return found[b"JSON"].rstrip(b"\0 "), found.get(b"BIN\0", b"")


def _extension(item: dict, name: str) -> dict:
    return item.get("extensions", {}).get(name, {})


def _matrix(node: dict) -> np.ndarray:
    """Return a node's transform [4, 4], from its matrix or its translation, rotation and scale."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    found = np.eye(4)
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    rotate = rotation(np.array([w, x, y, z], np.float64))
    found[:3, :3] = rotate * np.asarray(node.get("scale", (1, 1, 1)), np.float64)
    found[:3, 3] = node.get("translation", (0, 0, 0))
    return found


def _triangles(corners: np.ndarray, mode: int) -> np.ndarray:
    """Return triangles [t, 3] of vertex indices.

    corners: vertex indices in the order of a list of triangles (mode 4), a strip (5) or a fan (6).
    Raises ReadError for any other mode, and for a list whose length is no multiple of 3.
    """
    if mode == 5:
        return strip(corners)
    if mode == 6:
        hub = np.repeat(corners[:1], max(len(corners) - 2, 0))
        return np.stack([hub, corners[1:-1], corners[2:]], 1)
    if mode != 4:
        raise ReadError(f"has primitives of mode {mode}; allowed are 0 to 6")
    if len(corners) % 3:
        raise ReadError(f"its triangles have {len(corners)} corners, no multiple of 3")
    return corners.reshape(-1, 3)
