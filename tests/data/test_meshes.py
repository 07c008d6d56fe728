"""Meshes: the same mesh is read from every valid way of writing it, and an error names whatever
cannot be read.
"""

import base64
import gzip
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import spellings
from spellings import polygons

from jepa3d.data.cloud import PointCloud
from jepa3d.data.datasets import load
from jepa3d.data.io import ReadError, chunks, read
from jepa3d.data.meshes import triangles
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import Store

WRITERS = [spellings.off, spellings.obj, spellings.ply, spellings.stl, spellings.gltf]
CUBE = np.array([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)], np.float32)
QUADS = [[0, 2, 3, 1], [4, 5, 7, 6], [0, 1, 5, 4], [2, 6, 7, 3], [0, 4, 6, 2], [1, 3, 7, 5]]
CORNERS = np.array([[quad[0], quad[i], quad[i + 1]] for quad in QUADS for i in (1, 2)])
VERTICES = "\n".join(" ".join(str(int(v)) for v in vertex) for vertex in CUBE) + "\n"
FACES = "".join("4 " + " ".join(map(str, quad)) + "\n" for quad in QUADS)
OBJ = "".join(f"v {line}\n" for line in VERTICES.splitlines())
SQUARE = "".join(f"f {' '.join(str(i + 1) for i in quad)}\n" for quad in QUADS)
PLY = "ply\nformat {} 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
LIST = "element face 6\nproperty list uchar int vertex_indices\nend_header\n"
FACET = (
    "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
)


def area(cloud: PointCloud) -> float:
    a, b, c = cloud.file_coordinates()[cloud.faces.T]
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def box(cloud: PointCloud) -> np.ndarray:
    points = cloud.file_coordinates()
    return np.stack([points.min(0), points.max(0)])


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ReadError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------- any spelling


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("writer", WRITERS)
def test_every_spelling_of_a_mesh_has_its_points_area_and_box(tmp_path, writer, seed):
    rng = random.Random(f"{writer.__name__} {seed}")
    of_triangles = writer in (spellings.stl, spellings.gltf)
    shape = polygons(rng, (3,)) if of_triangles else polygons(rng)
    path = writer(rng, shape, tmp_path)
    if writer is not spellings.gltf and rng.random() < 0.2:
        path = spellings.packed(path)
    found = read(path)
    assert len(found) == len(shape.vertices)
    assert len(found.faces) == sum(len(face) - 2 for face in shape.faces)
    # The tolerance is for glTF files with 16-bit positions.
    assert area(found) == pytest.approx(shape.area, rel=2e-4)
    assert np.allclose(box(found), [shape.vertices.min(0), shape.vertices.max(0)], atol=3e-4)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("writer", [w for w in WRITERS if w is not spellings.gltf])
def test_a_mesh_that_is_cut_off_is_refused(tmp_path, writer, seed):
    rng = random.Random(f"{writer.__name__} {seed}")
    path = writer(rng, polygons(rng, (3,)), tmp_path)
    content = path.read_bytes().rstrip(b"\r\n \t")
    # The faces of an OBJ file may end anywhere, so its last vertices are removed instead.
    if writer is spellings.obj:
        content = b"\n".join(
            line for line in content.replace(b"\r", b"\n").split(b"\n") if b"v" not in line[:2]
        )
    within = (
        rng.randrange(75, 90)
        if writer is spellings.stl
        else int(len(content) * rng.uniform(0.2, 0.7))
    )
    # STL is cut within its last triangle, since a solid may end after any triangle.
    path.write_bytes(content[:-within])
    refusal(path)


@pytest.mark.parametrize("seed", range(20))
def test_concave_polygons_keep_their_area_with_holes_bridged_by_an_edge(seed):
    rng = np.random.default_rng(seed)
    outer = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], float)
    hole = np.array([[3, 3], [3, 5], [5, 6], [6, 3]], float) + rng.uniform(-0.5, 0.5, (4, 2))
    flat = np.concatenate([outer, outer[:1], hole, hole[:1]])[
        np.roll(np.arange(10), rng.integers(10))
    ]
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    found = triangles(flat @ turn[:2], np.array([10]), np.arange(10))
    a, b, c = flat[found.T]
    x, y = hole.T
    inner = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    signed = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
    assert np.abs(signed).sum() == pytest.approx(81 - inner)


