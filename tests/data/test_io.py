"""Every kind of file is read as points, and every kind of damage gives one line with the file's
name.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import trimesh

from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import load
from jepa3d.data.errors import as_read_error
from jepa3d.data.io import read, sampled

BOX = trimesh.creation.box((1.0, 2.0, 4.0))
CLOUD = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
TETRAHEDRON = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"


def read_points(path: Path, num_points: int, seed: int = 0) -> np.ndarray:
    with as_read_error(path):
        return sampled(read(path), num_points, seed).points


def write_mesh(path: Path, mesh: trimesh.Trimesh = BOX, **options) -> Path:
    mesh.export(path, **options)
    return path


def write_cloud(path: Path, points: np.ndarray = CLOUD, **options) -> Path:
    if path.suffix == ".npy":
        np.save(path, points)
    else:
        trimesh.PointCloud(points).export(path, **options)
    return path


def read_error(path: Path, num_points: int = 16) -> str:
    """Read a damaged file. Returns the message of the ReadError, one line that begins with its
    path.
    """
    with pytest.raises(ReadError) as caught:
        read_points(path, num_points)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.off", {}),
        ("a.obj", {}),
        ("a.stl", {}),
        ("a.glb", {}),
        ("A.OFF", {"file_type": "off"}),
        ("a.ply", {}),
        ("ascii.ply", {"encoding": "ascii"}),
        ("ascii.stl", {"file_type": "stl_ascii"}),
    ],
)
def test_a_mesh_is_sampled_on_its_surface_twice_as_densely_as_needed(tmp_path, name, options):
    points = read_points(write_mesh(tmp_path / name, **options), 1200)
    assert points.shape == (2400, 3)
    assert points.dtype == np.float32
    assert np.allclose(np.ptp(points, axis=0), (1, 2, 4), atol=0.1)
    # All points lie on the faces of the box.
    low, high = points.min(0), points.max(0)
    on_face = np.minimum(points - low, high - points).min(1) < 1e-5
    assert on_face.all()


def test_a_mesh_is_sampled_by_area_not_by_triangle(tmp_path):
    fine = BOX.subdivide_to_size(0.2)
    far = trimesh.creation.box(
        (2.0, 2.0, 4.0), transform=trimesh.transformations.translation_matrix((50, 0, 0))
    )
    path = write_mesh(tmp_path / "two.ply", trimesh.util.concatenate([fine, far]))
    points = read_points(path, 2000)
    assert np.mean(points[:, 0] > 0) == pytest.approx(far.area / (far.area + fine.area), abs=0.05)


def test_mesh_samples_depend_on_the_seed_alone(tmp_path):
    path = write_mesh(tmp_path / "a.off")
    assert np.array_equal(read_points(path, 50, seed=3), read_points(path, 50, seed=3))
    assert not np.array_equal(read_points(path, 50, seed=3), read_points(path, 50, seed=4))


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.npy", {}), ("a.ply", {}), ("ascii.ply", {"encoding": "ascii"}), ("a.obj", {})],
)
def test_a_cloud_is_taken_as_it_is_up_to_its_centroid(tmp_path, name, options):
    path = write_cloud(tmp_path / name, CLOUD + 3, **options)
    assert np.allclose(read_points(path, 16), CLOUD - CLOUD.mean(0), atol=1e-5)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32])
def test_npy_of_any_number_and_with_normals_gives_xyz(tmp_path, kind):
    rows = np.concatenate([10 * CLOUD, CLOUD], 1).astype(kind)
    np.save(tmp_path / "a.npy", rows)
    points = read_points(tmp_path / "a.npy", 16)
    wanted = rows[:, :3].astype(np.float64)
    assert points.dtype == np.float32
    assert np.allclose(points, wanted - wanted.mean(0), atol=1e-3)


def test_map_coordinates_keep_their_precision(tmp_path):
    np.save(tmp_path / "utm.npy", np.add(CLOUD, (500_000, 5_400_000, 300), dtype=np.float64))
    assert np.allclose(read_points(tmp_path / "utm.npy", 16), CLOUD - CLOUD.mean(0), atol=1e-5)


def test_an_off_header_on_one_line_is_read(tmp_path):
    (tmp_path / "a.off").write_text("OFF4 4 0\n" + TETRAHEDRON)
    assert read_points(tmp_path / "a.off", 16).shape == (2048, 3)


@pytest.mark.parametrize("suffix", ["npy", "off", "ply", "obj", "stl", "glb"])
@pytest.mark.parametrize(
    "content", [b"", b"this is a letter,\nnot a shape\n"], ids=["empty", "text"]
)
def test_a_file_that_is_something_else_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    read_error(path)


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("encoding", ["ascii", "binary"])
@pytest.mark.parametrize("kind", ["mesh", "cloud"])
def test_a_truncated_ply_is_refused(tmp_path, kind, encoding, cut):
    path = tmp_path / "a.ply"
    write = write_mesh if kind == "mesh" else write_cloud
    write(path, **({"encoding": encoding} if encoding == "ascii" else {}))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    read_error(path)


@pytest.mark.parametrize("name", ["a.off", "a.stl", "a.glb"])
def test_a_truncated_mesh_is_refused(tmp_path, name):
    path = write_mesh(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    read_error(path)


@pytest.mark.parametrize("keep", [20, 200, -4])
def test_a_truncated_npy_is_refused(tmp_path, keep):
    path = write_cloud(tmp_path / "a.npy")
    path.write_bytes(path.read_bytes()[:keep])
    read_error(path)


def test_a_pickled_npy_is_refused_and_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.save(tmp_path / "a.npy", np.array([Trap()] * 20, dtype=object), allow_pickle=True)
    read_error(tmp_path / "a.npy")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.npy", "a.ply"])
def test_coordinates_that_are_no_numbers_are_refused(tmp_path, name, bad):
    points = CLOUD.copy()
    points[7, 1] = bad
    assert "NaN or infinite" in read_error(write_cloud(tmp_path / name, points))


def test_a_mesh_with_nan_vertices_is_refused(tmp_path):
    (tmp_path / "a.off").write_text("OFF\n4 4 0\n" + TETRAHEDRON.replace("0 0 1", "nan 0 1", 1))
    read_error(tmp_path / "a.off")


@pytest.mark.parametrize("name", ["a.npy", "a.ply", "a.obj"])
def test_too_few_points_are_refused_with_both_numbers(tmp_path, name):
    with pytest.raises(ReadError, match="60 points, at least 61 are needed"):
        load([str(write_cloud(tmp_path / name))], 61)


def test_points_all_equal_are_refused(tmp_path):
    assert "equal" in read_error(write_cloud(tmp_path / "a.npy", np.full((60, 3), 0.1)))


def test_a_mesh_without_area_is_refused(tmp_path):
    flat = trimesh.Trimesh([[0, 0, 0], [1, 1, 1], [2, 2, 2]], [[0, 1, 2]], process=False)
    assert "surface" in read_error(write_mesh(tmp_path / "a.off", flat))


def test_a_face_of_missing_vertices_is_refused(tmp_path):
    (tmp_path / "a.off").write_text("OFF\n4 4 0\n" + TETRAHEDRON.replace("3 1 2 3", "3 1 2 99"))
    read_error(tmp_path / "a.off")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(60),
        np.zeros((60, 2)),
        np.zeros((2, 60, 3)),
        np.full((60, 3), "1.0"),
        np.zeros((0, 3)),
    ],
)
def test_an_array_that_is_no_cloud_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    read_error(tmp_path / "a.npy")


@pytest.mark.parametrize("content", ["infinite npy", "empty npy", "text obj"])
def test_a_refusal_comes_without_warnings(tmp_path, content):
    path = tmp_path / ("a.obj" if content == "text obj" else "a.npy")
    if content == "text obj":
        path.write_text("this is a letter")
    else:
        np.save(path, np.full((60, 3), np.inf) if content == "infinite npy" else np.zeros((0, 3)))
    # A warning would be a second line on the terminal.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_error(path)


def test_a_missing_file_is_refused(tmp_path):
    read_error(tmp_path / "nothing.off")


def test_an_unknown_suffix_names_the_allowed_ones(tmp_path):
    (tmp_path / "a.docx").write_text("")
    assert ".off" in read_error(tmp_path / "a.docx")


@pytest.mark.parametrize(
    "name", ["airplane_79.off", "air_terminal.ply", "strawberry.obj", "tuna_fish_can_part.stl"]
)
def test_files_as_people_have_them_are_read(name):
    path = Path(os.environ.get("JEPA3D_DATA", ""), "files", name)
    if "JEPA3D_DATA" not in os.environ or not path.is_file():
        pytest.skip("JEPA3D_DATA has no such file")
    points = read_points(path, 64)
    assert len(points) >= 64
    assert np.isfinite(points).all()
    assert (np.ptp(points, axis=0) > 0).all()


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize(("shape", "held"), [((40, 3), "one cloud"), ((2, 40, 3), "2 clouds")])
def test_a_cloud_that_a_file_lacks_is_refused(tmp_path, name, shape, held):
    cloud = np.random.default_rng(0).normal(size=shape)
    np.save(tmp_path / name, cloud) if name == "a.npy" else np.savez(tmp_path / name, points=cloud)
    with pytest.raises(ReadError, match=f"{name}: holds {held}, but no cloud #2$"):
        read(tmp_path / name, 2)
