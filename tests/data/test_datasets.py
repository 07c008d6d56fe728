"""Loading of sources as `PointClouds`: clouds lie in the unit sphere, z is up, and farthest point
sampling gives exactly num_points. Damaged sources are reported in one line.
"""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import layouts
import numpy as np
import pytest
import trimesh

from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.io import ReadError
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.synthetic import make_shapes

RNG = np.random.default_rng(0)
SHAPES = RNG.normal(size=(12, 40, 3)).astype(np.float32) * np.array([1, 2, 3], np.float32)


@pytest.fixture
def bundle(tmp_path):
    """Return a function that writes a bundle of SHAPES with the given arrays; an array None is left
    out.
    """

    def write(name: str = "shapes.npz", **arrays) -> str:
        arrays = {"points": SHAPES} | arrays
        np.savez(
            tmp_path / name, **{key: value for key, value in arrays.items() if value is not None}
        )
        return str(tmp_path / name)

    return write


def write_clouds(root: Path, *names: str, clouds: np.ndarray = SHAPES) -> Path:
    for name, cloud in zip(names, clouds, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, cloud)
    return root


def write_shapenet55(root: Path) -> Path:
    """Write files in Point-BERT's layout: two lists of file names, and the clouds they name."""
    train = ["02691156-aa-1.npy", "03001627-bb.npy", "03001627-cc.npy"]
    test = ["02691156-dd.npy", "04379243-ee.npy"]
    write_clouds(root / "shapenet_pc", *train, *test)
    (root / "ShapeNet-55").mkdir()
    (root / "ShapeNet-55" / "train.txt").write_text("\n".join(train) + "\n")
    (root / "ShapeNet-55" / "test.txt").write_text("\n".join(test))
    return root


def standard(clouds: np.ndarray) -> np.ndarray:
    clouds = clouds - clouds.mean(1, keepdims=True)
    return clouds / np.linalg.norm(clouds, axis=2).max(1)[:, None, None]