def test_a_spiral_of_many_corners_is_cut_exactly_or_refused():
    for count in (1000, 1500):
        turn = np.linspace(0, 12 * np.pi, count)
        spiral = np.stack([turn * np.cos(turn), turn * np.sin(turn), 0 * turn], 1)
        polygon = np.concatenate([spiral, 1.08 * spiral[::-1]])
        x, y = polygon[:, :2].T
        wanted = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
        if count > 1000:
            with pytest.raises(ReadError, match="a concave polygon of 3000 corners"):
                triangles(polygon, np.array([2 * count]), np.arange(2 * count))
        else:
            a, b, c = polygon[triangles(polygon, np.array([2 * count]), np.arange(2 * count)).T]
            assert np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2 == pytest.approx(wanted)


# ------------------------------------------------------------------------------- colours and clouds


@pytest.mark.parametrize("color", ["255 0 51", "1.0 0.0 0.2", "255 0 51 255"])
def test_colours_of_vertices_are_no_coordinates(tmp_path, color):
    rows = "".join(f"{line} {color}\n" for line in VERTICES.splitlines())
    found = read(written(tmp_path / "a.off", f"COFF\n8 6 0\n{rows}{FACES}"))
    assert (area(found), found.colors.tolist()) == (pytest.approx(6), [[255, 0, 51]] * 8)
    found = read(written(tmp_path / "b.off", f"COFF\n8 0 0\n{rows}"))
    assert (found.faces, found.colors.tolist()) == (None, [[255, 0, 51]] * 8)
    found = read(written(tmp_path / "a.obj", "".join(f"v {row}\n" for row in rows.splitlines())))
    assert (found.faces, found.colors.tolist()) == (None, [[255, 0, 51]] * 8)


def test_a_cloud_of_a_ply_file_is_read_in_chunks_as_it_is_whole(tmp_path):
    for form, kind in (
        ("ascii", None),
        ("binary_little_endian", "<f4"),
        ("binary_big_endian", ">f4"),
    ):
        rows = VERTICES.encode() if kind is None else CUBE.astype(kind).tobytes()
        header = (
            PLY.format(form)
            + "comment Wei\xdf\nelement face 0\nproperty list uchar int vertex_indices\nend_header\n"
        )
        path = written(tmp_path / f"{form}.ply", header.encode("latin-1") + rows)
        assert np.array_equal(np.concatenate(list(chunks(path))), CUBE)
        assert np.allclose(read(path).file_coordinates(), CUBE)


def test_lists_that_a_ply_file_declares_and_lacks_do_not_matter(tmp_path):
    found = read(
        written(tmp_path / "a.ply", PLY.format("ascii") + LIST.split("\n", 1)[1] + VERTICES)
    )
    assert np.allclose(found.file_coordinates(), CUBE)


def test_a_list_of_negative_length_is_refused(tmp_path):
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 4\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz")
    header += "element face 3\nproperty list char int vertex_indices\nend_header\n"
    faces = [
        struct.pack("<b3i", 3, 0, 1, 2),
        struct.pack("<b", -3),
        struct.pack("<b3i", 3, 1, 2, 3),
    ]
    vertices = np.eye(4, 3, dtype="<f4").tobytes()
    (tmp_path / "a.ply").write_bytes(header.encode() + vertices + b"".join(faces))
    with pytest.raises(ReadError, match=r"a\.ply: truncated or damaged: row 1 of face"):
        read(tmp_path / "a.ply")


