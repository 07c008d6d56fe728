"""Every format is read as it was written, and every damaged file gives one line."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.data import cloud as clouds
from jepa3d.data import io
from jepa3d.data.errors import as_read_error
from jepa3d.data.io import ReadError, read, sampled

h5py, laspy = pytest.importorskip("h5py"), pytest.importorskip("laspy")
pye57, pypcd4 = pytest.importorskip("pye57"), pytest.importorskip("pypcd4")

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 3)).round(3)
NORMALS = (POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)).astype(np.float32)
COLORS, PARTS = RNG.integers(0, 256, (40, 3)).astype(np.uint8), np.arange(40) % 4
UTM = np.array([500_000, 6_000_000, 300])
FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def write(path: Path, points: np.ndarray = POINTS) -> Path:
    """Write a cloud in the format of the suffix. For PCD and PLY, the file's name is the encoding
    (ascii, binary, ...).
    """
    kind = path.suffix[1:]
    if kind == "npy":
        np.save(path, points)
    elif kind == "npz":
        np.savez(path, points=points, normals=NORMALS, seg=PARTS)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file.update({"data": points, "normal": NORMALS, "pid": PARTS})
    elif kind == "pcd":
        made = pypcd4.PointCloud.from_xyz_points(points.astype(np.float32))
        made.save(path, encoding=pypcd4.Encoding(path.stem))
    elif kind in ("las", "laz"):
        made = laspy.create(file_version="1.4", point_format=7)
        made.header.scales, made.header.offsets = [0.001] * 3, points.mean(0).round()
        made.x, made.y, made.z = points.T
        made.classification, made.red, made.green, made.blue = (
            PARTS,
            *(COLORS.T.astype(np.uint16) * 257),
        )
        made.write(str(path))
    elif kind == "e57":
        with pye57.E57(str(path), "w") as file:
            pose = points.mean(0).round()  # subtracted, since pye57 writes single precision
            columns = {
                f"cartesian{axis}": (points - pose)[:, i].copy() for i, axis in enumerate("XYZ")
            }
            file.write_scan_raw(columns, translation=pose)
    elif kind in ("ply", "obj"):
        trimesh.PointCloud(points).export(
            path, **({"encoding": path.stem} if kind == "ply" else {})
        )
    else:
        np.savetxt(path, points, fmt="%.4f", delimiter="," if kind == "csv" else " ")
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(ReadError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


EXACT = [
    "a.npy",
    "a.npz",
    "a.h5",
    "a.las",
    "a.laz",
    "a.e57",
    "a.xyz",
    "a.txt",
    "a.csv",
    "a.pts",
    "a.asc",
]
SINGLE = ["ascii.ply", "binary.ply", "a.obj", "ascii.pcd", "binary.pcd", "binary_compressed.pcd"]


@pytest.mark.parametrize("name", EXACT + SINGLE)
def test_a_cloud_is_read_back(tmp_path, name):
    assert np.allclose(read(write(tmp_path / name)).file_coordinates(), POINTS, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), shift=st.sampled_from([0, 1]))
def test_random_clouds_keep_their_millimetres_on_a_map(tmp_path_factory, name, seed, shift):
    points = np.random.default_rng(seed).uniform(-50, 50, (40, 3)).round(3) + shift * UTM
    path = write(tmp_path_factory.mktemp("cloud") / name, points)
    assert np.abs(read(path).file_coordinates() - points).max() < 1e-4


@pytest.mark.parametrize("name", ["a.off", "a.obj", "a.stl", "a.ply", "a.glb", "a.gltf"])
def test_a_mesh_keeps_its_extent_and_faces(tmp_path, name):
    box = trimesh.creation.box((1, 2, 4))
    scene = (
        trimesh.exchange.gltf.export_gltf(trimesh.Scene(box), embed_buffers=True)
        if name == "a.gltf"
        else {}
    )
    (tmp_path / name).write_bytes(scene["model.gltf"]) if scene else box.export(tmp_path / name)
    mesh = read(tmp_path / name)
    assert len(mesh.faces) == 12
    assert np.allclose(np.ptp(mesh.file_coordinates(), axis=0), (1, 2, 4), atol=1e-6)


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
def test_arrays_carry_normals_and_parts(tmp_path, name):
    cloud = read(write(tmp_path / name))
    assert np.array_equal(cloud.normals, NORMALS)
    assert np.array_equal(cloud.parts, PARTS)


@pytest.mark.parametrize("name", ["a.las", "a.laz"])
def test_las_carries_classes_and_16_bit_colours(tmp_path, name):
    cloud = read(write(tmp_path / name))
    assert np.array_equal(cloud.parts, PARTS)
    assert np.array_equal(cloud.colors, COLORS)


def test_the_largest_class_of_las_is_no_label(tmp_path):
    scan = laspy.create(point_format=7, file_version="1.4")
    scan.x, scan.y, scan.z = np.eye(3)
    scan.classification = [1, 255, 2]
    scan.write(str(tmp_path / "a.las"))
    assert clouds.to_parts(read(tmp_path / "a.las").parts).tolist() == [1, -1, 2]


def test_ply_properties_come_in_any_order(tmp_path):
    names = ["label", "blue", "z", "nx", "red", "x", "ny", "green", "y", "nz"]
    columns = dict(zip(("x", "y", "z", "nx", "ny", "nz"), np.c_[POINTS, NORMALS].T, strict=True))
    columns |= dict(zip(("red", "green", "blue"), COLORS.T, strict=True)) | {"label": PARTS}
    kinds = {
        name: "uchar" if name in ("label", "red", "green", "blue") else "double" for name in names
    }
    head = "".join(f"property {kinds[name]} {name}\n" for name in names)
    rows = "\n".join(" ".join(str(columns[name][i]) for name in names) for i in range(40))
    (tmp_path / "a.ply").write_text(
        f"ply\nformat ascii 1.0\nelement vertex 40\n{head}end_header\n{rows}\n"
    )
    cloud = read(tmp_path / "a.ply")
    assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-6)
    assert np.allclose(cloud.normals, NORMALS)
    assert np.array_equal(cloud.colors, COLORS)
    assert np.array_equal(cloud.parts, PARTS)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_the_largest_label_of_a_byte_is_no_label_in_any_ply(tmp_path, form):
    rows = np.array([(0, 0, 0, 1), (1, 0, 0, 255), (0, 1, 0, 2)], "<f4, <f4, <f4, u1")
    head = "".join(f"property float {axis}\n" for axis in "xyz") + "property uchar label\n"
    head = f"ply\nformat {form} 1.0\nelement vertex 3\n{head}end_header\n".encode()
    text = "".join(" ".join(map(str, row)) + "\n" for row in rows.tolist()).encode()
    (tmp_path / "a.ply").write_bytes(head + (text if form == "ascii" else rows.tobytes()))
    assert clouds.to_parts(read(tmp_path / "a.ply").parts).tolist() == [1, -1, 2]


@pytest.mark.parametrize(("form", "order"), [("little", "<"), ("big", ">")])
def test_packed_colours_of_a_ply_do_not_depend_on_its_byte_order(tmp_path, form, order):
    kind = np.dtype([(axis, f"{order}f4") for axis in "xyz"] + [("rgb", f"{order}u4")])
    rows = np.array([(0, 0, 0, 0x112233), (1, 0, 0, 0x445566)], kind)
    head = "".join(f"property float {axis}\n" for axis in "xyz") + "property uint rgb\n"
    head = f"ply\nformat binary_{form}_endian 1.0\nelement vertex 2\n{head}end_header\n"
    (tmp_path / "a.ply").write_bytes(head.encode() + rows.tobytes())
    assert read(tmp_path / "a.ply").colors.tolist() == [[0x11, 0x22, 0x33], [0x44, 0x55, 0x66]]


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_pcd_carries_rgb_and_labels(tmp_path, encoding):
    rgb = pypcd4.PointCloud.encode_rgb(COLORS)
    if encoding == "ascii":  # written as digits, colours packed in a float would become 0
        rgb = rgb.view(np.uint32)
    kinds = (np.float32, np.float32, np.float32, rgb.dtype, np.uint32)
    made = pypcd4.PointCloud.from_points(
        [*POINTS.T, rgb, PARTS], ("x", "y", "z", "rgb", "label"), kinds
    )
    made.save(tmp_path / "a.pcd", encoding=pypcd4.Encoding(encoding))
    cloud = read(tmp_path / "a.pcd")
    assert np.array_equal(cloud.parts, PARTS)
    assert np.array_equal(cloud.colors, COLORS)


@pytest.mark.parametrize(
    ("header", "mark"),
    [
        ("x,y,z,r,g,b", ","),
        ('"X","Y","Z","R","G","B"', ","),
        ("X [m];Y [m];Z [m];red;green;blue", ";"),
        ("//X Y Z R G B", " "),
    ],
)
def test_a_header_names_the_columns(tmp_path, header, mark):
    rows = [
        mark.join(map(str, [*point, *color])) for point, color in zip(POINTS, COLORS, strict=True)
    ]
    (tmp_path / "a.csv").write_text("\n".join([header, *rows]))
    cloud = read(tmp_path / "a.csv")
    assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-6)
    assert np.array_equal(cloud.colors, COLORS)


def test_a_pts_file_may_begin_with_its_count_and_a_text_class_is_ignored(tmp_path):
    (tmp_path / "a.pts").write_text("3\n0 0 0\n1 0 0\n0 1 0\n")
    (tmp_path / "a.csv").write_text("x,y,z,class\n0,0,0,tree\n1,0,0,car\n0,1,0,car\n")
    assert len(read(tmp_path / "a.pts")) == 3
    assert read(tmp_path / "a.csv").parts is None


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_an_empty_file_and_a_folder_are_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    assert "empty" in refusal(tmp_path / f"a{suffix}")
    refusal(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("cut", [0.3, 0.8])
@pytest.mark.parametrize(
    "name", ["a.npz", "a.npy", "a.h5", "a.las", "a.laz", "a.e57", *SINGLE[:2], *SINGLE[3:]]
)
def test_a_truncated_file_is_refused(tmp_path, name, cut):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    refusal(path)


@pytest.mark.parametrize("bad", [-np.inf, np.inf, 1e300])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.xyz"])
def test_coordinates_that_are_no_places_are_refused(tmp_path, name, bad):
    points = POINTS.copy()
    points[3, 2] = bad
    assert "NaN or infinite" in refusal(write(tmp_path / name, points))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("1 2\n3 4\n", "columns"),
        ("1 2 3\n4 5\n6 7 8\n", "not a"),
        ("1 2 3\n", "one point"),
        ("1 2 3\n" * 5, "equal"),
        ("x y z\na b c\n", "no rows"),
        ("x y z x\n1 2 3 4\n", "two columns"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content, word):
    (tmp_path / "a.xyz").write_text(content)
    assert word in refusal(tmp_path / "a.xyz")


def test_one_of_two_triples_is_chosen_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("ax,ay,az,bx,by,bz\n0,0,0,1,1,1\n0,0,1,5,6,7\n")
    message = refusal(tmp_path / "a.csv")
    assert "ax,ay,az" in message
    assert "bx,by,bz" in message
    assert "--columns" in message
    assert np.allclose(
        read(tmp_path / "a.csv", columns=("bx", "by", "bz")).file_coordinates()[1], (5, 6, 7)
    )


def test_a_mesh_without_area_is_refused(tmp_path):
    (tmp_path / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n")
    with pytest.raises(ReadError, match="without surface"):
        sampled(read(tmp_path / "a.off"), 16)


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 0)() == 0, reason="root reads all, and Windows has no such modes"
)
def test_an_unreadable_file_is_refused(tmp_path):
    write(tmp_path / "a.xyz").chmod(0)
    refusal(tmp_path / "a.xyz")


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.savez(tmp_path / "a.npz", points=np.array([Trap()] * 20, dtype=object))
    refusal(tmp_path / "a.npz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "module"), [("a.h5", "h5py"), ("a.las", "laspy"), ("a.e57", "pye57")]
)
def test_a_missing_parser_says_how_to_get_it(tmp_path, monkeypatch, name, module):
    path = write(tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'jepa3d[io]'" in refusal(path)


@pytest.mark.parametrize("name", ["a.off", "ascii.pcd", "binary_compressed.pcd", "a.npy"])
def test_absurd_claims_of_a_header_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "a.off":
        path.write_text("OFF\n999999999999 999999999999 0\n0 0 0\n")
    else:
        content = write(path).read_bytes()
        claims = [(b"POINTS 40", b"POINTS 1000000000000"), (b"(40, 3)", b"(4000000000000, 3)")]
        path.write_bytes(content.replace(*claims[name == "a.npy"]))
    refusal(path)


def test_a_larger_table_is_a_uniform_part_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(clouds, "CHUNK", 97)
    monkeypatch.setattr(clouds.Reservoir.__init__, "__defaults__", (500, 0))
    rows = np.arange(4000)
    np.savetxt(tmp_path / "a.xyz", np.c_[rows, rows % 7, rows % 11], fmt="%d")
    first, second = read(tmp_path / "a.xyz"), read(tmp_path / "a.xyz")
    assert (len(first), first.total) == (500, 4000)
    assert np.array_equal(first.points, second.points)
    quarters = np.histogram(first.file_coordinates()[:, 0], 4, (0, 4000))[0]
    assert (np.abs(quarters - 125) < 40).all()
    assert len(np.unique(first.file_coordinates()[:, 0].round())) == 500


def test_nothing_but_read_errors_leave_damaged_files(tmp_path):
    command = [
        sys.executable,
        FUZZ,
        "--readers",
        "las,laz",
        "--inputs",
        "80",
        "--seconds",
        "8",
        "--keep",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_ply_whose_header_never_ends_is_refused(tmp_path):
    path = tmp_path / "a.ply"
    trimesh.PointCloud(np.eye(3)).export(path, encoding="ascii")
    path.write_bytes(path.read_bytes().replace(b"end_header", b"end_heades"))
    with pytest.raises(ReadError, match=r"a\.ply: "):
        read(path)


def test_an_error_in_a_packed_array_names_no_temporary_file(tmp_path):
    np.savez(tmp_path / "a.npz", other=POINTS)
    (tmp_path / "a.npz.gz").write_bytes(gzip.compress((tmp_path / "a.npz").read_bytes()))
    for name in ("a.npz", "a.npz.gz"):
        with pytest.raises(ReadError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: has no array named data")


def test_names_within_a_file_cannot_break_the_line(tmp_path):
    np.savez(tmp_path / "a.npz", **{"po\nints": POINTS})
    assert "po?ints" in refusal(tmp_path / "a.npz")


def test_an_error_of_any_kind_becomes_one_line_that_names_the_file():
    class Damaged(Exception):
        """The error of somebody's reader."""

    with pytest.raises(ReadError) as caught, as_read_error(Path("a.rec")):
        raise Damaged("no header\nin block 3")
    assert str(caught.value) == "a.rec: damaged or not a REC file (no header)"