def read_error(source, num_points: int = 16, split: str = "all", **options) -> str:
    """Load a damaged source. Returns the message of the ReadError, which must be one line that
    names the source.
    """
    with pytest.raises(ReadError) as caught:
        load([str(source)], num_points, split, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(source).name in message
    return message


# --------------------------------------------------------------------------- the contract of points


def test_clouds_are_float32_in_the_unit_sphere(bundle):
    clouds = load([bundle(points=100 + 7 * SHAPES)], 16, "all").points
    assert clouds.shape == (12, 16, 3)
    assert clouds.dtype == np.float32
    assert np.allclose(clouds.mean(1), 0, atol=1e-6)
    assert np.allclose(np.linalg.norm(clouds, axis=2).max(1), 1, atol=1e-6)


def test_points_are_chosen_by_farthest_point_sampling(bundle):
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    crowds = np.repeat(corners, 20, 0)[RNG.permutation(160)] + 0.01 * RNG.normal(size=(5, 160, 3))
    picked = load([bundle(points=crowds.astype(np.float32))], 8, "all").points
    octant = (picked > 0) @ (1, 2, 4)
    # One point of each crowd is sampled; random sampling would almost never do that.
    assert (np.sort(octant, axis=1) == np.arange(8)).all()


def test_z_up_shapes_stay_as_they_are(bundle):
    assert np.allclose(load([bundle()], 40, "all", ["z"]).points, standard(SHAPES), atol=1e-5)


@pytest.mark.parametrize(("axis", "up"), [("x", 0), ("y", 1)])
def test_the_up_axis_becomes_z_by_a_rotation(bundle, axis, up):
    turned, plain = load([bundle()], 40, "all", [axis]).points, standard(SHAPES)
    assert np.allclose(turned[..., 2], plain[..., up], atol=1e-5)
    # Lengths and angles are unchanged, and the shape is not mirrored.
    assert np.allclose(turned @ turned.swapaxes(1, 2), plain @ plain.swapaxes(1, 2), atol=1e-4)
    assert np.allclose(np.linalg.det(turned[:, :3]), np.linalg.det(plain[:, :3]), atol=1e-4)


def test_y_up_is_turned_as_the_published_sets_are(bundle):
    x, y, z = np.moveaxis(standard(SHAPES), -1, 0)
    assert np.allclose(
        load([bundle()], 40, "all", ["y"]).points, np.stack([x, -z, y], -1), atol=1e-5
    )


def test_an_unknown_up_axis_is_refused_in_one_line(bundle):
    # A dot matches no newline, so the message is one line.
    with pytest.raises(ValueError, match=r"\A.*w.*\Z"):
        load([bundle()], 16, "all", ["w"])


def test_map_coordinates_in_a_bundle_keep_their_precision(bundle):
    utm = np.add(SHAPES, (500_000, 5_400_000, 300), dtype=np.float64)
    assert np.allclose(load([bundle(points=utm)], 40, "all").points, standard(SHAPES), atol=1e-3)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_clouds_of_any_unit_lie_in_the_unit_sphere(bundle, unit):
    clouds = SHAPES.astype(np.float64)
    clouds[::2] *= unit
    assert np.allclose(load([bundle(points=clouds)], 40, "all").points, standard(SHAPES), atol=1e-5)


def test_half_precision_bundles_are_read(bundle):
    found = load([bundle(points=standard(SHAPES).astype(np.float16))], 40, "all").points
    assert np.allclose(found, standard(SHAPES), atol=2e-3)


def test_further_columns_of_a_bundle_are_ignored_as_in_other_array_files(bundle):
    wide = bundle(points=np.concatenate([SHAPES, RNG.normal(size=SHAPES.shape)], 2))
    assert np.allclose(load([wide], 40, "all").points, standard(SHAPES), atol=1e-5)


def test_raw_leaves_the_points_alone(bundle):
    assert np.array_equal(load([bundle()], 1, "all", raw=True).points, SHAPES)


@pytest.mark.parametrize("kind", ["bundle", "folder", "synthetic"])
def test_the_same_source_gives_identical_arrays_twice(tmp_path, bundle, kind):
    if kind == "folder":
        trimesh.creation.box().export(tmp_path / "box.off")
        write_clouds(tmp_path, "a.npy")
    source = {
        "bundle": bundle,
        "folder": lambda: str(tmp_path),
        "synthetic": lambda: "synthetic:8",
    }[kind]()
    one, two = (load([source], 16, "all") for _ in range(2))
    assert np.array_equal(one.points, two.points)
    assert one.fingerprint == two.fingerprint


# ------------------------------------------------------------------------------------------ bundles


def test_a_bundle_gives_labels_names_and_split(bundle):
    labels, split = np.arange(12) % 3, (np.arange(12) >= 8).astype(np.int8)
    source = bundle(labels=labels, split=split, class_names=np.array(["a", "b", "c"]))
    every, train, test = (load([source], 16, part) for part in ("all", "train", "test"))
    assert np.array_equal(every.labels, labels)
    assert every.class_names == ("a", "b", "c")
    assert np.array_equal(train.points, every.points[:8])
    assert np.array_equal(test.points, every.points[8:])
    assert np.array_equal(test.labels, labels[8:])
    assert np.array_equal(every.part("test").points, test.points)


def test_labels_key_chooses_labels_and_their_names(bundle):
    source = bundle(
        labels=np.zeros(12, int),
        labels_x=np.arange(12) % 2,
        x_names=np.array(["p", "q"]),
        class_names=np.array(["a"]),
    )
    found = load([source], 16, "all", labels_key="labels_x")
    assert np.array_equal(found.labels, np.arange(12) % 2)
    assert found.class_names == ("p", "q")


def test_labels_may_be_names_as_in_other_array_files(bundle):
    found = load([bundle(labels=np.array(["cup", "axe"] * 6))], 16, "all")
    assert found.class_names == ("axe", "cup")
    assert found.labels.tolist() == [1, 0] * 6


def test_labels_without_names_are_named_by_number(bundle):
    assert load([bundle(labels=np.arange(12) % 3)], 16, "all").class_names == ("0", "1", "2")


def test_the_fingerprint_of_a_bundle_is_its_files_sha256(bundle):
    source = bundle()
    assert (
        load([source], 16, "all").fingerprint
        == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    )


def test_a_bundle_without_split_counts_as_train(bundle):
    assert len(load([bundle()], 16, "train")) == 12
    read_error(bundle(), split="test")


def test_asking_a_part_of_data_without_a_split_is_refused(bundle):
    with pytest.raises(ValueError, match="split"):
        load([bundle()], 16, "all").part("train")


def with_value(value: float) -> np.ndarray:
    points = SHAPES.copy()
    points[5, 3, 1] = value
    return points


def all_equal() -> np.ndarray:
    points = SHAPES.copy()
    points[5] = points[5, 0]
    return points


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"points": with_value(np.nan)}, "shape 5"),
        ({"points": with_value(np.inf)}, "shape 5"),
        ({"points": all_equal()}, "shape 5"),
        ({"points": SHAPES[:, :15]}, "15 points"),
        ({"points": SHAPES[..., :2]}, "points"),
        ({"points": SHAPES[:0]}, ""),
        ({"points": SHAPES.astype("U8")}, ""),
        ({"points": None, "labels": np.arange(12)}, "labels"),
        ({"points": None}, "none"),
        ({"points": np.array([None] * 12)}, ""),
        ({"labels": np.arange(11)}, "labels"),
        ({"labels": np.arange(12) / 3}, "labels"),
        ({"labels": np.arange(12), "class_names": np.array(["a", "b"])}, ""),
        ({"split": np.zeros(11, np.int8)}, "split"),
    ],
    ids=[
        "nan",
        "inf",
        "all equal",
        "too few points",
        "two columns",
        "no shapes",
        "text for points",
        "no points",
        "nothing",
        "pickled",
        "labels too short",
        "fractions for labels",
        "fewer names than labels",
        "split too short",
    ],
)
def test_a_bundle_that_cannot_be_used_is_refused(bundle, arrays, said):
    assert said in read_error(bundle(**arrays))