def test_triangle_strips_of_ply_are_faces(tmp_path):
    strips = "element tristrips 1\nproperty list int int vertex_indices\nend_header\n"
    found = read(
        written(
            tmp_path / "a.ply", PLY.format("ascii") + strips + VERTICES + "9 0 1 2 3 -1 4 5 6 7\n"
        )
    )
    assert (len(found.faces), area(found)) == (4, pytest.approx(2))
    a, b, c = found.points[found.faces.T]
    # All faces have the same orientation, although in a strip every second triangle is reversed.
    assert (np.cross(b - a, c - a)[:, 2] > 0).all()


# ---------------------------------------------------------------------------------- refused by name

SHORT = FACES.rsplit("\n", 3)[0] + "\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.off", f"4OFF\n8 6 0\n{VERTICES}{FACES}", "4OFF is not read"),
        ("a.off", f"nOFF\n3\n8 6 0\n{VERTICES}{FACES}", "nOFF is not read"),
        ("a.off", "OFF BINARY\n\0\0\0\x08", "OFF BINARY is not read"),
        ("a.off", f"OFF\n8 6 0\n{VERTICES}{SHORT}", "truncated"),
        (
            "a.off",
            f"OFF\n8 6 0\n{VERTICES}{FACES}".replace("4 1", "7 1"),
            "face 5 names 4 of 7 vertices",
        ),
        ("a.off", f"OFF\n8 6 0\n{VERTICES}{FACES}".replace("7 5", "7 8"), "a face names vertex 8"),
        ("a.off", f"OFF\n8 6 0\n{VERTICES}{FACES}".replace("7 5", "7 1.5"), "whole numbers"),
        ("a.off", f"OFF\n8 6 0\n{VERTICES.replace('1 1 1', '1 nan 1')}{FACES}", "NaN or infinite"),
        ("a.obj", OBJ + SQUARE.replace("8 6", "0 6"), "a face names vertex -1"),
        ("a.obj", OBJ.replace("1", "0,5") + SQUARE, "'0,5' where a number should be"),
        ("a.obj", OBJ + "cstype bspline\nsurf 0 1 0 1 1 2 3 4\n", "free-form surface"),
        (
            "a.ply",
            PLY.format("ascii") + LIST + VERTICES + SHORT,
            "truncated: 4 of 6 rows of face",
        ),
        (
            "a.ply",
            PLY.format("ascii").replace("8", "9" * 12) + LIST + VERTICES + FACES,
            "truncated",
        ),
        (
            "a.ply",
            PLY.format("binary_little_endian").replace("8", "9" * 12) + LIST + "x" * 99,
            "truncated",
        ),
        (
            "a.ply",
            PLY.format("binary_little_endian") + LIST.replace("uchar", "uint") + "\xff" * 500,
            "truncated",
        ),
        (
            "a.ply",
            PLY.format("ascii").replace("float", "real") + LIST + VERTICES + FACES,
            "'real' is none of int8",
        ),
        (
            "a.ply",
            PLY.format("binary_middle_endian") + LIST + VERTICES + FACES,
            "its format is not one of",
        ),
        (
            "a.ply",
            PLY.format("ascii").replace(" z", " height") + LIST + VERTICES + FACES,
            "x, y, height",
        ),
        ("a.stl", f"solid a\n{FACET}{FACET[:-10]}", "truncated"),
        ("a.stl", f"solid a\n{FACET}", "no endsolid"),
        ("a.stl", "solid a\nendsolid a\n", "has no triangles"),
        (
            "a.stl",
            b"\0" * 80 + b"\x02\0\0\0" + b"\x01" * 50,
            "truncated or not STL: it has 1 of 2 triangles",
        ),
        (
            "a.stl",
            b"\0" * 80 + b"\x01\0\0\0" + b"\x01" * 150,
            "damaged or not STL: it has 3 of 1 triangles",
        ),
        ("a.dae", "<COLLADA/>", "convert it first: pip install trimesh"),
        ("a.3mf", "PK", "convert it first"),
        ("a.vtk", "# vtk", "convert it first"),
        ("a.vtp", "<VTKFile/>", "convert"),
        ("a.fbx", "Kaydara", "convert it first: in Blender"),
        ("a.step", "ISO-10303-21;", "convert it first"),
        ("a.tar.gz", b"\x1f\x8b", "unknown kind of file"),
        ("a.ply.gz", "ply\n", "Not a gzipped file"),
        ("a.ply.gz", gzip.compress(bytes(70 << 20)), "too many for its size"),
    ],
)
def test_what_is_not_read_says_why(tmp_path, name, content, reason):
    assert reason in refusal(written(tmp_path / name, content))


