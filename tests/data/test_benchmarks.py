"""Every published benchmark in its distributed form can be prepared and used for training. Missing
or wrong files give one line.
"""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import layouts
import numpy as np
import pytest

from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import load
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.sources import discover
from jepa3d.data.store import SPLITS, Store
from jepa3d.training.pretrain import pretrain


@dataclass(frozen=True)
class Layout:
    """How to write an imitation of a benchmark, and what `prepare` should make of it."""

    write: Callable[[Path], None]
    folder: str
    clouds: list[tuple[str, str]]
    said: str
    variant: str | None = None
    up: str = "y"
    parts: list[set[int]] | None = None


CASES = {
    "ShapeNet55": Layout(
        layouts.shapenet55,
        "ShapeNet55-34",
        [("02691156", "train"), ("03001627", "train"), ("02691156", "test")],
        "ShapeNet55: 2 of 41,952 train, 1 of 10,518 test shapes",
    ),
    "ModelNet10 normals": Layout(
        layouts.modelnet_normals,
        "modelnet40_normal_resampled",
        [("bed", "train"), ("night_stand", "train"), ("bed", "test")],
        "2 of 3,991 train, 1 of 908 test",
        "modelnet10",
    ),
    "ModelNet40 normals": Layout(
        layouts.modelnet_normals,
        "modelnet40_normal_resampled",
        [
            ("airplane", "train"),
            ("bed", "train"),
            ("night_stand", "train"),
            ("bed", "test"),
            ("airplane", "test"),
        ],
        "3 of 9,843 train, 2 of 2,468 test",
        "modelnet40",
    ),
    "ModelNet40 HDF5": Layout(
        layouts.modelnet_hdf5,
        "modelnet40_ply_hdf5_2048",
        [("bed", "train"), ("airplane", "train"), ("bathtub", "test")],
        "2 of 9,840 train, 1 of 2,468 test",
    ),
    "ModelNet10 meshes": Layout(
        layouts.modelnet10_meshes,
        "ModelNet10",
        [(name, split) for name in layouts.MODELNET10 for split in ("test", "train")],
        "ModelNet10 meshes: 10 of 3,991 train, 10 of 908 test",
        up="z",
    ),
    "ScanObjectNN obj_bg": Layout(
        layouts.scanobjectnn,
        "h5_files",
        [("bag", "train"), ("toilet", "train"), ("chair", "test")],
        "ScanObjectNN obj_bg: 2 of 2,309 train, 1 of 581 test",
        "obj_bg",
        parts=[{0, 1}] * 3,
    ),
    "ScanObjectNN obj_only": Layout(
        layouts.scanobjectnn,
        "h5_files",
        [("bag", "train"), ("toilet", "train"), ("chair", "test")],
        "ScanObjectNN obj_only: 2 of 2,309 train",
        "obj_only",
        parts=[{0, 1}] * 3,
    ),
    "ScanObjectNN pb_t50_rs": Layout(
        layouts.scanobjectnn,
        "h5_files",
        [
            ("bag", "train"),
            ("toilet", "train"),
            ("door", "train"),
            ("chair", "test"),
            ("door", "test"),
        ],
        "ScanObjectNN pb_t50_rs: 3 of 11,416 train, 2 of 2,882 test",
        "pb_t50_rs",
        parts=[{0, 1}] * 5,
    ),
    "ShapeNetPart normals": Layout(
        layouts.shapenetpart_normals,
        f"{layouts.SEGMENTATION}_normal",
        [("Airplane", "train"), ("Airplane", "test"), ("Bag", "train"), ("Car", "val")],
        "2 of 12,137 train, 1 of 2,874 test, 1 of 1,870 val",
        parts=[{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5}, {8, 9, 10, 11}],
    ),
    "ShapeNetPart points": Layout(
        layouts.shapenetpart_points,
        layouts.SEGMENTATION,
        [("Airplane", "train"), ("Airplane", "test"), ("Bag", "train"), ("Car", "val")],
        "2 of 12,137 train, 1 of 2,874 test, 1 of 1,870 val",
        parts=[{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5}, {8, 9, 10, 11}],
    ),
}


def written(write: Callable[[Path], None], root: Path) -> Path:
    root.mkdir(parents=True)
    write(root)
    return root


def stored(source: Path, out: Path, **options) -> Store:
    (path,) = prepare(source, out, Preparation(**{"points": 64} | options), workers=1)
    return Store(path)


def clouds_of(store: Store) -> list[tuple[str, str]]:
    return [
        (store.class_names[label], SPLITS[split])
        for label, split in zip(store.columns["label"], store.columns["split"], strict=True)
    ]


