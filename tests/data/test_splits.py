"""Classes and splits: what names of folders mean, in upper or lower case. No class is dropped
without a message.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.data.datasets import load
from jepa3d.data.entries import SPLIT_OF, Entry, classes_and_splits, divide, lacking
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import SPLITS, Store

CLASSES = ("ball", "rod", "disc", "Train", "test", "Validation", "testbed", "training camp")
CASES = (str.lower, str.upper, str.title)
RNG = np.random.default_rng(0)


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, RNG.normal(size=(40, 3)))
    return root


@given(st.data())
def test_any_names_of_splits_at_either_level_around_any_classes(data):
    """This holds even for classes named like a split, if there are two splits and another class."""
    draw = data.draw
    names = {part: [n for n, p in SPLIT_OF.items() if p == part] for part in SPLITS}
    parts = draw(st.sets(st.sampled_from(SPLITS), min_size=2))
    written = {
        part: draw(st.sampled_from(CASES))(draw(st.sampled_from(names[part])))
        for part in sorted(parts)
    }
    classes = sorted({"cone", "cup", *draw(st.sets(st.sampled_from(CLASSES), max_size=4))})
    outside, inside = (
        draw(st.sampled_from([(), ("set",), ("set", "v1")])),
        draw(st.sampled_from([(), ("raw",)])),
    )
    split_first = draw(st.booleans())
    expected = {}
    for part in parts:
        for name in classes:
            middle = (written[part], name) if split_first else (name, written[part])
            expected[(*outside, *middle, *inside)] = (name, part)
    assert classes_and_splits(list(expected), flat=False) == list(expected.values())


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ("ball rod test", "ball: rod: test:"),
        ("airplane bus TRAIN/2024", "airplane: bus: TRAIN:"),
        ("ball rod test/ball", "ball: rod: ball:test"),
        ("train/ball test/ball extra/ball", "ball:train ball:test extra:"),
        ("train test ball", ":train :test ball:"),
        ("Train", ":train"),
        ("ball/train ball/test rod", "ball:train ball:test rod:"),
        ("test/run1 ball/run1 rod/run2", "test: ball: rod:"),
    ],
)
def test_a_folder_named_like_a_split_among_others(folders, found):
    wanted = [tuple(part or None for part in text.split(":")) for text in found.split()]
    assert (
        classes_and_splits([tuple(name.split("/")) for name in folders.split()], flat=False)
        == wanted
    )


def test_a_class_named_test_is_kept_and_said(tmp_path, capsys):
    source = folder(tmp_path / "in", "ball/1.npy", "rod/1.npy", "test/1.npy")
    (path,) = prepare(source, tmp_path / "out", Preparation(points=16), 1)
    assert Store(path).class_names == ("ball", "rod", "test")
    assert "folder test: taken as a class" in capsys.readouterr().out
    assert load([str(source)], 16).class_names == ("ball", "rod", "test")


@given(
    sizes=st.dictionaries(st.sampled_from(("", *CLASSES)), st.integers(1, 12), min_size=1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_a_fraction_leaves_a_shape_of_each_class_in_each_part(sizes, share, seed):
    entries = [
        Entry(f"{name}/{i}", lambda: None, name or None)
        for name, count in sizes.items()
        for i in range(count)
    ]
    divided = divide(entries, str(share), seed)
    assert [entry.key for entry in divided] == [entry.key for entry in entries]
    for name, count in sizes.items():
        test = sum(entry.split == "test" for entry in divided if entry.label == (name or None))
        assert test == (0 if count == 1 else min(max(round(share * count), 1), count - 1))


def test_prepare_names_the_classes_that_a_part_lacks(tmp_path, capsys):
    source = folder(
        tmp_path / "in",
        "ball/1.npy",
        "ball/2.npy",
        "rod/1.npy",
        "cup/1.npy",
        "cup/2.npy",
        "cup/3.npy",
    )
    (source / "cup/3.npy").write_text("damaged")
    prepare(source, tmp_path / "out", Preparation(points=16, split="0.2"), 1)
    said = capsys.readouterr().out
    assert "left out by training and testing" in said
    assert "rod (1 train, 0 test)" in said
    assert "ball" not in said.split("left out by training and testing")[1]


def test_a_fraction_in_place_of_the_folders_split_is_said(tmp_path, capsys):
    source = folder(
        tmp_path / "in",
        *(f"{part}/{c}/{i}.npy" for part in ("Train", "Test") for c in "ab" for i in "12"),
    )
    (path,) = prepare(source, tmp_path / "out", Preparation(points=16, split="0.25"), 1)
    assert "replaces the splits of the source" in capsys.readouterr().out
    assert np.bincount(Store(path).columns["split"]).tolist() == [6, 2]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 2)), min_size=1, max_size=30))
def test_what_a_part_lacks_is_counted(rows):
    labels, split = np.array(rows).T
    found = lacking(labels, split == 0, split == 1, "abcd")
    for number in range(5):
        train, test = (rows.count((number, part)) for part in (0, 1))
        told = f"{'abcd4'[number]} ({train} train, {test} test)"
        assert (told in found) == (number in labels and not (train and test))


def test_the_third_part_means_validation_in_every_source(tmp_path):
    """In folders, a store, an NPZ and an HDF5 file, this split is used neither to train nor to
    test.
    """
    names = [
        f"{part}/{c}/{i}.npy" for part in ("train", "TEST", "Valid") for c in "ab" for i in range(2)
    ]
    source = folder(tmp_path / "in", *names)
    prepare(source, tmp_path / "store", Preparation(points=16), 1)
    split, labels = np.repeat([0, 1, 2], 4), np.tile([0, 0, 1, 1], 3)
    arrays = {"points": RNG.normal(size=(12, 40, 3)), "label": labels, "split": split}
    np.savez(tmp_path / "b.npz", **arrays | {"labels": labels})
    sources = [source, tmp_path / "store", tmp_path / "b.npz"]
    try:
        import h5py

        with h5py.File(tmp_path / "b.h5", "w") as file:
            for name, values in arrays.items():
                file[name] = values
        sources.append(tmp_path / "b.h5")
    except ImportError:
        pass
    for path in sources:
        every = load([str(path)], 16, "all")
        assert {part: len(every.part(part)) for part in SPLITS} == dict.fromkeys(SPLITS, 4), path
        assert [len(load([str(path)], 16, part)) for part in ("train", "test")] == [4, 4]


@pytest.mark.parametrize(
    "names", [("train_data", "test_data"), ("01_train", "02_test"), ("Training Set", "Test Set")]
)
def test_what_is_added_to_the_name_of_a_split_does_not_matter(names):
    folders = [(split, label) for split in names for label in ("ball", "dataset")]
    splits = [split for split in ("train", "test") for _ in range(2)]
    assert classes_and_splits(folders, False) == list(
        zip(["ball", "dataset"] * 2, splits, strict=True)
    )