def test_nan_where_no_face_is_does_not_matter(tmp_path):
    for rows in (f"{VERTICES}nan nan nan\n{FACES}", f"{VERTICES}-nan(ind) 0 1.#QNAN\n{FACES}"):
        header = PLY.format("ascii").replace("8", "9")
        found = read(written(tmp_path / "a.ply", header + LIST + rows))
        assert (len(found), area(found)) == (8, pytest.approx(6))


def test_nan_of_old_windows_programs_is_no_comment_and_no_number(tmp_path):
    for word in ("1.#QNAN", "-1.#IND", "1.#INF00"):
        rows = f"{VERTICES}5 5 {word} # a comment\n"
        written(tmp_path / "a.off", f"OFF\n9 0 0\n{rows}")
        written(tmp_path / "a.obj", "".join(f"v {row}\n" for row in rows.splitlines()))
        for name in ("a.off", "a.obj"):
            found = read(tmp_path / name)
            assert (found.unseen, box(found).tolist()) == (1, [[0] * 3, [1] * 3])


def test_a_folder_with_packed_files_and_kinds_to_convert(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    written(folder / "a.off.gz", gzip.compress(f"OFF\n8 6 0\n{VERTICES}{FACES}".encode()))
    written(folder / "b.dae", "<COLLADA/>")
    written(folder / "README.md", "# Scans")
    prepare(folder, tmp_path / "store", Preparation(points=64), workers=1)
    # a.off.gz is one compressed file, not an archive.
    prepare(folder / "a.off.gz", tmp_path / "one", Preparation(points=64), workers=1)
    assert len(Store(tmp_path / "store")) == len(Store(tmp_path / "one")) == 1
    report = json.loads((tmp_path / "store" / "report.json").read_text())
    reasons = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert "convert it first" in reasons["b.dae"]
    assert reasons["README.md"] == "unknown kind of file"


# --------------------------------------------------------------------------------------------- glTF


def gltf(path: Path, change=lambda scene: None, extra: bytes = b"") -> Path:
    """Write a cube as glTF, after `change` of its JSON. `extra` bytes follow its 168 bytes, as
    buffer view 2.
    """
    data = CUBE.tobytes() + CORNERS.astype("<u2").tobytes() + extra
    views = [(0, 96), (96, 72), (168, len(extra))]
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5123, "count": 36, "type": "SCALAR"},
        ],
        "bufferViews": [{"buffer": 0, "byteOffset": at, "byteLength": size} for at, size in views],
        "buffers": [
            {"byteLength": len(data), "uri": "data:;base64," + base64.b64encode(data).decode()}
        ],
    }
    change(scene)
    path.write_text(json.dumps(scene))
    return path


