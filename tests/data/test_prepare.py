"""Preparation of a store from any files: splits, bad files, interruptions, archives, and recovery
of the original coordinates.
"""

import gzip
import io
import json
import os
import shutil
import tarfile
import time
import zipfile
from errno import ENOSPC
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.data import parallel
from jepa3d.data import prepare as module
from jepa3d.data import store as storing
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.datasets import load
from jepa3d.data.entries import Entry
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import SPLITS, Store

SHAPES = np.random.default_rng(0).normal(size=(24, 40, 3)).astype(np.float32) * np.array(
    [1, 2, 3], np.float32
)


def folder(root: Path, *names: str, clouds=SHAPES) -> Path:
    for name, cloud in zip(names, clouds, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, cloud)
    return root


def stored(source: Path, out: Path, workers: int = 1, strict: bool = False, **options) -> Store:
    (path,) = prepare(source, out, Preparation(**{"points": 16} | options), workers, strict)
    return Store(path)


def keys(store: Store) -> list[str]:
    return [store.key(row) for row in range(len(store))]


def rows(store: Store) -> list[tuple[str, str | None, str | None]]:
    """Return key, class and split of every cloud."""
    names, splits = (*store.class_names, None), (*SPLITS, None)
    labels = zip(store.columns["label"], store.columns["split"], strict=True)
    return [
        (key, names[label], splits[split])
        for key, (label, split) in zip(keys(store), labels, strict=True)
    ]


def same(one: Store, two: Store) -> bool:
    """Return whether two stores have the same clouds in the same order; shards may differ."""
    return rows(one) == rows(two) and all(
        np.array_equal(one.points(i), two.points(i)) for i in range(len(one))
    )


def left_out(store: Store) -> dict[str, str]:
    return {
        row["file"]: row["reason"]
        for row in json.loads((store.path / "report.json").read_text())["skipped"]
    }


# ------------------------------------------------------------------------------- classes and splits


def test_folders_are_classes_and_splits(tmp_path):
    source = folder(
        tmp_path / "in",
        "axe/train/1.npy",
        "axe/test/2.npy",
        "cup/train/deep/3.npy",
        "cup/val/4.npy",
    )
    assert rows(stored(source, tmp_path / "out")) == [
        ("axe/test/2.npy", "axe", "test"),
        ("axe/train/1.npy", "axe", "train"),
        ("cup/train/deep/3.npy", "cup", "train"),
        ("cup/val/4.npy", "cup", "val"),
    ]


def test_a_folder_around_all_classes_is_no_class(tmp_path):
    source = folder(tmp_path / "in", "set/axe/1.npy", "set/cup/2.npy")
    (source / "set/._rubbish.npy").write_text("what macOS adds")
    assert rows(stored(source, tmp_path / "out")) == [
        ("set/axe/1.npy", "axe", None),
        ("set/cup/2.npy", "cup", None),
    ]


def test_a_fraction_is_stratified_and_always_the_same(tmp_path):
    source = folder(
        tmp_path / "in",
        *(f"{c}/{i:02d}.npy" for c, n in (("axe", 16), ("cup", 8)) for i in range(n)),
    )
    one, two, other = (
        stored(source, tmp_path / str(i), split="0.25", seed=seed)
        for i, seed in enumerate((0, 0, 1))
    )
    test = [label for _, label, split in rows(one) if split == "test"]
    assert (test.count("axe"), test.count("cup")) == (4, 2)
    assert rows(one) == rows(two)
    assert rows(one) != rows(other)


def test_a_list_names_the_test_clouds(tmp_path):
    source = folder(tmp_path / "in", "a.npy", "b.npy", "c.npy")
    # with the mark that Windows editors put first
    (tmp_path / "test.txt").write_text("\ufeffc.npy\na.npy\n", encoding="utf-8")
    store = stored(source, tmp_path / "out", split=str(tmp_path / "test.txt"))
    assert [split for _, _, split in rows(store)] == ["test", "train", "test"]


