"""Part labels: a cloud with wrong labels can still be read; labels are checked when used."""

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.data.cloud import UNLABELLED, ReadError, to_bytes, to_parts
from jepa3d.data.datasets import load
from jepa3d.data.entries import entries_of
from jepa3d.data.io import read
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.sources import discover
from jepa3d.data.store import Store
from jepa3d.evaluation.partseg import category_parts, mean_iou
from jepa3d.models.heads import Segmenter
from jepa3d.objectives.supervised import Supervised
from jepa3d.ops import BatchGenerator

POINTS = np.random.default_rng(0).normal(size=(80, 3)).round(4)
KINDS = [
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int32,
    np.uint32,
    np.int64,
    np.uint64,
    np.float32,
    np.float64,
]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_labels_of_any_type_are_read_and_its_largest_value_is_none(seed, kind):
    rng = np.random.default_rng(seed)
    labels, known = rng.integers(0, 100, 50), rng.random(50) < 0.7
    integer = np.issubdtype(kind, np.integer)
    ignored = [np.iinfo(kind).max if integer else np.nan] + (
        [] if integer and np.iinfo(kind).min == 0 else [-1, -100]
    )
    values = np.where(known, labels, 0).astype(kind)
    values[~known] = rng.choice(np.array(ignored, kind), (~known).sum())
    found = to_parts(values)
    assert found.dtype == np.int16
    assert np.array_equal(found, np.where(known, labels, UNLABELLED))


@pytest.mark.parametrize("bad", [0.5, 40_000, 1e9, np.inf])
def test_other_labels_are_named_where_they_are_used(bad):
    with pytest.raises(
        ReadError, match=r"\Apart labels must be whole numbers from 0 to 32767, found .*\Z"
    ):
        to_parts(np.array([0, 1, bad]))


def test_text_is_no_label():
    with pytest.raises(ReadError, match="whole numbers"):
        to_parts(np.array(["tree", "car"]))


def test_colours_that_are_no_numbers_are_black():
    colors = np.full((4, 3), 0.5)
    colors[0], colors[1, 0], colors[2, 1] = np.nan, np.inf, -np.inf
    assert to_bytes(colors).tolist() == [[0, 0, 0], [0, 128, 128], [128, 0, 128], [128, 128, 128]]
    assert np.array_equal(to_bytes(np.ones((2, 3), np.uint8)), np.ones((2, 3)))