def test_instances_skins_and_weights_move_vertices(tmp_path):
    def instances(scene):
        scene["accessors"].append(
            {"bufferView": 2, "componentType": 5126, "count": 3, "type": "VEC3"}
        )
        scene["nodes"][0]["extensions"] = {
            "EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 2}}
        }
        scene["extensionsRequired"] = ["EXT_mesh_gpu_instancing"]

    places = np.array([[0, 0, 0], [5, 0, 0], [10, 0, 0]], "<f4").tobytes()
    found = read(gltf(tmp_path / "a.gltf", instances, places))
    assert (area(found), box(found).tolist()) == (pytest.approx(18), [[0, 0, 0], [11, 1, 1]])

    def weights(scene):
        scene["accessors"].append(
            {"bufferView": 2, "componentType": 5126, "count": 8, "type": "VEC3"}
        )
        scene["meshes"][0]["primitives"][0]["targets"] = [{"POSITION": 2}]
        scene["meshes"][0]["weights"] = [0.5]

    found = read(gltf(tmp_path / "a.gltf", weights, np.full((8, 3), [0, 0, 4], "<f4").tobytes()))
    assert box(found).tolist() == [[0, 0, 2], [1, 1, 3]]

    def skin(scene):
        kinds = [(5121, "VEC4", 0), (5126, "VEC4", 32)]
        for kind, name, at in kinds:
            values = {
                "bufferView": 2,
                "byteOffset": at,
                "componentType": kind,
                "count": 8,
                "type": name,
            }
            scene["accessors"].append(values)
        scene["meshes"][0]["primitives"][0]["attributes"] |= {"JOINTS_0": 2, "WEIGHTS_0": 3}
        scene["skins"] = [{"joints": [1, 2]}]
        scene["nodes"] = [
            {"mesh": 0, "skin": 0, "scale": [9, 9, 9]},
            {"translation": [0, 0, 6]},
            {"scale": [2, 2, 2]},
        ]
        scene["scenes"] = [{"nodes": [0, 1, 2]}]

    joints = np.zeros((8, 4), "u1")
    joints[:, 1] = 1
    halves = np.tile(np.float32([0.5, 0.5, 0, 0]), (8, 1))
    found = read(gltf(tmp_path / "a.gltf", skin, joints.tobytes() + halves.tobytes()))
    # The points lie halfway between the positions of the two joints.
    assert np.allclose(box(found), [[0, 0, 3], [1.5, 1.5, 4.5]])
    found = read(gltf(tmp_path / "a.gltf", skin, joints.tobytes() + (halves / 2).tobytes()))
    assert np.allclose(box(found), [[0, 0, 3], [1.5, 1.5, 4.5]])  # only ratios of weights matter
    with pytest.raises(ReadError, match="a skin with joint 2 outside the scene"):
        read(
            gltf(
                tmp_path / "a.gltf",
                lambda s: (skin(s), s["scenes"][0].update(nodes=[0, 1])),
                joints.tobytes() + halves.tobytes(),
            )
        )


def test_turns_and_colours_of_gltf_are_those_of_its_standard(tmp_path):
    found = read(gltf(tmp_path / "a.gltf", lambda s: s["nodes"][0].update(rotation=[0, 0, 2, 2])))
    assert (area(found), box(found).round(6).tolist()) == (
        pytest.approx(6),
        [[-1, 0, 0], [0, 1, 1]],
    )

    def dark(scene):
        scene["accessors"].append(
            {"bufferView": 2, "componentType": 5121, "normalized": True, "count": 8, "type": "VEC3"}
        )
        scene["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"] = 2

    assert read(gltf(tmp_path / "a.gltf", dark, b"\1" * 24)).colors.max() == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: s.update(extensionsRequired=["KHR_draco_mesh_compression"]),
            "KHR_draco_mesh_compression is not read",
        ),
        (lambda s: s.update(extensionsRequired=["FOO_bar"]), "FOO_bar is not read"),
        (
            lambda s: s["bufferViews"][0].update(extensions={"EXT_meshopt_compression": {}}),
            "EXT_meshopt_compression",
        ),
        (
            lambda s: (
                s["accessors"][0].pop("bufferView"),
                s["meshes"][0]["primitives"][0].update(
                    extensions={"KHR_draco_mesh_compression": {}}
                ),
            ),
            "KHR_draco_mesh_compression is not read",
        ),
        (
            lambda s: (
                s["accessors"][1].pop("bufferView"),
                s["meshes"][0]["primitives"][0].update(
                    extensions={"KHR_draco_mesh_compression": {}}
                ),
            ),
            "KHR_draco_mesh_compression is not read",
        ),
        (
            lambda s: s["buffers"][0].update(uri="gone%20.bin"),
            "its folder has no file gone .bin",
        ),
        (lambda s: s["buffers"][0].update(uri="../a.bin"), "is outside its folder"),
        (lambda s: s["buffers"][0].update(uri="/etc/passwd"), "is outside its folder"),
        (lambda s: s["buffers"][0].update(uri="http://localhost/a.bin"), "is outside its folder"),
        (lambda s: s["buffers"][0].update(byteLength=999), "truncated buffer 0: 168 of 999"),
        (lambda s: s["accessors"][0].update(count=99), "99 values"),
        (lambda s: s["accessors"][0].update(count=10**12), "over 50,000,000"),
        (
            lambda s: s["nodes"].append({"children": [0, 1]}) or s["scenes"][0].update(nodes=[1]),
            "reached twice",
        ),
        (lambda s: s["meshes"][0]["primitives"][0].update(mode=1), "has only lines"),
        (lambda s: s["asset"].update(version="1.0"), "is glTF 1.0, but only"),
        (lambda s: s["scenes"][0].update(nodes=[]), "has no meshes"),
    ],
)
def test_what_gltf_cannot_be_read_without_is_named(tmp_path, change, reason):
    assert reason in refusal(gltf(tmp_path / "a.gltf", change))


