"""Addresses of clouds: a text that leads back to one cloud, whatever the names of other files."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jepa3d.data.cloud import ReadError
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.inference.clouds import Address, cloud_paths, find_clouds, item_at

NAMES = [
    "a.npy",
    "a#1.npy",
    "#",
    "1",
    "#2",
    "a.npz",
    "a.npz#1",
    "a.npz#0.npy",
    "b c",
    "b c#3",
    "\udcff.npy",
    "ä#.npy",
    "a",
]


def cloud(number: int) -> np.ndarray:
    """Sample points whose mean tells the cloud's number."""
    return np.random.default_rng(number).normal([number, 0, 0], size=(70, 3))


def write(path: Path, rng: np.random.Generator, number: int) -> int:
    """Write a file of one or a few clouds, numbered from `number` on. Returns the next number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        count = int(rng.integers(1, 4))
        np.savez(path, points=np.stack([cloud(number + i) for i in range(count)]))
        return number + count
    if path.suffix == ".npy":
        np.save(path, cloud(number))
    else:
        np.savetxt(path, cloud(number))
    return number + 1


def tree(root: Path, seed: int) -> Path:
    """Write files whose names combine #, digits, suffixes and names of other files. Returns their
    folder.
    """
    rng, number = np.random.default_rng(seed), 0
    for _ in range(8):
        parts = [NAMES[i] for i in rng.integers(len(NAMES), size=rng.integers(1, 3))]
        suffix = str(rng.choice([".npy", ".npz", ".xyz", ".npz#0.xyz", "#1.npy", ".npz#1"]))
        path = root.joinpath(*parts[:-1], parts[-1] + suffix)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            number = write(path, rng, number)
    return root


def originals(items) -> list[bytes]:
    return [item.read().points.tobytes() for item in items]


@pytest.mark.parametrize("seed", range(40))
def test_every_cloud_has_a_text_of_its_own_that_leads_back_to_it(tmp_path, seed, monkeypatch):
    root = tree(tmp_path / "s#1", seed)
    items = find_clouds(root)[0]
    assert len({item.path for item in items}) == len(items) == len(set(originals(items)))
    monkeypatch.chdir(root)
    for item, expected in zip(items, originals(items), strict=True):
        for text in (
            item.path,
            os.path.relpath(item.path),
            f"{root}/../s#1/{os.path.relpath(item.path)}",
        ):
            found = item_at(text)
            assert found.path == item.path
            assert item_at(text).read().points.tobytes() == expected
            assert [one.path for one in find_clouds(Path(text))[0]] == [item.path] or Path(
                text
            ).exists()
        assert str(Address.parse(item.path)) == item.path
        assert pickle.loads(pickle.dumps(item)).read().points.tobytes() == expected
        assert pickle.loads(pickle.dumps(found)).read().points.tobytes() == expected


@pytest.mark.parametrize("seed", range(8))
def test_so_has_every_cloud_of_a_store(tmp_path, seed):
    root, store = tree(tmp_path / "scans", seed), tmp_path / "st#0"
    prepare(root, store, Preparation(points=64), workers=1)
    write(tmp_path / "st.npz", np.random.default_rng(seed), 0)
    items = find_clouds(store)[0]
    assert len({item.path for item in items}) == len(items)
    for item in items[::2]:  # now these texts are paths of folders
        Path(item.path).mkdir(parents=True, exist_ok=True)
    assert all("/#" in item.path for item in find_clouds(store)[0][::2])
    for item, expected in zip(find_clouds(store)[0], originals(items), strict=True):
        found = item_at(item.path)
        assert found.read().points.tobytes() == expected


def test_a_file_whose_name_has_a_sign_wins_over_the_row(tmp_path):
    np.savez(tmp_path / "a.npz", points=np.stack([cloud(0), cloud(1)]))
    assert cloud_paths(tmp_path) == [f"{tmp_path}/a.npz#0", f"{tmp_path}/a.npz#1"]
    np.savetxt(tmp_path / "a.npz#1.xyz", cloud(2))
    (tmp_path / "a.npz#1").mkdir()
    np.savetxt(tmp_path / "a.npz#0", cloud(3))
    assert cloud_paths(tmp_path) == [
        f"{tmp_path}/a.npz/#0",
        f"{tmp_path}/a.npz/#1",
        f"{tmp_path}/a.npz#1.xyz",
    ]
    assert Address.parse(tmp_path / "a.npz#0") == Address(f"{tmp_path}/a.npz#0")
    assert Address.parse(tmp_path / "a.npz/#0") == Address(f"{tmp_path}/a.npz", "0")


@pytest.mark.parametrize(
    "text",
    [
        "no.xyz",
        "a.npz#x",
        "a.npz#",
        "a.npz#01",
        "a.npz#-1",
        "#0",
        "a#0",
        "a.npz#²",
        "b.xyz#0",
        "",
        "\0",
    ],
)
def test_what_is_nowhere_is_said(tmp_path, text, monkeypatch):
    np.savez(tmp_path / "a.npz", points=cloud(0)[None])
    np.savetxt(tmp_path / "b.xyz", cloud(0))
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(ReadError, match="no longer there"):
        item_at(f"{tmp_path}/{text}" if text else f"{tmp_path}#")
    with pytest.raises(ReadError, match="no such file or folder"):
        find_clouds(tmp_path / (text or "none"))[0]


def test_a_row_beyond_the_last_is_said(tmp_path):
    np.savez(tmp_path / "a.npz", points=cloud(0)[None])
    with pytest.raises(ReadError, match=r"a\.npz"):
        item_at(f"{tmp_path}/a.npz#1").read()


def test_clouds_of_a_few_shot_fold_have_addresses(tmp_path):
    items = [(cloud(i).astype(np.float32), np.array([i]), np.array(0)) for i in range(4)]
    fold = {"train": items[:2], "test": items[2:]}
    (tmp_path / "0.pkl").write_bytes(pickle.dumps(fold))
    found = find_clouds(tmp_path / "0.pkl")[0]
    assert [Path(item.path).name for item in found] == [
        "0.pkl#train#0",
        "0.pkl#train#1",
        "0.pkl#test#0",
        "0.pkl#test#1",
    ]
    assert [item_at(item.path).read().points.tobytes() for item in found] == originals(found)


def test_a_row_that_is_named_by_itself_has_the_stamp_it_has_in_its_folder(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(3, 40, 3)))
    whole = {item.path: item.stamp for item in find_clouds(tmp_path)[0]}
    alone = find_clouds(Path(f"{tmp_path}/a.npy#1"))[0][0]
    assert alone.stamp == whole[alone.path] != 0
