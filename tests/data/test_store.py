"""A store on disk: clouds are read as they were written, nothing else is read, damage is detected,
and training gives the same result as from a bundle.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.data import store as storing
from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import load
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import COLUMNS, FORMAT, Store, StoredPoints, StoreWriter
from jepa3d.training import loop
from jepa3d.training.loop import Interrupted, batch_index, epoch_order
from jepa3d.training.pretrain import pretrain

RNG = np.random.default_rng(0)


def unit(cloud: np.ndarray) -> np.ndarray:
    cloud = cloud - cloud.mean(0)
    return (cloud / np.linalg.norm(cloud, axis=1).max()).astype(np.float32)


SHAPES = np.stack([unit(cloud) for cloud in RNG.normal(size=(20, 32, 3))])


def write(
    path: Path, clouds=SHAPES, points: int | None = 32, names: tuple[str, ...] = ("axe", "cup")
) -> Store:
    """Write a store of clouds c0, c1, ... of alternating classes; the last quarter is the test
    split.
    """
    with StoreWriter(path, {"points": points, "reduce": "fps"}, names, ()) as writer:
        for i, cloud in enumerate(clouds):
            split, label = "train" if i < 0.75 * len(clouds) else "test", names[i % 2]
            arrays = {"points": cloud, "parts": np.full(len(cloud), i, np.int16)}
            writer.add(
                f"c{i}", arrays, label=label, split=split, up="y", frame=(1, 2, 3, i + 1), content=i
            )
    return Store(path)


@pytest.fixture
def small_shards(monkeypatch):
    """Make shards so small that four clouds of 32 points fill one."""
    monkeypatch.setattr(storing, "SHARD_BYTES", 4 * 32 * (12 + 2))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 2000), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_clouds_of_any_length_come_back_from_shards_of_any_size(
    tmp_path_factory, lengths, shard_bytes, half
):
    clouds = [RNG.normal(size=(n, 3)).astype(np.float16 if half else np.float32) for n in lengths]
    before, storing.SHARD_BYTES = storing.SHARD_BYTES, shard_bytes
    try:
        store = write(tmp_path_factory.mktemp("store") / "out", clouds, None)
    finally:
        storing.SHARD_BYTES = before
    store.verify()
    assert len(store) == len(clouds)
    for i, cloud in enumerate(clouds):
        assert np.array_equal(store.points(i), cloud)
        assert store.points(i).dtype == cloud.dtype
        assert np.array_equal(store.points(i, 3), cloud[:3])
        assert store.key(i) == f"c{i}"
        assert store.class_names[store.columns["label"][i]] == ("axe", "cup")[i % 2]
        found = store.cloud(i)
        assert np.array_equal(found.parts, np.full(len(cloud), i))
        assert (found.origin.tolist(), found.scale) == ([1, 2, 3], i + 1)


def test_there_is_no_cloud_beyond_the_last(tmp_path):
    store = write(tmp_path / "store")
    for row in (20, -1):
        with pytest.raises(IndexError, match="of 20"):
            store.points(row)


def test_only_the_shards_that_are_needed_are_opened(tmp_path, small_shards):
    clouds = load([str(write(tmp_path / "store").path)], 32, "all")
    assert clouds.shard_sizes == (4, 4, 4, 4, 4)
    opened = clouds.points.store._open
    assert not opened
    assert np.array_equal(clouds.batch(np.array([9, 1, 8])).numpy(), SHAPES[[9, 1, 8]])
    assert sorted(opened) == [0, 2]


def test_no_more_than_64_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "SHARD_BYTES", 1)
    store = write(tmp_path / "store", np.tile(SHAPES, (4, 1, 1)))
    assert all(np.array_equal(store.points(i), SHAPES[i % 20]) for i in range(80))
    assert len(store._open) == 64


def test_parts_and_subsets_stay_unread_and_are_the_same_clouds(tmp_path, small_shards):
    clouds = load([str(write(tmp_path / "store").path)], 32, "all")
    test = clouds.part("test")
    odd = test.subset(np.arange(5) % 2 == 1)
    for part, rows in ((test, range(15, 20)), (odd, (16, 18))):
        assert isinstance(part.points, StoredPoints)
        assert part.points.shape == (len(rows), 32, 3)
        assert part.labels.tolist() == [row % 2 for row in rows]
        assert sum(part.shard_sizes) == len(rows)
        assert not part.points.store._open
    assert np.array_equal(odd.points[:], SHAPES[[16, 18]])
    assert np.array_equal(odd.points[-1], SHAPES[18])
    assert np.array_equal(load([str(tmp_path / "store")], 32, "test").points[:], SHAPES[15:])


def test_loading_a_store_is_loading_its_folder(tmp_path):
    for i, cloud in enumerate(RNG.normal(size=(6, 90, 3))):
        (tmp_path / "in" / "ab"[i % 2] / ("test" if i > 3 else "train")).mkdir(
            parents=True, exist_ok=True
        )
        np.save(tmp_path / "in" / "ab"[i % 2] / ("test" if i > 3 else "train") / f"{i}.npy", cloud)
    prepare(tmp_path / "in", tmp_path / "store", Preparation(points=32), workers=1)
    for split in ("train", "test", "all"):
        stored, plain = (load([str(tmp_path / name)], 32, split) for name in ("store", "in"))
        assert np.allclose(stored.points[:], plain.points, atol=1e-5)
        assert np.array_equal(stored.labels, plain.labels)
        assert np.array_equal(stored.split, plain.split)
        assert stored.class_names == plain.class_names


@pytest.mark.parametrize("reduce", ["random", None])
def test_points_in_no_farthest_order_are_sampled_when_loaded(tmp_path, reduce):
    options = Preparation(points=64, reduce=reduce) if reduce else Preparation(points=None)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", RNG.normal(size=(90 if reduce else 64, 3)))
    prepare(tmp_path / "in", tmp_path / "store", options, workers=1)
    found = load([str(tmp_path / "store")], 32).points
    np.save(tmp_path / "in/a.npy", Store(tmp_path / "store").points(0))
    assert np.allclose(found, load([str(tmp_path / "in")], 32).points, atol=1e-5)


def test_more_points_than_a_store_has_and_another_up_axis_are_refused(tmp_path):
    path = str(write(tmp_path / "store").path)
    with pytest.raises(ReadError, match="32 points, at least 33 are needed"):
        load([path], 33)
    with pytest.raises(ReadError, match="z-up already"):
        load([path], 32, up_axis=["y"])


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "name",
    [
        "points-00000.safetensors",
        "points-00004.safetensors",
        "index/keys.bin",
        *(f"index/{name}.bin" for name in COLUMNS),
    ],
)
@pytest.mark.parametrize("at", [0.0, 0.5, 0.999])
def test_verify_finds_one_flipped_bit(tmp_path, small_shards, name, at):
    write(tmp_path / "store").verify()
    path = tmp_path / "store" / name
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match=path.name if "points" in name else "index"):
        Store(tmp_path / "store").verify()


@pytest.mark.parametrize("name", COLUMNS)
def test_an_index_that_is_cut_off_is_refused(tmp_path, name):
    path = write(tmp_path / "store").path / f"index/{name}.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ReadError, match=f"{name}.bin: missing or cut off"):
        Store(tmp_path / "store")


def test_a_shard_that_is_missing_or_cut_off_is_named(tmp_path, small_shards):
    store = write(tmp_path / "store")
    (store.path / "points-00001.safetensors").unlink()
    os.truncate(store.path / "points-00003.safetensors", 40)
    for row, name in ((5, "points-00001"), (13, "points-00003")):
        with pytest.raises(ReadError, match=name):
            Store(store.path).points(row)
    with pytest.raises(ReadError, match=r"points-00001.*missing"):
        store.verify()


def test_a_shard_whose_header_claims_too_many_bytes_is_named(tmp_path):
    """A Git LFS pointer is such a file: its first eight bytes are the text "version "."""
    store = write(tmp_path / "store")
    shard = store.path / "points-00000.safetensors"
    for start in (b"version https://git-lfs.github.com/spec/v1", b"\xff" * 8):
        shard.write_bytes(start)
        with pytest.raises(ReadError, match=r"points-00000.*not a readable shard"):
            Store(store.path).points(0)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"name": "a game"}', '{"format": "jepa3d-store-2"}']
)
def test_a_store_of_another_kind_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "store.json").write_text(content)
    for use in (Store, lambda path: write(path), lambda path: load([str(path)], 32)):
        with pytest.raises(ReadError, match=tmp_path.name) as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "store.json").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


@pytest.mark.parametrize("stop", [0, 1, 2, 6, 11, 12, 13, 20])
def test_a_store_whose_writer_was_killed_is_refused_until_it_is_continued(
    tmp_path, monkeypatch, small_shards, stop
):
    """The writer is killed at a given write to the disk, before it can clean up."""
    (tmp_path / "in").mkdir()
    for i, cloud in enumerate(SHAPES):
        np.save(tmp_path / f"in/{i:02d}.npy", cloud)
    options, sync, done = Preparation(points=32), os.fsync, []

    def killed(number):
        done.append(number)
        if len(done) > stop:
            raise SystemExit
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        patch.setattr(StoreWriter, "__exit__", lambda *_: None)
        with pytest.raises(SystemExit):
            prepare(tmp_path / "in", tmp_path / "store", options, workers=1)
    if stop:
        with pytest.raises(ReadError, match="unfinished"):
            load([str(tmp_path / "store")], 32)
    prepare(tmp_path / "in", tmp_path / "store", options, workers=1)
    prepare(tmp_path / "in", tmp_path / "whole", options, workers=1)
    one, two = Store(tmp_path / "store"), Store(tmp_path / "whole")
    one.verify()
    assert [one.key(i) for i in range(20)] == [two.key(i) for i in range(20)]
    assert all(np.array_equal(one.points(i), two.points(i)) for i in range(20))


def test_a_store_that_stays_empty_is_deleted_also_if_its_first_writer_was_killed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.npy").write_text("damaged")
    options = Preparation(points=32)
    # as a killed writer leaves it
    StoreWriter(tmp_path / "store", json.loads(json.dumps(asdict(options))), (), ())
    with pytest.raises(ReadError, match="none of its clouds can be used"):
        prepare(tmp_path / "in", tmp_path / "store", options, workers=1)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("fails", [2, 3, 9, 11, 12])
def test_an_interrupted_commit_is_made_once(tmp_path, monkeypatch, fails):
    """Ctrl-C comes during a write to the disk. Leaving the writer must not commit a second time."""
    sync, done = os.fsync, []
    monkeypatch.setattr(storing, "SHARD_BYTES", 8 * 32 * 14)

    def interrupted(number):
        done.append(number)
        if len(done) == fails:
            raise KeyboardInterrupt
        sync(number)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "store", SHAPES[:8])
    store = Store(tmp_path / "store", unfinished=True)
    store.verify()
    assert len(store) == 8
    assert (store.path / "index/end.bin").stat().st_size == 8 * 8
    assert [store.key(i) for i in range(8)] == [f"c{i}" for i in range(8)]


# ---------------------------------------------------------------------------------- order, training


@given(st.lists(st.integers(1, 9), max_size=90), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_an_epoch_has_every_cloud_once_and_few_shards_at_a_time(sizes, seed, epoch):
    total = sum(sizes) or 7
    order = epoch_order(seed, epoch, total, tuple(sizes))
    assert sorted(order) == list(range(total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes) if sizes else np.zeros(total, int)
    at, windows = 0, 0
    while at < total:  # the longest run of clouds from at most WINDOW shards
        seen = set()
        while at < total and len(seen | {shard_of[order[at]]}) <= loop.WINDOW:
            seen.add(shard_of[order[at]])
            at += 1
        windows += 1
    assert windows <= -(-max(len(sizes), 1) // loop.WINDOW)


def test_epochs_differ_and_batches_are_the_stream_of_epochs():
    sizes = (5,) * 40
    epochs = [epoch_order(0, epoch, 200, sizes) for epoch in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(200))
    batches = [batch_index(0, step, 48, 200, sizes) for step in range(12)]
    assert np.array_equal(np.concatenate(batches), np.concatenate(epochs)[: 12 * 48])


def test_the_order_is_the_same_in_any_process():
    code = "import sys; from jepa3d.training.loop import epoch_order as f; print(f(3, 2, 120, (3,) * 40).tolist())"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(said) == epoch_order(3, 2, 120, (3,) * 40).tolist()


def test_stored_points_travel_to_another_process(tmp_path):
    points = load([str(write(tmp_path / "store").path)], 32, "all").points
    assert np.array_equal(pickle.loads(pickle.dumps(points))[:], SHAPES)


@pytest.fixture
def long_store(tmp_path, monkeypatch) -> str:
    """Write a store with more shards than a window has. Returns its path."""
    monkeypatch.setattr(storing, "SHARD_BYTES", 64 * 14)
    clouds = [unit(cloud) for cloud in RNG.normal(size=(48, 64, 3))]
    return str(write(tmp_path / "store", clouds, 64).path)


def test_training_in_place_resumes_as_if_never_stopped(tmp_path, tiny, long_store):
    config = tiny(data=[long_store], split="all")
    assert len(load([long_store], 64, "all").shard_sizes) == 48 > loop.WINDOW
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "parted", stop_at=3)
    parted = pretrain(config, tmp_path / "parted", resume=True)
    weights = [(run / "encoder/model.safetensors").read_bytes() for run in (whole, parted)]
    assert weights[0] == weights[1]


def test_a_million_clouds_open_without_being_read(tmp_path):
    count, points = 1_000_000, 2048
    (tmp_path / "index").mkdir()
    for name, (kind, tail) in COLUMNS.items():
        os.truncate(
            _touched(tmp_path / f"index/{name}.bin"),
            count * np.dtype(kind).itemsize * int(np.prod(tail)),
        )
    columns: dict[str, Callable] = {
        name: np.memmap(tmp_path / f"index/{name}.bin", COLUMNS[name][0])
        for name in ("end", "label", "key_end")
    }
    columns["end"][:] = np.arange(1, count + 1) * points
    columns["label"][777_777] = 1
    columns["key_end"][777_777:] = 9
    _touched(tmp_path / "index/keys.bin").write_bytes(b"the/one.x")
    shards = [
        {"file": f"points-{i:05d}.safetensors", "clouds": 1000, "points": 1000 * points}
        for i in range(1000)
    ]
    header = {"format": FORMAT, "complete": True, "settings": {"reduce": "fps"}, "shards": shards}
    header |= {"num_points": points, "class_names": ["axe", "cup"], "part_names": []}
    (tmp_path / "store.json").write_text(json.dumps(header))
    store, clouds = Store(tmp_path), load([str(tmp_path)], 1024)
    assert (len(store), len(clouds), clouds.points.shape) == (count, count, (count, 1024, 3))
    assert (store.key(777_777), store.key(777_778), clouds.labels.sum()) == ("the/one.x", "", 1)
    assert store._span(777_777) == (777, slice(777 * points, 778 * points))
    assert clouds.shard_sizes == (1000,) * 1000
    assert not clouds.points.store._open


def _touched(path: Path) -> Path:
    path.touch()
    return path
