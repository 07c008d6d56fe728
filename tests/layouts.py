"""Tiny imitations of the published benchmarks, in the form in which they are distributed, but with
fewer shapes.
"""

import json
import pickle
from pathlib import Path

import h5py
import numpy as np

MODELNET10 = (
    "bathtub",
    "bed",
    "chair",
    "desk",
    "dresser",
    "monitor",
    "night_stand",
    "sofa",
    "table",
    "toilet",
)
SYNSETS = {"Airplane": "02691156", "Bag": "02773838", "Car": "02958343"}
SEGMENTATION = "shapenetcore_partanno_segmentation_benchmark_v0"


def shape(number: int, count: int) -> np.ndarray:
    """Sample a cloud that is longest along y and not centred."""
    return (np.random.default_rng(number).normal(size=(count, 3)) * (1, 4, 2) + (5, 6, 7)).astype(
        np.float32
    )


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def table(path: Path, rows: np.ndarray, delimiter: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, "%.6f", delimiter)


def shapenet55(root: Path) -> None:
    names = ["02691156-1a04e3eab45ca15dd86060f189eb133.npy", "03001627-bb.npy", "02691156-cc-1.npy"]
    text(root / "ShapeNet-55/train.txt", *names[:2])
    text(root / "ShapeNet-55/test.txt", names[2])
    (root / "shapenet_pc").mkdir()
    for i, name in enumerate(names):
        np.save(root / "shapenet_pc" / name, shape(i, 8192))


def modelnet_normals(root: Path) -> None:
    """Write the lists of ModelNet10 and ModelNet40, and their shapes; ModelNet40 contains
    ModelNet10.
    """
    train, test = ["airplane_0001", "bed_0001", "night_stand_0001"], ["bed_0516", "airplane_0627"]
    for number, classes in ((10, ["bed", "night_stand"]), (40, ["airplane", "bed", "night_stand"])):
        text(root / f"modelnet{number}_shape_names.txt", *classes)
        for split, shapes in (("train", train), ("test", test)):
            listed = [name for name in shapes if name.rpartition("_")[0] in classes]
            text(root / f"modelnet{number}_{split}.txt", *listed)
    for i, name in enumerate(train + test):
        rows = np.concatenate([shape(i, 10_000), np.tile([0, 1, 0], (10_000, 1))], 1)
        table(root / name.rpartition("_")[0] / f"{name}.txt", rows, ",")


def modelnet_hdf5(root: Path) -> None:
    text(root / "shape_names.txt", "airplane", "bathtub", "bed")
    for split, labels in (("train", [2, 0]), ("test", [1])):
        text(root / f"{split}_files.txt", f"data/modelnet40_ply_hdf5_2048/ply_data_{split}0.h5")
        with h5py.File(root / f"ply_data_{split}0.h5", "w") as file:
            file["data"] = np.stack([shape(label, 2048) for label in labels])
            file["label"] = np.array(labels, np.uint8)[:, None]
            file["normal"] = np.zeros((len(labels), 2048, 3), np.float32)
            file["faceId"] = np.zeros((len(labels), 2048), np.int32)


def modelnet10_meshes(root: Path) -> None:
    """Write tetrahedra. One file has its header on one line, as some published files do."""
    for name in MODELNET10:
        for split, number in (("train", 1), ("test", 900)):
            path = root / name / split / f"{name}_{number:04d}.off"
            header = "OFF4 4 0" if path.name == "bed_0001.off" else "OFF\n4 4 0"
            text(
                path,
                header,
                "0 0 0",
                "30 0 0",
                "0 60 0",
                "0 0 120",
                "3 0 2 1",
                "3 0 1 3",
                "3 0 3 2",
                "3 1 2 3",
            )
    text(root / "README.txt", "Princeton ModelNet")


def fewshot(root: Path, protocol: int = 2) -> None:
    items = [
        (np.tile(shape(i, 8192), 2), label, i)
        for i, label in enumerate((3, np.int64(17), np.array([3])))
    ]
    for fold in range(2):
        path = root / "ModelNetFewshot/5way_10shot" / f"{fold}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({"train": items[:2], "test": items[2:]}, protocol))


def fewshot_of_protocol_5(root: Path) -> None:
    fewshot(root, 5)


def scanobjectnn(root: Path) -> None:
    """Write main_split and main_split_nobg; the hard variant has one more shape."""
    for folder in ("main_split", "main_split_nobg"):
        for part, labels in (("training", [0, 14]), ("test", [4])):
            for tail, extra in (("", []), ("_augmentedrot_scale75", [7])):
                path = root / folder / f"{part}_objectdataset{tail}.h5"
                path.parent.mkdir(parents=True, exist_ok=True)
                with h5py.File(path, "w") as file:
                    file["data"] = np.stack([shape(label, 2048) for label in labels + extra])
                    file["label"] = np.array(labels + extra)
                    file["mask"] = np.tile(
                        np.where(np.arange(2048) < 1024, -1, 3), (len(labels + extra), 1)
                    )


def _shapenetpart(root: Path) -> list[tuple[str, int]]:
    """Write the lists of categories and splits. Returns SYNSET/ID and the first global part label
    of each shape.
    """
    text(
        root / "synsetoffset2category.txt",
        *(f"{name}\t{synset}" for name, synset in SYNSETS.items()),
    )
    shapes = [("02691156/a1", 0), ("02773838/b1", 4), ("02958343/c1", 6 + 2), ("02691156/a2", 0)]
    for split, part in (("train", shapes[:2]), ("val", shapes[2:3]), ("test", shapes[3:])):
        path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        text(path, json.dumps([f"shape_data/{key}" for key, _ in part]))
    return shapes


def parts_of(first: int, count: int) -> np.ndarray:
    return np.arange(count) % (2 if first == 4 else 4)


def shapenetpart_normals(root: Path) -> None:
    for i, (key, first) in enumerate(_shapenetpart(root)):
        count = 2500 + i
        rows = [
            shape(i, count),
            np.tile([0, 1, 0], (count, 1)),
            first + parts_of(first, count)[:, None],
        ]
        table(root / f"{key}.txt", np.concatenate(rows, 1), " ")


def shapenetpart_points(root: Path) -> None:
    for i, (key, first) in enumerate(_shapenetpart(root)):
        synset, name = key.split("/")
        table(root / synset / "points" / f"{name}.pts", shape(i, 2500 + i), " ")
        text(
            root / synset / "points_label" / f"{name}.seg", *map(str, 1 + parts_of(first, 2500 + i))
        )