def refusal(source: Path, variant: str | None = None) -> str:
    with pytest.raises(ReadError) as caught:
        discover(source, variant)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_becomes_a_store_that_trains(tmp_path, tiny, capsys, name):
    case = CASES[name]
    source = written(case.write, tmp_path / case.folder)
    store = stored(source, tmp_path / "store", variant=case.variant)
    store.verify()
    assert clouds_of(store) == case.clouds
    assert case.said in capsys.readouterr().out
    if case.parts:
        assert [set(store.cloud(row).parts.tolist()) for row in range(len(store))] == case.parts
    for row, entry in enumerate(discover(source, case.variant).entries):
        points = store.points(row)
        assert np.allclose(np.linalg.norm(points, axis=1).max(), 1, atol=1e-5)
        if case.up == "y":
            x, y, z = points.T
            *origin, scale = store.columns["frame"][row]
            back = np.stack([x, z, -y], 1) * scale + origin
            assert (
                np.abs(back[:, None] - entry.read().file_coordinates()).max(2).min(1).max() < 1e-4
            )
        assert points[:, 2].std() > max(points[:, 0].std(), points[:, 1].std())
    run = pretrain(tiny(data=[str(store.path)], max_steps=None, epochs=1), tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"]["shapes"] == [split for _, split in case.clouds].count("train")


def test_a_benchmark_that_is_read_directly_keeps_its_up_axis(tmp_path):
    layouts.scanobjectnn(tmp_path)  # y-up; its shapes are longest along y
    for file in tmp_path.glob("*/*_augmentedrot_scale75.h5"):
        file.unlink()
    shapes = load([str(tmp_path / "main_split")], 64, "all").points
    assert (np.ptp(shapes, axis=1).argmax(1) == 2).all()


@pytest.mark.parametrize("write", [layouts.fewshot, layouts.fewshot_of_protocol_5])
def test_few_shot_folds_become_a_store_each(tmp_path, tiny, write):
    source = written(write, tmp_path / "download")
    options = Preparation(points=64, keep=("normals",))
    stores = prepare(source, tmp_path / "folds", options, workers=1)
    inner = tmp_path / "folds/ModelNetFewshot/5way_10shot"
    assert stores == [inner / "0", inner / "1"]
    assert [clouds_of(Store(path)) for path in stores] == [
        [("3", "train"), ("17", "train"), ("3", "test")]
    ] * 2
    assert (Store(stores[0]).columns["up"] == 1).all()
    assert Store(stores[0]).cloud(0).normals.shape == (64, 3)
    run = pretrain(tiny(data=[str(inner / "1")], max_steps=None, epochs=1), tmp_path / "run")
    assert json.loads((run / "run.json").read_text())["data"]["shapes"] == 2


def test_a_folder_of_another_name_is_no_folder_of_folds(tmp_path):
    np.save(written(lambda root: None, tmp_path / "snapshot") / "a.npy", np.eye(64)[:, :3])
    (tmp_path / "snapshot/cameras.pkl").write_bytes(pickle.dumps({"count": 1}))
    (store,) = prepare(tmp_path / "snapshot", tmp_path / "store", Preparation(points=2), workers=1)
    assert len(Store(store)) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_is_found_in_the_folder_of_its_archive(tmp_path, name):
    case = CASES[name]
    written(case.write, tmp_path / "unpacked" / case.folder)
    found = discover(tmp_path / "unpacked", case.variant)
    assert found.layout == discover(tmp_path / "unpacked" / case.folder, case.variant).layout
    assert [(entry.label, entry.split) for entry in found.entries] == case.clouds
    assert {entry.up_axis for entry in found.entries} == {case.up}
    assert found.entries[0].key.startswith(case.folder)


@pytest.mark.parametrize(
    ("write", "variant", "choices"),
    [
        (layouts.modelnet_normals, None, "modelnet10, modelnet40"),
        (layouts.modelnet_normals, "obj_bg", "modelnet10, modelnet40"),
        (layouts.scanobjectnn, None, "obj_bg, pb_t50_rs, obj_only, pb_t50_rs_nobg"),
        (layouts.scanobjectnn, "obj_fg", "obj_bg, pb_t50_rs, obj_only, pb_t50_rs_nobg"),
    ],
)
def test_a_variant_that_is_not_there_names_those_that_are(tmp_path, write, variant, choices):
    message = refusal(written(write, tmp_path / "download"), variant)
    assert message.endswith(f"--variant: {choices}")
    assert variant is None or variant in message


def test_the_only_variant_there_needs_no_choice(tmp_path):
    source = written(layouts.scanobjectnn, tmp_path / "h5_files")
    for path in (*source.glob("main_split/*75.h5"), *source.glob("main_split_nobg/*")):
        path.unlink()
    assert discover(source).layout == "ScanObjectNN obj_bg"


def test_a_variant_is_known_by_the_name_of_the_working_directory(tmp_path, monkeypatch):
    source = written(layouts.scanobjectnn, tmp_path / "h5_files")
    monkeypatch.chdir(source / "main_split_nobg")
    assert discover(Path("."), "obj_only").layout == "ScanObjectNN obj_only"


@pytest.mark.parametrize(
    ("write", "variant", "gone", "owner"),
    [
        (layouts.shapenet55, None, "ShapeNet-55/test.txt", "Point-BERT"),
        (layouts.modelnet_normals, "modelnet40", "modelnet40_train.txt", "pointnet2"),
        (layouts.modelnet_hdf5, None, "train_files.txt", "pointnet2"),
        (layouts.modelnet_hdf5, None, "test_files.txt", "pointnet2"),
        (layouts.modelnet_hdf5, None, "ply_data_test0.h5", "pointnet2"),
        (layouts.scanobjectnn, "obj_bg", "main_split/test_objectdataset.h5", "hkust-vgd"),
        (layouts.shapenetpart_points, None, "synsetoffset2category.txt", "shapenet.org"),
    ],
)
def test_a_missing_list_is_named_with_where_its_owner_publishes_it(
    tmp_path, write, variant, gone, owner
):
    source = written(write, tmp_path / "download")
    (source / gone).unlink()
    message = refusal(source, variant)
    assert owner in message
    assert message.startswith(f"{source / gone}: ")


@pytest.mark.parametrize(
    ("write", "gone", "owner"),
    [
        (layouts.shapenet55, "shapenet_pc/03001627-bb.npy", "Point-BERT"),
        (layouts.modelnet_normals, "bed/bed_0001.txt", "pointnet2"),
        (layouts.shapenetpart_normals, "02773838/b1.txt", "shapenet.org"),
    ],
)
def test_a_listed_file_that_is_missing_is_left_out_or_stops(tmp_path, write, gone, owner):
    source = written(write, tmp_path / "download")
    whole = len(discover(source, "modelnet40").entries)
    (source / gone).unlink()
    options = Preparation(points=64, variant="modelnet40")
    (path,) = prepare(source, tmp_path / "store", options, workers=1)
    (left_out,) = json.loads((path / "report.json").read_text())["skipped"]
    assert Path(gone).stem in left_out["file"]
    assert owner in left_out["reason"]
    assert len(Store(path)) == whole - 1
    with pytest.raises(ReadError, match=owner):
        prepare(source, tmp_path / "strict", options, workers=1, strict=True)


def test_a_label_without_class_is_refused(tmp_path):
    normals, hdf5, scans, parts = (
        written(getattr(layouts, name), tmp_path / name)
        for name in ("modelnet_normals", "modelnet_hdf5", "scanobjectnn", "shapenetpart_points")
    )
    layouts.text(normals / "modelnet40_test.txt", "spoon_0001")
    layouts.text(hdf5 / "shape_names.txt", "airplane", "bathtub")
    with h5py.File(scans / "main_split/test_objectdataset.h5", "r+") as file:
        file["label"][0] = 15
    layouts.text(parts / "synsetoffset2category.txt", "Spoon\t02691156")
    for source, variant, label in (
        (normals, "modelnet40", "spoon"),
        (hdf5, None, "2"),
        (scans, "obj_bg", "15"),
        (parts, None, "Spoon"),
    ):
        message = refusal(source, variant)
        assert label in message
        assert "is not a class" in message


@pytest.mark.parametrize("number", [0, 5])
def test_a_part_number_of_another_category_is_left_out(tmp_path, number):
    source = written(layouts.shapenetpart_points, tmp_path / "download")
    side = source / "02958343/points_label/c1.seg"
    side.write_text(side.read_text().replace("1", str(number)))
    store = stored(source, tmp_path / "store")
    assert [label for label, _ in clouds_of(store)] == ["Airplane", "Airplane", "Bag"]
    assert (
        "category has 1-4"
        in json.loads((store.path / "report.json").read_text())["skipped"][0]["reason"]
    )


class Harmful:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_would_run_something_is_refused_and_not_run(tmp_path, protocol):
    path, made = tmp_path / "0.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps({"train": [Harmful(str(made))], "test": []}, protocol))
    assert "mkdir" in refusal(path)
    assert not made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1]),
        pickle.dumps({"train": 1, "test": []}),
        pickle.dumps({"train": [(1,)], "test": []}),
        pickle.dumps({"train": [], "test": []})[:-9],
    ],
)
def test_a_damaged_fold_is_refused(tmp_path, content):
    path = tmp_path / "0.pkl"
    path.write_bytes(content)
    assert "0.pkl" in refusal(path)


def test_shapes_in_no_list_are_told_and_never_train(tmp_path, capsys):
    source = written(layouts.shapenetpart_normals, tmp_path / "download")
    (source / "02773838/b2.txt").write_bytes((source / "02773838/b1.txt").read_bytes())
    store = stored(source, tmp_path / "store")
    assert "1 shapes are in none of its split lists" in capsys.readouterr().out
    assert [len(load([str(store.path)], 32, split)) for split in ("train", "test", "all")] == [
        2,
        1,
        5,
    ]
