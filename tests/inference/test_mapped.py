"""The memory-mapped copy of a large index gives the same answers as the index, and is never
outdated.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from jepa3d.inference import search as mapped
from jepa3d.inference.neighbours import random_cosines
from jepa3d.inference.search import HALF_SLACK, _cosines, search
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.inference.vectors import Vectors, table, update, write
from jepa3d.locking import writing

SPEC = EmbeddingSpec("m", "0123", -1, "mean_max", "z", 12)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(900, 12)).astype(np.float32)
X[::7] = X[3]  # ties, ordered by path
X[5::50] = 0  # zero vectors are never found
QUERIES = np.concatenate([X[3:5], RNG.normal(size=(3, 12))])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let every index get a copy, and have several row groups."""
    monkeypatch.setattr(mapped, "WORTH", 1)
    monkeypatch.setattr("jepa3d.inference.vectors.ROWS", 100)
    mapped._open.cache_clear()


def rows(first: int, end: int, scale: float = 1.0):
    names = [f"/s/{i:04d}.ply" for i in range(first, end)]
    columns = {
        "path": names,
        "label": [f"c{i % 3}" for i in range(first, end)],
        "num_points": list(range(first, end)),
        "stamp": [0] * len(names),
    }
    return table(SPEC, zip(*columns.values(), X[first:end] * scale, strict=True))


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "v.parquet"
    write((rows(at, at + 100) for at in range(0, 900, 100)), path)
    return path