@pytest.mark.parametrize(
    ("split", "said"), [("list", "d.npy"), ("1.5", "between 0 and 1"), ("missing.txt", "missing")]
)
def test_a_split_that_cannot_be_is_refused(tmp_path, split, said):
    source = folder(tmp_path / "in", "a.npy")
    if split == "list":
        split = str(tmp_path / "test.txt")
        Path(split).write_text("a.npy\nd.npy\n")
    with pytest.raises(ValueError, match=said):
        stored(source, tmp_path / "out", split=split)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- bad files


def with_bad_files(root: Path) -> Path:
    folder(root, "a.npy", "b.npy", "c.npy", "d.npy", "e.npy", "h.npy")
    (root / "b.npy").write_text("damaged")
    np.save(root / "c.npy", np.full((40, 3), np.nan))
    np.save(root / "d.npy", SHAPES[0, :9])
    (root / "f.off").write_text("")
    (root / "g.jpg").write_text("picture")
    (root / "README.txt").write_text("about these files")
    return root


def test_bad_files_are_left_out_each_with_one_reason(tmp_path, capsys):
    store = stored(with_bad_files(tmp_path / "in"), tmp_path / "out")
    assert keys(store) == ["a.npy", "e.npy", "h.npy"]
    reasons = left_out(store)
    assert sorted(reasons) == ["README.txt", "b.npy", "c.npy", "d.npy", "f.off", "g.jpg"]
    assert "NaN" in reasons["c.npy"]
    assert "9 points, at least 16 are needed" in reasons["d.npy"]
    assert not any("\n" in reason or str(tmp_path) in reason for reason in reasons.values())
    assert "took 3 clouds (3 .npy); left out 6:" in capsys.readouterr().out


def test_strict_stops_at_the_first_and_keeps_what_was_done(tmp_path):
    source = folder(tmp_path / "in", "a.npy", "b.npy", "c.npy")
    (source / "b.npy").write_text("damaged")
    with pytest.raises(ReadError, match=r"b\.npy.*--strict"):
        stored(source, tmp_path / "out", strict=True)
    np.save(source / "b.npy", SHAPES[1])
    assert keys(stored(source, tmp_path / "out", strict=True)) == ["a.npy", "b.npy", "c.npy"]