def test_labels_that_the_bundle_lacks_are_refused_naming_those_it_has(bundle):
    source = bundle(labels=np.arange(12), labels_x=np.arange(12))
    message = read_error(source, labels_key="labels_y")
    assert "labels_y" in message
    assert "labels_x" in message


@pytest.mark.parametrize("kind", ["folder", "store", "hdf5", "synthetic:8"])
def test_a_labels_key_is_refused_by_a_source_that_is_no_bundle(tmp_path, kind):
    source = write_clouds(tmp_path / "folder", "axe/1.npy")
    if kind == "store":
        prepare(source, tmp_path / "store", Preparation(points=16), workers=1)
        source = tmp_path / "store"
    elif kind == "hdf5":
        source = tmp_path / "shapes.h5"
        with h5py.File(source, "w") as file:
            file["data"], file["label"], file["labels_x"] = SHAPES, [0] * 12, [0] * 12
    elif kind != "folder":
        source = kind
    assert "labels_x" in read_error(source, labels_key="labels_x")


@pytest.mark.parametrize("labels_key", ["points", "split", "class_names"])
def test_labels_key_must_name_labels(bundle, labels_key):
    source = bundle(
        labels=np.arange(12), split=np.zeros((12, 1)), class_names=np.array(list("abcdefghijk"))
    )
    read_error(source, labels_key=labels_key)