def write(path, labels) -> None:
    """Write a cloud with one label text per point, in the format of the suffix."""
    header = {
        ".ply": "ply\nformat ascii 1.0\nelement vertex 80\nproperty float x\nproperty float y\nproperty float z\n"
        "property double label\nend_header",
        ".csv": "x y z label",
        ".pcd": "VERSION .7\nFIELDS x y z label\nSIZE 4 4 4 8\nTYPE F F F F\nCOUNT 1 1 1 1\nWIDTH 80\nHEIGHT 1\n"
        "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 80\nDATA ascii",
    }[path.suffix]
    rows = [f"{x} {y} {z} {label}" for (x, y, z), label in zip(POINTS, labels, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("suffix", [".ply", ".csv", ".pcd"])
@pytest.mark.parametrize("odd", ["-1", "nan", "4294967295", "65535", "40000", "0.25", "1e300"])
def test_no_label_costs_a_cloud_that_is_only_embedded(tmp_path, suffix, odd):
    write(tmp_path / f"a{suffix}", [odd if i % 3 == 0 else i % 4 for i in range(80)])
    assert np.allclose(read(tmp_path / f"a{suffix}").file_coordinates(), POINTS, atol=1e-6)


def test_a_store_keeps_what_is_unlabelled_and_leaves_out_what_is_wrong(tmp_path, capsys):
    root = tmp_path / "scans"
    root.mkdir()
    write(root / "good.ply", [-1 if i % 3 == 0 else i % 4 for i in range(80)])
    write(root / "large.ply", [40_000] * 80)
    write(root / "none.ply", [-1] * 80)
    plain = Store(prepare(root, tmp_path / "plain", Preparation(points=64), workers=1)[0])
    assert len(plain) == 3
    store = Store(
        prepare(root, tmp_path / "parts", Preparation(points=None, keep=("parts",)), workers=1)[0]
    )
    printed = capsys.readouterr().out
    assert "large.ply: part labels must be whole numbers from 0 to 32767, found 40000" in printed
    assert "none.ply: none of its points has a part label" in printed
    assert len(store) == 1
    assert np.array_equal(store.cloud(0).parts, [-1 if i % 3 == 0 else i % 4 for i in range(80)])
    assert UNLABELLED in load([str(store.path)], 64, "all", parts=True).parts[:]


def test_a_bundle_of_ignored_points_is_read_and_one_of_nothing_else_is_refused(tmp_path):
    points = np.random.default_rng(1).normal(size=(6, 80, 3)).astype(np.float32)
    seg = np.tile(np.arange(80) % 4, (6, 1))
    seg[:, :9] = -1
    np.savez(
        tmp_path / "a.npz", points=points, labels=np.arange(6) % 2, seg=seg, split=np.arange(6) % 2
    )
    assert (load([str(tmp_path / "a.npz")], 80, "all", parts=True).parts == -1).sum() == 6 * 9
    seg[2] = -1
    np.savez(tmp_path / "b.npz", points=points, labels=np.arange(6) % 2, seg=seg)
    with pytest.raises(ReadError, match=r"b\.npz: 1 shapes have no part label"):
        load([str(tmp_path / "b.npz")], 80, "all", parts=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_points_without_label_count_nowhere(seed):
    """The scores of a shape are those of its labelled points alone."""
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 3, (2, 1, 30))
    known = rng.random(30) < 0.6
    known[0] = True
    masked = np.where(known, truth, UNLABELLED)
    arguments = np.zeros(1, int), [np.arange(3)], ("cup",)
    found = mean_iou(predicted, masked, *arguments)
    assert found == mean_iou(predicted[:, known], truth[:, known], *arguments)
    observed = category_parts((), np.zeros(1, int), masked, ("cup",))
    assert observed[0].tolist() == np.unique(truth[:, known]).tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_points_without_label_teach_nothing(smoothing):
    torch.manual_seed(0)
    sizes = {
        "num_points": 64,
        "num_groups": 8,
        "group_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
    }
    network = Segmenter(sizes, ["cup"], ["a", "b", "c"], [[0, 1, 2]], [1], 0.0)
    objective = Supervised(network, smoothing).eval()
    points, labels = torch.randn(2, 64, 3), torch.zeros(2, dtype=torch.long)
    parts = torch.randint(0, 3, (2, 64))
    parts[:, ::2] = UNLABELLED
    output = objective(points, BatchGenerator(0), 0.0, labels, parts)
    known = parts != UNLABELLED
    wanted = torch.nn.functional.cross_entropy(
        output.logits[known], parts[known], label_smoothing=smoothing
    )
    assert torch.allclose(output.loss, wanted)
    right = (output.logits.argmax(-1) == parts)[known].float().mean().item()
    assert objective.metrics(output)["accuracy"] == pytest.approx(100 * right)


# -------------------------------------------------------------------------------- classes of arrays

CLOUDS = np.random.default_rng(2).normal(size=(6, 80, 3)).astype(np.float32)


def arrays(path, **values):
    """Write an NPZ or HDF5 file of 6 clouds of 80 points, with further arrays."""
    if path.suffix == ".npz":
        np.savez(path, points=CLOUDS, **values)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.update({"data": CLOUDS, **values})
    return path


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.float32])
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_label_a_cloud_is_its_class(tmp_path, suffix, kind, shape):
    labels = np.array([0, 1, 2, 0, 1, 2]).astype(kind)
    labels[3] = np.nan if kind == np.float32 else np.iinfo(kind).max
    path = arrays(tmp_path / f"a{suffix}", label=labels.reshape(shape))
    assert [entry.label for entry in entries_of(path, "a", None, None, None)] == [
        "0",
        "1",
        "2",
        None,
        "1",
        "2",
    ]


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("shape", [(6, 80), (6, 80, 1)])
def test_a_label_a_point_is_a_part(tmp_path, suffix, shape):
    labels = np.random.default_rng(0).integers(-1, 13, (6, 80))
    path = arrays(tmp_path / f"a{suffix}", label=labels.reshape(shape))
    entries = entries_of(path, "a", None, None, None)
    assert {entry.label for entry in entries} == {None}
    for entry, wanted in zip(entries, labels, strict=True):
        assert np.array_equal(to_parts(entry.read().parts), wanted)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("shape", [(6, 40), (6, 79), (5,), (6, 80, 13), (6, 2, 2), (1,)])