def test_a_source_of_bad_files_only_is_refused_and_leaves_nothing(tmp_path):
    source = folder(tmp_path / "in", "a.npy", clouds=SHAPES[:, :9])
    with pytest.raises(ReadError, match=r"none of its clouds .*a\.npy: 9 points"):
        stored(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_files_only_are_refused_also_if_the_store_is_a_link(tmp_path):
    source = folder(tmp_path / "in", "a.npy", clouds=SHAPES[:, :1])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReadError, match="none of its clouds"):
        stored(source, tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("reduce", ["fps", "random", "voxel"])
def test_one_point_is_no_cloud(tmp_path, reduce):
    with pytest.raises(ReadError, match="one point only"):
        stored(folder(tmp_path / "in", "a.npy"), tmp_path / "out", points=1, reduce=reduce)


def test_an_unreadable_file_is_left_out(tmp_path, monkeypatch):
    source, load_array = folder(tmp_path / "in", "a.npy", "b.npy"), np.load

    def load_or_fail(path, *args, **options):
        if Path(path).name == "a.npy":
            raise PermissionError(13, "Permission denied", str(path))
        return load_array(path, *args, **options)

    monkeypatch.setattr(np, "load", load_or_fail)
    store = stored(source, tmp_path / "out")
    assert keys(store) == ["b.npy"]
    assert left_out(store) == {"a.npy": "cannot be read (Permission denied)"}


def test_an_unreadable_folder_is_told(tmp_path, monkeypatch):
    source, scan = folder(tmp_path / "in", "a/1.npy", "b/2.npy"), os.scandir

    def scan_or_fail(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_or_fail)
    assert left_out(stored(source, tmp_path / "out")) == {"a": "cannot be read (Permission denied)"}


def test_a_name_that_is_not_utf8_is_kept_and_can_be_told(tmp_path, capsys):
    source = folder(tmp_path / "in", os.fsdecode(b"\xff.npy"), os.fsdecode(b"\xfe.npy"))
    (source / os.fsdecode(b"\xfe.npy")).write_text("damaged")
    assert keys(stored(source, tmp_path / "out")) == [os.fsdecode(b"\xff.npy")]
    assert r"\udcfe.npy" in capsys.readouterr().out


def test_links_to_folders_are_followed_but_never_in_a_circle(tmp_path):
    source = folder(tmp_path / "in", "cup/1.npy")
    folder(tmp_path / "elsewhere", "2.npy")
    (source / "axe").symlink_to(tmp_path / "elsewhere")
    (source / "cup/loop").symlink_to(source)
    (source / "dangling.npy").symlink_to(tmp_path / "nothing")
    store = stored(source, tmp_path / "out")
    assert rows(store) == [("axe/2.npy", "axe", None), ("cup/1.npy", "cup", None)]
    assert list(left_out(store)) == ["dangling.npy"]


# ------------------------------------------------------------------------- processes, interruptions


def test_two_processes_give_what_one_gives(tmp_path):
    source = with_bad_files(tmp_path / "in")
    folder(source, *(f"more/{i}.npy" for i in range(20)))
    one, two = (stored(source, tmp_path / str(workers), workers) for workers in (1, 2))
    assert same(one, two)
    assert left_out(one) == left_out(two)
    assert one.fingerprint == two.fingerprint


def made(number: int) -> PointCloud:
    return PointCloud.make(SHAPES[number])


def test_a_parser_that_kills_its_process_is_left_out_and_the_others_stay_in_order():
    entries = [Entry(str(i), partial(made, i)) for i in range(8)]
    entries[2], entries[6] = Entry("2", partial(os._exit, 1)), Entry("6", partial(os._exit, 1))
    found = []
    for results in parallel.isolated(
        [[entry] for entry in entries],
        partial(module._convert_all, Preparation(points=16)),
        1,
        "jepa3d",
    ):
        found += results
        if len(found) == 1:
            time.sleep(0.5)  # lets the pool break while this loop uses its first results
    assert [i for i, result in enumerate(found) if isinstance(result, str)] == [2, 6]
    assert found[2] == "its parser crashed"
    for i in (0, 1, 3, 4, 5, 7):
        assert np.array_equal(
            found[i][0]["points"], module.convert(entries[i], Preparation(points=16))[0]["points"]
        )


@pytest.mark.parametrize("stop", [0, 1, 5, 8])
def test_an_interrupted_preparation_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, stop):
    source = folder(tmp_path / "in", *(f"{'ab'[i % 2]}/{i}.npy" for i in range(9)))
    whole, calls, convert = stored(source, tmp_path / "whole"), [], module.convert
    monkeypatch.setattr(storing, "SHARD_BYTES", 3 * 16 * 12)

    def stopping(entry, options):
        calls.append(entry)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return convert(entry, options)

    monkeypatch.setattr(module, "convert", stopping)
    monkeypatch.setattr(module, "_CHUNK", 1)
    with pytest.raises(KeyboardInterrupt, match=f"after {stop} new clouds"):
        stored(source, tmp_path / "out")
    if stop:
        with pytest.raises(ReadError, match="unfinished"):
            load([str(tmp_path / "out")], 16)
    store = stored(source, tmp_path / "out")
    store.verify()
    assert same(store, whole)
    assert len(calls) == 9 + 1


