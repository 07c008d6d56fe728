"""Files of an older version are read, or refused with a line that says what to do."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from jepa3d.cli import main
from jepa3d.data.store import Store
from jepa3d.inference.clouds import cloud_paths, item_at
from jepa3d.inference.search import search
from jepa3d.inference.vectors import Vectors, to_numpy

# Files of three clouds, written by version 0.1.0 before frames had version numbers.
OLD = Path(__file__).parent.parent / "old"


@pytest.fixture
def old(tmp_path) -> Path:
    return shutil.copytree(OLD, tmp_path / "old")


@pytest.mark.parametrize("name", ["vectors.parquet", "bricked.parquet", "vectors.lancedb"])
def test_old_vectors_are_searched_by_vectors(old, name):
    made = np.concatenate(
        [
            to_numpy(batch.column(0))
            for batch in Vectors(old / "vectors.parquet").batches(["vector"])
        ]
    )
    hits = search(old / name, made, 3)
    assert [Path(found[0].path).name for found in hits] == ["ball.npy", "disc.npy", "rod.npy"]
    assert all(found[0].cosine == 1 for found in hits)


def test_an_old_store_is_read(old):
    store = Store(old / "store")
    store.verify()
    assert [store.key(row) for row in range(3)] == ["ball.npy", "disc.npy", "rod.npy"]
    assert [item_at(path).read().points.shape for path in cloud_paths(old / "store")] == [
        (64, 3)
    ] * 3


@pytest.mark.parametrize("name", ["vectors.parquet", "bricked.parquet", "vectors.lancedb"])
def test_old_vectors_are_refused_where_new_ones_would_be_compared_with_them(old, name, capsys):
    cloud, new = old / "cloud.npy", old / "new.parquet"
    np.save(cloud, np.random.default_rng(0).normal(size=(80, 3)))
    run("embed", cloud, "--out", new)
    for arguments in (
        ("search", old / name, cloud),
        ("view", cloud, "--index", old / name),
        ("index", new, "--out", old / name)
        if name.endswith("lancedb")
        else ("embed", cloud, "--out", old / name),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr().err
        assert (
            f"{old / name}: its vectors were made by another version of jepa3d (frame 1, here"
            in said
        )
        assert "embed the clouds again" in said
        assert said.count("\n") == 1


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)
