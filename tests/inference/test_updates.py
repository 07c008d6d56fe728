"""Whatever happens to a folder and to the commands that embed it, the last vectors are those of a
new `embed`.
"""

import itertools
import os
import pathlib
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from processes import Command

from jepa3d import locking
from jepa3d.cli import main
from jepa3d.data.cloud import ReadError
from jepa3d.inference import embed_files as updating
from jepa3d.inference import embedding, vectors
from jepa3d.inference.embed_files import embed_files
from jepa3d.inference.lance import VectorStore
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.locking import writing
from jepa3d.models.encoder import PointEncoder

SUFFIXES = (".npy", ".npz", ".xyz", "#1.npy", ".npz#0.npy")
ACTIONS = (
    "add",
    "add",
    "edit",
    "touch",
    "remove",
    "rename",
    "damage",
    "embed",
    "prune",
    "kill",
    "part",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    PointEncoder(16, 1, 2, 8, 8, 64, tokenizer_dim=8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(vectors, "ROWS", 3)
    monkeypatch.setattr(embedding, "BATCH", 4)


def rows(out: Path) -> dict[str, np.ndarray]:
    found = Vectors(out, may_be_empty=True)
    paths = found.column("path")
    assert len(paths) == len(set(paths)) == len(found)
    made = [vector for batch in found.batches(["vector"]) for vector in to_numpy(batch.column(0))]
    return dict(zip(paths, made, strict=True))


def write(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    points = rng.normal(size=(int(rng.integers(1, 4)), 70, 3))
    with path.open("wb") as file:  # for a path, numpy would add a suffix
        if path.suffix == ".npz":
            np.savez(file, points=points)
        elif path.suffix == ".npy":
            np.save(file, points[0])
        else:
            np.savetxt(file, points[0])


def embed_and_be_killed(at: int, *arguments, **settings) -> None:
    """Embed in a process that commits every cloud and is killed at call number `at` of the code
    that reads, locks and writes.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    updating.COMMIT_SECONDS = -1.0
    watched, calls = (
        {module.__file__ for module in (embedding, updating, vectors, locking, pathlib)},
        itertools.count(),
    )

    def count(frame, event, _):
        if frame.f_code.co_filename in watched and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        embed_files(*arguments, **settings)
    finally:
        os._exit(0)


def act(action: str, root: Path, out: Path, model: str, rng: np.random.Generator) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    new = root / str(rng.choice(["a", "b", "#"])) / f"{rng.integers(8)}{rng.choice(SUFFIXES)}"
    if action == "add":
        write(new, rng)
    elif action in ("embed", "prune"):
        embed_files([root], out, model, workers=1, prune=action == "prune")
    elif action == "kill":
        embed_and_be_killed(int(rng.integers(3000)), [root], out, model, workers=1)
    elif files:
        file = files[rng.integers(len(files))]
        if action == "edit":
            write(file, rng)
        elif action == "touch":
            os.utime(file, ns=(0, int(rng.integers(1 << 60))))
        elif action == "remove":
            file.unlink()
        elif action == "rename":
            new.parent.mkdir(exist_ok=True)
            file.rename(new if new.suffix == file.suffix else file.with_name(f"x{file.name}"))
        elif action == "damage":
            file.write_bytes(b"no cloud")
        elif action == "part":
            embed_files([file], out, model, workers=1)


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 40))]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "shares"])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_sequence_ends_as_a_fresh_embed(model, tmp_path, seed, folder):
    rng, root, out = (
        np.random.default_rng(seed),
        tmp_path / "s",
        tmp_path / ("v" if folder else "v.parquet"),
    )
    root.mkdir()
    if folder:
        write(root / "first.npy", rng)
        embed_files([root], out, model, workers=1, share="1/2")
    for action in [*rng.choice(ACTIONS, 14), "add", "prune"]:
        with suppress(ReadError):  # raised if no usable file is left
            act(action, root, out, model, rng)
    embed_files([root], tmp_path / "fresh.parquet", model, workers=1)
    made, fresh = rows(out), rows(tmp_path / "fresh.parquet")
    assert made.keys() == fresh.keys()
    assert all(np.allclose(made[path], fresh[path], atol=1e-5) for path in fresh)
    for file in Vectors(out, may_be_empty=True).files:  # row groups are merged
        groups = [
            pq.read_metadata(file).row_group(i).num_rows
            for i in range(pq.read_metadata(file).num_row_groups)
        ]
        assert all(3 <= size <= 6 for size in groups[:-1])
        assert all(size > 0 for size in groups)
    left = {path.name for path in tmp_path.rglob("*") if not path.is_relative_to(root)}
    assert left == {out.name, "fresh.parquet"} | ({"part-1of2.parquet", "part-2of2.parquet"} & left)


# ----------------------------------------------------------------------------------------- commands


def fails(capsys, *arguments) -> str:
    """Run a command that must fail. Returns its single line of error."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.fixture
def scans(tmp_path):
    for i in range(6):
        write(tmp_path / "s" / f"{i}.npy", np.random.default_rng(i))
    return tmp_path / "s"


def test_a_second_writer_is_refused_by_every_command(model, scans, tmp_path, capsys):
    out, store = tmp_path / "v.parquet", tmp_path / "v.lancedb"
    embed_files([scans], out, model, workers=1)
    for arguments, written in (
        (("embed", scans, "--model", model, "--out", out), out),
        (
            ("embed", scans, "--model", model, "--out", tmp_path / "parts"),
            tmp_path / "parts" / "part-1of1.parquet",
        ),
        (("index", out, "--out", store), store),
        (("label", scans, "--model", model, "--out", tmp_path / "labels"), tmp_path / "labels"),
        (("prepare", scans, "--points", "64", "--out", tmp_path / "store"), tmp_path / "store"),
    ):
        with writing(written):
            assert f"{written}: another command is writing there" in fails(capsys, *arguments)
            assert len(rows(out)) == 6  # reading needs no lock


def test_of_two_embeds_at_once_none_loses_what_it_reports(model, scans, tmp_path):
    write(tmp_path / "t" / "a.npy", np.random.default_rng(9))
    words = ("--model", model, "--out", tmp_path / "v.parquet")
    both = [
        Command("embed", folder, *words, log=tmp_path / "logs" / folder.name)
        for folder in (scans, tmp_path / "t")
    ]
    codes = [command.end() for command in both]
    assert 0 in codes
    for command, code in zip(both, codes, strict=True):
        refused = "another command is writing there" in command.printed("err")
        assert code == 0 or (code == 2 and refused)
    assert len(rows(tmp_path / "v.parquet")) == sum(
        n for n, code in zip((6, 1), codes, strict=True) if code == 0
    )


def import_lancedb():
    """Import lancedb in the process before its command starts, since this takes longest."""
    import lancedb  # noqa: F401

    print("ready", flush=True)


@pytest.mark.slow
def test_an_index_killed_at_any_moment_does_not_block_the_next(model, scans, tmp_path):
    embed_files([scans], tmp_path / "v.parquet", model, workers=1)
    store, rng = tmp_path / "v.lancedb", np.random.default_rng(0)
    words = ("index", tmp_path / "v.parquet", "--out", store)
    for i in range(4):
        command = Command(*words, log=tmp_path / "logs" / str(i), before=import_lancedb)
        command.wait_for("ready")
        time.sleep(float(rng.uniform(0, 0.3)))
        command.process.kill()
        command.end()
    main_ends_well("index", tmp_path / "v.parquet", "--out", store)
    assert len(VectorStore(store)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "logs",
        "s",
        "v.lancedb",
        "v.parquet",
    ]


@pytest.mark.parametrize(
    "left", ["", "vectors.lance", "vectors.lance/data", "vectors.lance/_versions"]
)
def test_what_a_killed_index_leaves_is_no_obstacle(model, scans, tmp_path, left, capsys):
    embed_files([scans], tmp_path / "v.parquet", model, workers=1)
    (tmp_path / "v.lancedb" / left).mkdir(parents=True)
    if left.endswith("data"):
        (tmp_path / "v.lancedb" / left / "half.lance").write_bytes(b"half")
    assert "not a store" in fails(capsys, "search", tmp_path / "v.lancedb", scans / "0.npy")
    main_ends_well("index", tmp_path / "v.parquet", "--out", tmp_path / "v.lancedb")
    assert len(VectorStore(tmp_path / "v.lancedb")) == 6


def test_a_folder_of_something_else_is_no_store_to_be(model, scans, tmp_path, capsys):
    embed_files([scans], tmp_path / "v.parquet", model, workers=1)
    (tmp_path / "v.lancedb").mkdir()
    (tmp_path / "v.lancedb" / "thesis.txt").write_text("mine")
    assert "not a store" in fails(
        capsys, "index", tmp_path / "v.parquet", "--out", tmp_path / "v.lancedb"
    )
    assert (tmp_path / "v.lancedb" / "thesis.txt").read_text() == "mine"


def main_ends_well(*arguments) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0


def test_an_empty_file_of_vectors_is_said_by_every_command(model, scans, tmp_path, capsys):
    out, store, query = tmp_path / "v.parquet", tmp_path / "v.lancedb", tmp_path / "q.npy"
    write(query, np.random.default_rng(7))
    embed_files([scans], out, model, workers=1)
    main_ends_well("index", out, "--out", store)
    [file.unlink() for file in scans.iterdir()]
    main_ends_well("embed", scans, "--model", model, "--out", out, "--prune")
    assert rows(out) == {}
    for arguments in (
        ("search", out, query),
        ("search", out, query, "--html", tmp_path / "page.html"),
        ("index", out, "--out", store),
        ("index", out, "--out", tmp_path / "new.lancedb"),
        ("view", query, "--index", out),
    ):
        assert "v.parquet: holds no vectors; add some with jepa3d embed" in fails(
            capsys, *arguments
        )
    main_ends_well("index", store, "--out", store, "--delete", "num_points>=0", "--ann")
    assert "v.lancedb: holds no vectors" in fails(capsys, "search", store, query)
    write(scans / "new.npy", np.random.default_rng(8))
    main_ends_well("embed", scans, "--model", model, "--out", out)
    main_ends_well("index", out, "--out", store)
    main_ends_well("search", store, query)


@pytest.mark.parametrize("name", ["x.csv", "x.npy", "x.lancedb", "x.v2", "x.parquet.gz", "file"])
def test_vectors_are_written_to_what_is_known_only(model, scans, tmp_path, name, capsys):
    (tmp_path / "file").write_text("mine")
    said = fails(capsys, "embed", scans, "--model", model, "--out", tmp_path / name)
    assert (
        f"--out {tmp_path / name}: give a .parquet file, or a folder whose name has no dot" in said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "s"]