def test_running_again_adds_what_is_new(tmp_path, capsys):
    source = folder(tmp_path / "in", "b/1.npy", "b/2.npy")
    before = stored(source, tmp_path / "out").points(0).copy()
    folder(source, "a/3.npy", clouds=SHAPES[5:])
    store = stored(source, tmp_path / "out")
    assert "took 1 clouds (1 .npy), 2 were there already" in capsys.readouterr().out
    assert rows(store) == [("b/1.npy", "b", None), ("b/2.npy", "b", None), ("a/3.npy", "a", None)]
    assert np.array_equal(store.points(0), before)


@pytest.mark.parametrize(
    "options", [{"points": 17}, {"precision": "float16"}, {"seed": 1}, {"reduce": "random"}]
)
def test_a_store_is_not_continued_with_other_settings(tmp_path, options):
    source = folder(tmp_path / "in", "a.npy")
    stored(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"begun with {next(iter(options))} = "):
        stored(source, tmp_path / "out", **options)


def test_places_where_no_store_may_be_are_refused(tmp_path):
    source = folder(tmp_path / "in", "a.npy")
    other = folder(tmp_path / "other", "mine.npy")
    for out in (source, source / "out"):
        with pytest.raises(ValueError, match="lies in the source"):
            stored(source, out)
    with pytest.raises(ValueError, match="not a store"):
        stored(source, other)
    with pytest.raises(ValueError, match="not a store"):
        stored(source, other / "mine.npy")
    assert [path.name for path in (*source.iterdir(), *other.iterdir())] == ["a.npy", "mine.npy"]


@pytest.mark.parametrize("writes", [0, 1, 5, 10, 11, 12, 17, 23, 34])
def test_a_full_disk_is_one_line_keeps_what_was_committed_and_leaves_no_trace(
    tmp_path, monkeypatch, writes
):
    source, done = folder(tmp_path / "in", *(f"{i}.npy" for i in range(9))), []
    whole = stored(source, tmp_path / "whole")
    monkeypatch.setattr(storing, "SHARD_BYTES", 3 * 16 * 12)
    with monkeypatch.context() as patch:

        def sync(number):
            done.append(number)
            if len(done) > writes:
                raise OSError(ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", sync)
        with pytest.raises(OSError, match="No space left") as caught:
            stored(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("**/*.partial"))
    if (tmp_path / "out/store.json").exists():
        kept = Store(tmp_path / "out", unfinished=True)
        kept.verify()
        assert all(np.array_equal(kept.points(i), whole.points(i)) for i in range(len(kept)))
    store = stored(source, tmp_path / "out")
    store.verify()
    assert same(store, whole)


def unusual(path: Path) -> PointCloud:
    """Read a file, as a user's reader that does not check what it reads."""
    points = np.load(path).astype(np.float32)
    faces = np.array([[0, 1, 99]]) if path.stem == "faces" else None
    return PointCloud(points, np.zeros(3), faces=faces, colors=points[:, :3] ** 2 % 1)


def test_clouds_of_a_reader_that_cannot_be_used_are_left_out(tmp_path):
    clouds = [SHAPES[0], SHAPES[1][:0], SHAPES[2], np.where(SHAPES[3] > 1, np.nan, SHAPES[3])]
    source = folder(tmp_path / "in", "a.npy", "empty.npy", "faces.npy", "nan.npy", clouds=clouds)
    store = stored(source, tmp_path / "out", reader=f"{__name__}:unusual")
    assert keys(store) == ["a.npy"]
    assert left_out(store) == {
        "empty.npy": "no points",
        "faces.npy": f"a face names vertex 99; allowed are 0 to {len(SHAPES[2]) - 1}",
        "nan.npy": "12 points, at least 16 are needed",  # NaN points do not count
    }


def test_colours_of_a_reader_may_be_fractions(tmp_path):
    source = folder(tmp_path / "in", "a.npy")
    store = stored(source, tmp_path / "out", reader=f"{__name__}:unusual", keep=("colors",))
    cloud = store.cloud(0)
    assert cloud.colors.dtype == np.uint8
    assert np.abs(cloud.colors - cloud.file_coordinates() ** 2 % 1 * 255).max() < 1


def test_an_array_file_without_clouds_is_left_out_by_name(tmp_path):
    source = folder(tmp_path / "in", "a.npy", "b.npy", clouds=[SHAPES[0], SHAPES[:0]])
    assert left_out(stored(source, tmp_path / "out")) == {"b.npy": "holds no clouds"}


# ----------------------------------------------------------------------------------------- archives


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: dict[str, bytes]) -> Path:
    kinds = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".tar": "w"}
    with tarfile.open(path, kinds[path.suffix]) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_bytes(cloud: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, cloud)
    return file.getvalue()