def test_a_packed_gltf_has_its_buffer_in_its_folder(tmp_path):
    path = gltf(tmp_path / "a.gltf", lambda s: s["buffers"][0].update(uri="a.bin"))
    written(tmp_path / "a.bin", CUBE.tobytes() + CORNERS.astype("<u2").tobytes())
    packed = written(tmp_path / "a.gltf.gz", gzip.compress(path.read_bytes()))
    assert area(read(packed)) == area(read(path)) == pytest.approx(6)


def test_a_glb_of_points_is_a_cloud(tmp_path):
    found = read(
        gltf(tmp_path / "a.gltf", lambda s: s["meshes"][0]["primitives"][0].update(mode=0))
    )
    assert found.faces is None
    assert np.array_equal(found.file_coordinates(), CUBE)


def test_a_point_of_gltf_that_no_index_names_is_not_read(tmp_path):
    def some(scene):  # of one quad
        scene["meshes"][0]["primitives"][0]["mode"] = 0
        scene["accessors"][1]["count"] = 6

    found = read(gltf(tmp_path / "a.gltf", some))
    assert np.array_equal(found.file_coordinates(), CUBE[:4])


def test_gltf_is_y_up_whatever_the_other_files_are(tmp_path):
    def tall(scene):  # height 10 along y
        scene["nodes"][0]["scale"] = [1, 10, 1]

    (tmp_path / "in").mkdir()
    path = gltf(tmp_path / "in" / "a.gltf", tall)
    assert np.allclose(box(read(path)), [[0, 0, 0], [1, 10, 1]])  # in the axes of the file
    for up_axis in ("z", "y"):
        points = load([str(path)], 256, up_axis=[up_axis]).points[0]
        assert np.ptp(points, axis=0).argmax() == 2
    stores = {None: 2, "y": 2, "z": 1}  # a given up axis overrides that of glTF
    for said, axis in stores.items():
        prepare(
            tmp_path / "in", tmp_path / str(said), Preparation(points=256, up_axis=said), workers=1
        )
        assert np.ptp(Store(tmp_path / str(said)).points(0), axis=0).argmax() == axis


def test_a_hidden_node_of_gltf_is_left_out_with_what_hangs_on_it(tmp_path):
    def hidden(scene):
        off = {
            "extensions": {"KHR_node_visibility": {"visible": False}},
            "translation": [5, 0, 0],
            "children": [2],
        }
        scene["nodes"] += [{"mesh": 0} | off, {"mesh": 0}]
        scene["scenes"][0]["nodes"] = [0, 1]

    found = read(gltf(tmp_path / "a.gltf", hidden))
    assert (area(found), box(found).tolist()) == (pytest.approx(6), [[0, 0, 0], [1, 1, 1]])