def test_labels_of_any_other_shape_are_refused_by_their_shape(tmp_path, suffix, shape):
    path = arrays(tmp_path / f"a{suffix}", label=np.zeros(shape, np.int64))
    with pytest.raises(
        ReadError, match=r"\A.*a\..*: label has shape \[.*\]; it must be \[6\] or \[6, 1\] .*\Z"
    ) as caught:
        entries_of(path, "a", None, None, None)
    assert str(list(shape)) in str(caught.value)


def test_names_may_be_labels_and_fractions_may_not(tmp_path):
    path = arrays(tmp_path / "a.npz", label=np.array(["cup", "axe"] * 3))
    assert [entry.label for entry in entries_of(path, "a", None, None, None)] == ["cup", "axe"] * 3
    with pytest.raises(ReadError, match="whole numbers or names, found float64"):
        entries_of(arrays(tmp_path / "b.npz", label=np.arange(6) / 2), "b", None, None, None)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_single_clouds_labels_are_parts(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, points=CLOUDS[0], label=np.arange(80) % 5)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.update({"data": CLOUDS[0], "label": np.arange(80)[:, None] % 5})
    assert np.array_equal(read(path).parts, np.arange(80) % 5)


@pytest.mark.parametrize("shape", [(6, 80), (6, 80, 1)])
def test_a_bundle_whose_labels_are_of_points_serves_pretraining_and_segmentation(tmp_path, shape):
    labels = np.random.default_rng(0).integers(-1, 13, (6, 80))
    path = arrays(tmp_path / "a.npz", labels=labels.reshape(shape))
    assert load([str(path)], 80, "all").labels is None
    assert np.array_equal(load([str(path)], 80, "all", raw=True, parts=True).parts[:], labels)


def test_a_bundles_labels_of_one_column_are_classes_and_of_any_other_shape_refused(tmp_path):
    path = arrays(tmp_path / "a.npz", labels=np.arange(6)[:, None])
    assert load([str(path)], 80, "all").labels.tolist() == list(range(6))
    with pytest.raises(ReadError, match=r"labels has shape \[6, 10\]"):
        load([str(arrays(tmp_path / "b.npz", labels=np.eye(6, 10)))], 80, "all")


def test_colours_are_fractions_only_where_they_are_no_whole_numbers():
    assert to_bytes(np.array([[1.02, 0.5, 0.2]])).tolist() == [[255, 128, 51]]
    assert to_bytes(np.array([[1, 0, 1]], np.uint16)).tolist() == [[1, 0, 1]]


def test_texts_of_hdf5_are_classes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = np.random.default_rng(0).normal(size=(4, 30, 3))
        file.create_dataset("label", data=["cup", "bowl"] * 2, dtype=h5py.string_dtype())
    assert [entry.label for entry in discover(tmp_path / "a.h5").entries] == ["cup", "bowl"] * 2
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["label"][1] = "b" * 100_000
    with pytest.raises(ReadError, match=r"a\.h5: label holds a text of over 1,000 characters"):
        discover(tmp_path / "a.h5")


def test_an_array_whose_points_come_last_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(3, 80)))
    with pytest.raises(ReadError, match="each row is a point"):
        read(tmp_path / "a.npy")