def without_copy(index, *arguments, **options):
    """Search the Parquet file itself. Returns its answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "WORTH", 10**9)
        return search(index, *arguments, **options)


@pytest.mark.parametrize(
    "queries", [QUERIES, QUERIES[:1], QUERIES[4:]], ids=["many", "one in the file", "one"]
)
@pytest.mark.parametrize("k", [1, 10, 890])
@pytest.mark.parametrize("where", [(), ("label=c1",), ("num_points>=850", "label!=c0")], ids=str)
def test_the_answers_are_those_of_the_parquet_file(index, queries, k, where):
    expected = without_copy(index, queries, k, where)
    assert not mapped.copy_of(index).exists()
    for _ in range(2):  # the first search makes the copy, the second uses it
        assert search(index, queries, k, where) == expected
        assert mapped.copy_of(index).exists()
    assert np.array_equal(random_cosines(index), random_cosines(index))
    assert {path.name for path in index.parent.iterdir()} == {"v.parquet", "v.parquet.arrow"}


def test_nothing_is_read_from_parquet_once_the_copy_is_there(index, monkeypatch):
    expected = search(index, QUERIES, 5)
    monkeypatch.setattr(Vectors, "groups", lambda self: 1 / 0)
    assert search(index, QUERIES, 5) == expected


def test_few_vectors_have_no_copy(index, monkeypatch):
    monkeypatch.setattr(mapped, "WORTH", 901)
    search(index, QUERIES, 5)
    assert not mapped.copy_of(index).exists()


def test_rows_added_dropped_and_replaced_are_seen_by_the_next_search(index):
    search(index, QUERIES, 5)
    assert search(index, X[4], 1)[0][0].path == "/s/0004.ply"
    update(index, rows(0, 0), {"/s/0004.ply"})
    assert search(index, X[4], 900) == without_copy(index, X[4], 900)
    assert "/s/0004.ply" not in [hit.path for hit in search(index, X[4], 900)[0]]
    update(index, rows(4, 5), set())
    assert search(index, X[4], 1)[0][0].path == "/s/0004.ply"
    update(index, rows(4, 5, scale=-1.0), set())  # a changed vector; the file keeps its size
    assert search(index, X[4], 1)[0][0].path != "/s/0004.ply"
    assert search(index, QUERIES, 9) == without_copy(index, QUERIES, 9)


def test_a_file_more_in_a_folder_is_seen(tmp_path):
    folder = tmp_path / "vectors"
    folder.mkdir()
    write([rows(0, 300)], folder / "0.parquet")
    assert search(folder, X[400], 1)[0][0].cosine < 1
    write([rows(300, 900)], folder / "1.parquet")
    assert search(folder, X[401], 1)[0][0].path == "/s/0401.ply"
    assert mapped.copy_of(folder) == tmp_path / "vectors.arrow"
    (folder / "1.parquet").unlink()
    assert search(folder, X[401], 300) == without_copy(folder, X[401], 300)


@pytest.mark.parametrize("damage", ["cut off", "empty", "of other vectors", "text"])
def test_a_copy_that_cannot_be_used_is_made_again(index, tmp_path, damage):
    expected = search(index, QUERIES, 5)
    copy = mapped.copy_of(index)
    whole = copy.read_bytes()
    mapped._open.cache_clear()
    if damage == "of other vectors":
        write([rows(0, 50)], tmp_path / "w.parquet")
        search(tmp_path / "w.parquet", QUERIES, 5)
        shutil.copy(mapped.copy_of(tmp_path / "w.parquet"), copy)
    else:
        copy.write_bytes({"cut off": whole[:-500], "empty": b"", "text": b"text" * 100}[damage])
    assert search(index, QUERIES, 5) == expected
    assert copy.stat().st_size == len(whole)


def test_where_no_copy_can_be_written_parquet_is_searched_and_that_is_said(
    index, monkeypatch, caplog
):
    expected = without_copy(index, QUERIES, 5)
    with writing(mapped.copy_of(index)):
        assert search(index, QUERIES, 5) == expected
    assert "searching without v.parquet.arrow: " in caplog.text

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped.os, "fsync", full)
    assert search(index, QUERIES, 5) == expected
    assert "No space left" in caplog.text
    assert {path.name for path in index.parent.iterdir()} == {"v.parquet"}


def test_vectors_that_change_while_they_are_copied_are_not_kept(index, monkeypatch):
    batches = Vectors.batches

    def changed(self, columns=None):
        yield from batches(self, columns)
        os.utime(index, ns=(1, 1))

    monkeypatch.setattr(Vectors, "batches", changed)
    assert search(index, QUERIES, 5) == without_copy(index, QUERIES, 5)
    assert not mapped.copy_of(index).exists()


@pytest.mark.slow
def test_processes_that_search_at_once_agree_and_leave_one_copy(index):
    program = (
        "import sys, numpy as np; from jepa3d.inference import search as mapped; search = mapped.search\n"
        "mapped.WORTH = 1; print([[h.path for h in hits] for hits in search(sys.argv[1], np.load(sys.argv[2]), 7)])"
    )
    np.save(index.with_name("q.npy"), QUERIES)
    command = [sys.executable, "-c", program, str(index), str(index.with_name("q.npy"))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said == {str([[hit.path for hit in hits] for hits in search(index, QUERIES, 7)])}
    assert {path.name for path in index.parent.iterdir()} == {
        "v.parquet",
        "v.parquet.arrow",
        "q.npy",
    }


@pytest.mark.parametrize("width", [3, 384, 4096])
def test_half_precision_errs_by_less_than_half_of_its_slack(width):
    """This holds if all products have the same sign, and if they cancel."""
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [np.ones((1, width)), rng.random((200, width)), rng.normal(size=(200, width))]
    )
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    lengths = pa.array(np.ones(len(x), np.float32))
    halves = pa.FixedSizeListArray.from_arrays(x.astype(np.float16).ravel(), width)
    for query in (x[0], x[5], x[300], -x[5]):
        scores, slack = _cosines(x, query[None].astype(np.float64), lengths, halves)
        assert slack == HALF_SLACK
        assert np.abs(scores[0] - x.astype(np.float64) @ query).max() < HALF_SLACK / 2


def test_neighbours_that_half_precision_cannot_tell_apart_are_found_in_their_order(tmp_path):
    """The cosines of 200 shuffled vectors with the query differ by 1e-5, so in half precision many
    are equal.
    """
    angles, order = (
        np.arccos(0.9 - 1e-5 * np.arange(200)),
        np.random.default_rng(2).permutation(200),
    )
    x = np.zeros((200, 12), np.float32)
    x[order, 0], x[order, 1] = 3 * np.cos(angles), 3 * np.sin(angles)
    names = [f"/s/{i:04d}.ply" for i in range(200)]
    columns = {"path": names, "label": [None] * 200, "num_points": [9] * 200, "stamp": [0] * 200}
    write([table(SPEC, zip(*columns.values(), x, strict=True))], tmp_path / "v.parquet")
    found = search(tmp_path / "v.parquet", np.eye(12)[0], 50)[0]
    assert [hit.path for hit in found] == [names[i] for i in order[:50]]
    assert len({np.float16(hit.cosine) for hit in found}) < 5