@pytest.mark.parametrize(("pack", "name"), [(zipped, "set.zip"), (tarred, "set.tar.gz")])
def test_an_archive_is_its_folder(tmp_path, pack, name):
    members = {
        f"set/{label}/1.npy": as_bytes(cloud) for label, cloud in zip("ab", SHAPES, strict=False)
    }
    store = stored(pack(tmp_path / name, members), tmp_path / "out")
    plain = stored(folder(tmp_path / "in", "set/a/1.npy", "set/b/1.npy"), tmp_path / "plain")
    assert same(store, plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", "out", "plain", name])


@pytest.mark.parametrize("member", ["../evil.npy", "a/../../evil.npy", "/tmp/jepa3d-evil/evil.npy"])
@pytest.mark.parametrize(("pack", "name"), [(zipped, "set.zip"), (tarred, "set.tgz")])
def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path, pack, name, member):
    source = pack(tmp_path / name, {"a.npy": as_bytes(SHAPES[0]), member: as_bytes(SHAPES[1])})
    # tar itself drops a leading /, so that nothing is written elsewhere.
    if pack is tarred and member.startswith("/"):
        assert len(stored(source, tmp_path / "out")) == 2
    else:
        with pytest.raises(ReadError, match=name):
            stored(source, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not list(tmp_path.parent.glob("**/evil.npy"))
    assert not Path("/tmp/jepa3d-evil").exists()


COMPRESSED = ("set.zip", "set.tar.gz", "set.tar.xz")  # a .tar has no checksum of its content


@pytest.mark.parametrize(
    ("name", "cut"),
    [*((name, cut) for name in COMPRESSED for cut in (True, False)), ("set.tar", True)],
)
def test_a_damaged_archive_is_refused(tmp_path, name, cut):
    whole = (zipped if name.endswith("zip") else tarred)(
        tmp_path / name, {"a.npy": as_bytes(SHAPES)}
    ).read_bytes()
    half = len(whole) // 2
    end = b"" if cut else b"\xff" * 100 + whole[half + 100 :]
    (tmp_path / name).write_bytes(whole[:half] + end)
    with pytest.raises(ReadError, match=name) as caught:
        stored(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz"])
def test_a_damaged_header_in_the_middle_of_an_archive_is_noticed(tmp_path, name):
    members = {f"{i}.npy": as_bytes(SHAPES[i]) for i in range(3)}
    content = bytearray(tarred(tmp_path / "set.tar", members).read_bytes())
    content[content.index(b"1.npy")] ^= 0xFF
    packed = gzip.compress(content) if name.endswith("gz") else content
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(ReadError, match=rf"{name}: bad archive \(damaged header\)"):
        stored(tmp_path / name, tmp_path / "out")


# ------------------------------------------------------------------------------------- what is kept


def back(store: Store, row: int = 0) -> np.ndarray:
    return store.cloud(row).file_coordinates()


def among(points: np.ndarray, cloud: np.ndarray) -> float:
    """Return the largest distance from one of the points to its nearest point of the cloud."""
    return np.linalg.norm(points[:, None] - cloud, axis=2).min(1).max()


@pytest.mark.parametrize("reduce", ["fps", "random", "voxel"])
@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_reduced_points_are_distinct_points_of_the_file_with_its_up_axis_on_z(tmp_path, reduce, up):
    cloud = SHAPES[0] * (np.eye(3)["xyz".index(up)] * 9 + 1).astype(np.float32)
    store = stored(
        folder(tmp_path / "in", "a.npy", clouds=[cloud]),
        tmp_path / "out",
        reduce=reduce,
        up_axis=up,
    )
    assert len(np.unique(store.points(0), axis=0)) == 16
    assert among(back(store), cloud) < 1e-4
    assert store.points(0).std(0).argmax() == 2


def test_short_clouds_are_filled_up_by_copies_moved_along_the_surface(tmp_path, capsys):
    cloud, rng = np.random.default_rng(3).normal(size=(70, 3)), np.random.default_rng(4)
    source = folder(
        tmp_path / "in",
        "a.npy",
        "b.npy",
        clouds=[cloud, rng.permutation(np.tile(cloud, (2, 1)))[:130]],
    )
    store = stored(source, tmp_path / "out", points=200)
    assert "2 clouds of fewer than 200 points were filled up" in capsys.readouterr().out
    assert among(cloud, back(store)[:70]) < 1e-5
    assert among(back(store)[:70], cloud) < 1e-5
    assert len(np.unique(store.points(0), axis=0)) == 200
    moved = np.linalg.norm(back(store)[70:, None] - cloud, axis=2).min(1)
    assert 0 < moved.min() < moved.max() < 0.5 * store.columns["frame"][0, 3]


def test_short_clouds_are_left_out_where_asked_and_always_below_64_different_points(tmp_path):
    clouds = [np.random.default_rng(3).normal(size=(70, 3)), SHAPES[0], np.tile(SHAPES[1], (3, 1))]
    source = folder(tmp_path / "in", "a.npy", "b.npy", "c.npy", clouds=clouds)
    reasons = left_out(stored(source, tmp_path / "all", points=200))
    assert reasons == {
        "b.npy": "40 points, at least 64 are needed",
        "c.npy": "40 different points of 120, at least 64 are needed",
    }
    folder(source, "d.npy", clouds=[np.random.default_rng(5).normal(size=(200, 3))])
    assert keys(stored(source, tmp_path / "whole", points=200, short="skip")) == ["d.npy"]


def test_attributes_of_copies_are_those_of_their_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(70, 3))
    (tmp_path / "in").mkdir()
    lines = np.c_[points, np.arange(70)]
    np.savetxt(tmp_path / "in/a.csv", lines, delimiter=",", header="x,y,z,part", comments="")
    store = stored(tmp_path / "in", tmp_path / "out", points=100, keep=("parts",))
    assert np.allclose(back(store)[:70], points[store.array("parts", 0)[:70]], atol=1e-4)
    parts = store.array("parts", 0)
    assert set(parts[70:]) == set(parts[:30])  # copies keep the labels of their points


def test_all_points_are_kept_where_asked(tmp_path):
    clouds = [SHAPES[0], SHAPES[1, :7], SHAPES[2, :23]]
    store = stored(
        folder(tmp_path / "in", "a.npy", "b.npy", "c.npy", clouds=clouds),
        tmp_path / "out",
        points=None,
    )
    assert store.num_points is None
    for row, cloud in enumerate(clouds):
        assert np.allclose(back(store, row), cloud, atol=1e-5)


def test_attributes_are_kept_with_their_points(tmp_path):
    points, parts = SHAPES[0], np.arange(40)
    lines = np.concatenate([points, points, np.tile(parts[:, None], 4)], 1)
    (tmp_path / "in").mkdir()
    np.savetxt(
        tmp_path / "in/a.csv", lines, delimiter=",", header="x,y,z,nx,ny,nz,r,g,b,part", comments=""
    )
    store = stored(
        tmp_path / "in", tmp_path / "out", keep=("parts", "normals", "colors"), up_axis="y"
    )
    found = store.cloud(0)
    assert np.allclose(back(store), points[found.parts], atol=1e-4)
    x, y, z = points[found.parts].T
    assert np.allclose(found.normals, points[found.parts], atol=5e-3)
    assert np.allclose(store.array("normals", 0), np.stack([x, -z, y], 1), atol=5e-3)
    assert np.array_equal(found.colors, np.tile(found.parts[:, None], 3))
    with pytest.raises(ReadError, match="no colors to keep"):
        stored(folder(tmp_path / "bare", "a.npy"), tmp_path / "none", keep=("colors",))


def test_half_precision_is_off_by_no_more_than_is_said(tmp_path):
    source = folder(tmp_path / "in", *(f"{i}.npy" for i in range(24)))
    full, half = (
        stored(source, tmp_path / kind, precision=kind) for kind in ("float32", "float16")
    )
    error = np.array([np.abs(half.points(i) - full.points(i)).max() for i in range(24)])
    assert half.points(0).dtype == np.float16
    assert 0 < error.max() < 0.00025


@given(
    place=st.tuples(*[st.floats(-6e6, 6e6)] * 3), up=st.sampled_from("xyz"), seed=st.integers(0, 99)
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_map_coordinates_come_back_to_a_millimetre(tmp_path_factory, place, up, seed):
    tmp_path = tmp_path_factory.mktemp("map")
    cloud = np.random.default_rng(seed).uniform(-0.5, 0.5, (40, 3)) + place
    store = stored(folder(tmp_path / "in", "a.npy", clouds=[cloud]), tmp_path / "out", up_axis=up)
    assert among(back(store), cloud) < 1e-3
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("num_points", [64, 32])
def test_fewer_points_of_a_store_are_those_of_farthest_points_of_the_file(tmp_path, num_points):
    clouds = np.random.default_rng(1).normal(size=(3, 200, 3)).astype(np.float32)
    source = folder(tmp_path / "in", "a.npy", "b.npy", "c.npy", clouds=clouds)
    store = stored(source, tmp_path / "out", points=64)
    ours, theirs = load([str(store.path)], num_points), load([str(source)], num_points)
    assert np.allclose(ours.points[:], theirs.points, atol=1e-5)


def test_a_refused_continuation_leaves_the_report_as_it_was(tmp_path):
    source, out = folder(tmp_path / "source", "a.npy", "b.npy"), tmp_path / "store"
    stored(source, out, points=32)
    before = (out / "report.json").read_text()
    with pytest.raises(ValueError, match="points"):
        stored(source, out, points=24)
    assert (out / "report.json").read_text() == before


def test_stray_points_of_own_files_are_left_out_and_told_of(tmp_path, capsys):
    """Without this, most of the farthest points would be stray points."""
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(5000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    (tmp_path / "s").mkdir()
    np.savetxt(tmp_path / "s" / "scan.xyz", np.concatenate([ball, rng.uniform(-3, 3, (200, 3))]))
    prepare(tmp_path / "s", tmp_path / "clean", Preparation(points=256), workers=1)
    assert (
        "stray points in 1 clouds, the largest number in scan.xyz (--keep-strays keeps them)"
        in capsys.readouterr().out
    )
    prepare(tmp_path / "s", tmp_path / "all", Preparation(points=256, keep_strays=True), workers=1)
    off = [
        np.abs(
            np.linalg.norm(
                store.points(0) * store.columns["frame"][0][3] + store.columns["frame"][0][:3],
                axis=1,
            )
            - 1
        )
        for store in (Store(tmp_path / "clean"), Store(tmp_path / "all"))
    ]
    assert (off[0] > 0.1).sum() < 20
    assert (off[1] > 0.1).sum() > 100