@pytest.mark.parametrize("content", ["empty", "text", "half", "npy", "damaged member"])
def test_a_damaged_bundle_is_refused(tmp_path, bundle, content):
    path = Path(bundle())
    whole = path.read_bytes()
    if content == "npy":
        np.save(tmp_path / "a.npy", SHAPES)
        (tmp_path / "a.npy").replace(path)
    elif content == "damaged member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("points.npy", b"no array")
    else:
        path.write_bytes(
            {"empty": b"", "text": b"hello\nyou\n", "half": whole[: len(whole) // 2]}[content]
        )
    read_error(path)


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_mixes_kinds_of_files(tmp_path):
    box = trimesh.creation.box((1, 2, 3))
    for name in ("a.off", "b.ply", "c.obj", "d.stl"):
        box.export(tmp_path / name)
    box.export(tmp_path / "e.ply", encoding="ascii")
    trimesh.PointCloud(SHAPES[0]).export(tmp_path / "f.ply")
    np.save(tmp_path / "g.npy", SHAPES[1])
    (tmp_path / "README.txt").write_text("not a shape")
    found = load([str(tmp_path)], 16)
    assert found.points.shape == (7, 16, 3)
    assert np.allclose(np.linalg.norm(found.points, axis=2).max(1), 1, atol=1e-6)
    assert found.labels is None
    assert found.split is None


def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    write_clouds(tmp_path, os.fsdecode(b"caf\xe9/1.npy"), "dog/1.npy")
    assert len(load([str(tmp_path)], 16)) == 2


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    write_clouds(tmp_path, "cup/1.npy", "axe/1.npy", "cup/deep/2.npy", "bed/1.npy")
    found = load([str(tmp_path)], 16)
    assert found.class_names == ("axe", "bed", "cup")
    assert found.labels.tolist() == [0, 1, 2, 2]


def test_train_and_test_folders_are_the_split(tmp_path):
    write_clouds(
        tmp_path,
        "axe/train/1.npy",
        "axe/test/2.npy",
        "cup/train/3.npy",
        "cup/test/4.npy",
        "cup/test/5.npy",
    )
    every, train, test = (load([str(tmp_path)], 16, split) for split in ("all", "train", "test"))
    assert every.split.tolist() == [1, 0, 1, 1, 0]
    assert every.labels.tolist() == [0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 1, 1]
    assert np.array_equal(train.points, every.points[every.split == 0])


def test_a_class_of_one_part_only_keeps_its_number(tmp_path):
    write_clouds(tmp_path, "axe/train/1.npy", "cup/train/2.npy", "cup/test/3.npy")
    every, test = (load([str(tmp_path)], 16, split) for split in ("all", "test"))
    assert [test.class_names[i] for i in test.labels] == ["cup"]
    assert [every.class_names[i] for i in every.part("test").labels] == ["cup"]


def test_the_working_directory_has_the_name_of_its_folder(tmp_path, monkeypatch):
    source = write_clouds(tmp_path / "scans", "a.npy")
    prepare(source, tmp_path / "store", Preparation(points=16), workers=1)
    for name in ("scans", "store"):
        monkeypatch.chdir(tmp_path / name)
        assert load(["."], 16).name == name


def test_clouds_of_different_lengths_load_together(tmp_path):
    for name, count in (("a.npy", 20), ("b.npy", 40), ("c.npy", 16)):
        np.save(tmp_path / name, SHAPES[0, :count])
    assert load([str(tmp_path)], 16).points.shape == (3, 16, 3)


def test_the_fingerprint_of_a_folder_follows_its_contents(tmp_path):
    write_clouds(tmp_path, "a.npy", "b.npy")
    before = load([str(tmp_path)], 16).fingerprint
    np.save(tmp_path / "b.npy", SHAPES[5])
    assert load([str(tmp_path)], 16).fingerprint != before


@pytest.mark.parametrize("content", ["nothing", "other files"])
def test_a_folder_without_shapes_is_refused(tmp_path, content):
    if content == "other files":
        (tmp_path / "notes.txt").write_text("no shape")
    assert ".off" in read_error(tmp_path)


def test_one_bad_file_of_a_folder_is_named(tmp_path):
    write_clouds(tmp_path, "a.npy", "b.npy")
    (tmp_path / "b.npy").write_text("damaged")
    with pytest.raises(ReadError, match=r"b\.npy") as caught:
        load([str(tmp_path)], 16)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------- ShapeNet55


def test_shapenet55_lists_give_files_synsets_and_split(tmp_path):
    root = str(write_shapenet55(tmp_path / "ShapeNet55"))
    every, train, test = (load([root], 16, split, ["y"]) for split in ("all", "train", "test"))
    assert (len(every), len(train), len(test)) == (5, 3, 2)
    assert every.split.tolist() == [0, 0, 0, 1, 1]
    assert [every.class_names[i] for i in every.labels] == [
        "02691156",
        "03001627",
        "03001627",
        "02691156",
        "04379243",
    ]
    assert np.array_equal(every.points, np.concatenate([train.points, test.points]))


def test_shapenet55_reads_the_files_that_it_lists_and_no_other(tmp_path):
    root = write_shapenet55(tmp_path)
    (root / "shapenet_pc" / "09999999-unlisted.npy").write_text("damaged")
    assert len(load([str(root)], 16, "all")) == 5


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    root = write_shapenet55(tmp_path)
    (root / "shapenet_pc" / "03001627-cc.npy").unlink()
    with pytest.raises(ReadError, match=r"03001627-cc\.npy") as caught:
        load([str(root)], 16, "all")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- sources and limits


def test_several_sources_are_one_after_the_other_each_with_its_up_axis(tmp_path, bundle):
    folder = write_clouds(tmp_path / "folder", "a.npy", "b.npy")
    sources = [bundle(), str(folder)]
    both = load(sources, 16, "all", ["z", "y"])
    first, second = load(sources[:1], 16, "all", ["z"]), load(sources[1:], 16, "all", ["y"])
    assert np.array_equal(both.points, np.concatenate([first.points, second.points]))
    assert both.labels is None
    assert both.fingerprint not in (first.fingerprint, second.fingerprint)


def test_one_up_axis_serves_all_sources(bundle):
    source = bundle()
    both = load([source, source], 16, "all", ["y"]).points
    assert np.array_equal(both[:12], both[12:])
    assert np.array_equal(both[:12], load([source], 16, "all", ["y"]).points)


def test_up_axes_that_match_no_source_are_refused(bundle):
    with pytest.raises(ValueError, match="up_axis has 2 values for 3 sources"):
        load([bundle()] * 3, 16, "all", ["y", "z"])


def test_limit_is_a_source_and_keeps_the_first(bundle):
    source = bundle(split=(np.arange(12) < 4).astype(np.int8))
    assert np.array_equal(
        load([source], 16, "train", limit=3).points, load([source], 16, "train").points[:3]
    )
    assert len(load([source, source], 16, "all", limit=3)) == 6
    assert len(load([source], 16, "test", limit=50)) == 4


def test_limit_of_a_folder_reads_no_further(tmp_path):
    write_clouds(tmp_path, "a.npy", "b.npy", "c.npy")
    (tmp_path / "c.npy").write_text("damaged")
    assert len(load([str(tmp_path)], 16, limit=2)) == 2


@pytest.mark.parametrize("name", ["nothing", "nothing.npz"])
def test_what_is_no_source_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no shape")
    assert "synthetic" in read_error(tmp_path / name)


@pytest.mark.parametrize("source", ["synthetic:7", "synthetic:many", "synthetic:-8"])
def test_a_count_of_synthetic_shapes_that_cannot_be_is_refused(source):
    assert "COUNT" in read_error(source)


def test_synthetic_shapes_have_labels_a_split_and_are_z_up_whatever_is_said():
    found = load(["synthetic:24"], 16, "all", ["y"])
    assert found.split.tolist() == [0, 0, 0, 1] * 6
    assert found.labels.tolist() == [i % 21 for i in range(24)]
    assert np.array_equal(found.points, load(["synthetic:24"], 16, "all", ["z"]).points)
    assert np.array_equal(found.part("test").points, load(["synthetic:24"], 16, "test").points)


def test_a_subset_takes_every_array_alike():
    clouds = PointClouds("x", "f", SHAPES, np.arange(12), tuple("abcdefghijkl"), np.arange(12) % 2)
    part = clouds.subset(np.arange(12) % 2 == 1)
    assert np.array_equal(part.points, SHAPES[1::2])
    assert part.labels.tolist() == [1, 3, 5, 7, 9, 11]
    assert part.batch(np.array([2])).shape == (1, 40, 3)


def test_a_real_bundle_with_two_kinds_of_labels_loads():
    path = Path(os.environ.get("JEPA3D_DATA", ""), "psb", "psb_2048.npz")
    if "JEPA3D_DATA" not in os.environ or not path.is_file():
        pytest.skip("JEPA3D_DATA has no such file")
    found = load([str(path)], 64, "train", ["y"], "labels_coarse", limit=20)
    assert found.points.shape == (20, 64, 3)
    assert len(found.class_names) == 48
    assert np.allclose(np.linalg.norm(found.points, axis=2).max(1), 1, atol=1e-5)


def test_a_folder_that_is_split_in_part_is_refused(tmp_path):
    """Otherwise, a single misplaced file would make the test split training data."""
    for name in ("a/train/1.npy", "a/test/2.npy", "a/3.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name, np.random.default_rng(0).normal(size=(40, 3)))
    assert "3.npy: is in no split" in read_error(tmp_path)


def test_the_test_part_of_a_small_synthetic_set_is_no_train_part_of_a_larger():
    small, large = load(["synthetic:40"], 16, "test"), load(["synthetic:80"], 16, "train")
    assert not (small.points[:, None] == large.points[None]).all((2, 3)).any()


# -------------------------------------------------------------------------------------- part labels

# No x is near 0, so normalisation cannot change the sign of x.
SIDES = (5 + RNG.random((12, 40, 3))) * RNG.choice([-1, 1], (12, 40, 3))
# The part label of a point tells its shape and its side of the shape (the sign of x).
SIDE_PARTS = 2 * np.arange(12)[:, None] + (SIDES[..., 0] > 0)


def with_parts(root: Path, kind: str) -> str:
    """Write SIDES with SIDE_PARTS as a source of the given kind, the last four shapes in the test
    split. Returns its path.
    """
    split = (np.arange(12) >= 8).astype(np.int8)
    if kind == "files":
        for i, (cloud, parts) in enumerate(zip(SIDES, SIDE_PARTS, strict=True)):
            (root / "files" / ("test" if split[i] else "train")).mkdir(parents=True, exist_ok=True)
            rows = np.concatenate([cloud, parts[:, None]], 1)
            path = root / "files" / ("test" if split[i] else "train") / f"{i:02}.csv"
            np.savetxt(path, rows, delimiter=",", header="x,y,z,part", comments="")
        return str(root / "files")
    name = "parts" if kind == "bundle of parts" else "seg"
    np.savez(
        root / "sides.npz", points=SIDES, split=split, labels=np.arange(12), **{name: SIDE_PARTS}
    )
    if "store" not in kind:
        return str(root / "sides.npz")
    stores = {
        "store": Preparation(points=16),
        "longer store": Preparation(points=32),
        "whole store": Preparation(points=None),
        "random store": Preparation(points=32, reduce="random"),
    }
    return str(
        prepare(
            root / "sides.npz", root / "store", replace(stores[kind], keep=("parts",)), workers=1
        )[0]
    )


KINDS = [
    "bundle",
    "bundle of parts",
    "files",
    "store",
    "longer store",
    "whole store",
    "random store",
]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_stay_with_their_points(tmp_path, kind):
    source = with_parts(tmp_path, kind)
    plain, found = (load([source], 16, "all", parts=wanted) for wanted in (False, True))
    # In folders the test split comes before the train split, by alphabet.
    order = np.r_[8:12, 0:8] if kind == "files" else np.arange(12)
    assert (plain.parts, plain.part_names) == (None, ())
    assert np.array_equal(plain.points[:], found.points[:])
    assert found.parts.shape == (12, 16)
    assert found.parts[:].dtype == np.int16
    expected = 2 * order[:, None] + (found.points[:][..., 0] > 0)
    assert np.array_equal(found.parts[:], expected)
    assert np.array_equal(found.parts[np.array([7, 2])], expected[[7, 2]])
    assert np.array_equal(found.parts[5], expected[5])
    assert found.parts[np.zeros(12, bool)].shape == (0, 16)
    test = load([source], 16, "test", parts=True)
    for part in (test, found.part("test")):
        assert np.array_equal(
            part.parts[:], 2 * np.arange(8, 12)[:, None] + (part.points[:][..., 0] > 0)
        )
    assert np.array_equal(found.subset(np.arange(12) % 3 == 1).parts[:], expected[1::3])


def test_parts_of_a_store_stay_unread_until_indexed(tmp_path):
    found = load([with_parts(tmp_path, "store")], 16, "all", parts=True)
    found.points.store._open.clear()  # loading has opened the first shard, to see if it has parts
    found.part("test").subset(np.array([0]))
    assert not found.points.store._open


def test_parts_turn_with_the_shape_and_raw_parts_are_all_of_them(tmp_path):
    for kind in ("bundle", "files"):
        source = with_parts(tmp_path, kind)
        turned = load([source], 16, "all", ["y"], parts=True)
        # The rotation from y-up to z-up does not change x.
        assert np.array_equal(turned.parts % 2, turned.points[..., 0] > 0)
        raw = load([source], 16, "train", raw=True, parts=True)
        assert np.array_equal(np.stack(list(raw.parts)), SIDE_PARTS[:8])


def test_part_names_come_along_from_a_bundle(bundle):
    seg = np.arange(12 * 40).reshape(12, 40) % 3
    found = load(
        [bundle(seg=seg, part_names=np.array(["a/x", "a/y", "b/x"]))], 16, "all", parts=True
    )
    assert found.part_names == ("a/x", "a/y", "b/x")


def test_synthetic_shapes_have_the_parts_of_their_class():
    found = load(["synthetic:42"], 64, "all", parts=True)
    owners = np.array([name.partition("/")[0] for name in found.part_names])
    assert (owners[found.parts] == np.array(found.class_names)[found.labels][:, None]).all()
    raw = load(["synthetic:42"], 64, "all", raw=True, parts=True)
    assert np.array_equal(raw.parts, make_shapes(42, 128)["parts"])


def test_shapenetpart_gives_global_parts_and_their_names(tmp_path):
    layouts.shapenetpart_points(tmp_path)
    found = load([str(tmp_path)], 64, "train", parts=True)
    assert len(found.part_names) == 50
    assert found.part_names[3:6] == ("Airplane 3", "Bag 0", "Bag 1")
    assert [found.class_names[label] for label in found.labels] == ["Airplane", "Bag"]
    assert [set(parts.tolist()) for parts in found.parts] == [{0, 1, 2, 3}, {4, 5}]
    stored = prepare(tmp_path, tmp_path.with_name("store"), Preparation(points=64), workers=1)[0]
    again = load([str(stored)], 64, "train", parts=True)
    assert again.part_names == found.part_names
    assert np.array_equal(again.parts[:], found.parts)


@pytest.mark.parametrize("kind", ["bundle", "store", "clouds", "meshes"])
def test_a_source_without_parts_says_what_has_them(tmp_path, bundle, kind):
    source = bundle() if kind in ("bundle", "store") else str(tmp_path / "files")
    if kind == "store":
        source = str(
            prepare(Path(source), tmp_path / "store", Preparation(points=16), workers=1)[0]
        )
    write_clouds(tmp_path / "files", "a.npy")
    if kind == "meshes":
        (tmp_path / "files" / "a.npy").unlink()
        trimesh.creation.box().export(tmp_path / "files" / "box.off")
    with pytest.raises(ReadError, match=r"\A.*: has no part labels; .*--keep parts.*\Z"):
        load([source], 16, "all", parts=True)


@pytest.mark.parametrize(
    ("seg", "names", "said"),
    [
        (np.zeros((12, 39), int), None, "[12, 40]"),
        (np.zeros(12, int), None, "[12, 40]"),
        (np.zeros((12, 40)), None, "float64"),
        (np.full((12, 40), -1), None, "-1"),
        (np.full((12, 40), 40_000), None, "32767"),
        (np.full((12, 40), 2), np.array(["a/x", "a/y"]), "from 0 to 1"),
    ],
    ids=["too few points", "one a shape", "fractions", "negative", "too large", "more than names"],
)
def test_parts_that_cannot_be_are_refused_where_they_are_asked_for(bundle, seg, names, said):
    source = bundle(seg=seg, part_names=names)
    assert said in read_error(source, parts=True)
    assert load([source], 16, "all").parts is None


def test_parts_of_several_sources_are_refused(bundle):
    with pytest.raises(ValueError, match=r"\Apart labels .* one source only, not from 2\Z"):
        load([bundle(), bundle()], 16, "all", parts=True)
