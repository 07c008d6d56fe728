"""Whatever happens to a folder and to the commands that embed it, the vectors end as those of a fresh embed."""

import itertools
import os
import pathlib
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jepa3d import locking
from jepa3d.data.cloud import ReadError
from jepa3d.inference import embedding, vectors
from jepa3d.inference.embedding import embed_files
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.models.encoder import PointEncoder

SUFFIXES = (".npy", ".npz", ".xyz", "#1.npy", ".npz#0.npy")
ACTIONS = ("add", "add", "edit", "touch", "remove", "rename", "damage", "embed", "prune", "kill", "part")


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
    with path.open("wb") as file:  # numpy would add a suffix
        if path.suffix == ".npz":
            np.savez(file, points=points)
        elif path.suffix == ".npy":
            np.save(file, points[0])
        else:
            np.savetxt(file, points[0])


def embed_and_be_killed(at: int, *arguments, **settings) -> None:
    """A process that commits after every cloud, killed at one of the calls of what reads, locks and writes."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    embedding.COMMIT_SECONDS = -1.0
    watched, calls = {module.__file__ for module in (embedding, vectors, locking, pathlib)}, itertools.count()

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


@pytest.mark.parametrize("folder", [False, True], ids=["file", "shares"])
@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_ends_as_a_fresh_embed(model, tmp_path, seed, folder):
    rng, root, out = np.random.default_rng(seed), tmp_path / "s", tmp_path / ("v" if folder else "v.parquet")
    root.mkdir()
    if folder:
        write(root / "first.npy", rng)
        embed_files([root], out, model, workers=1, share="1/2")
    for action in [*rng.choice(ACTIONS, 14), "add", "prune"]:
        with suppress(ReadError):  # nothing there that can be used
            act(action, root, out, model, rng)
    embed_files([root], tmp_path / "fresh.parquet", model, workers=1)
    made, fresh = rows(out), rows(tmp_path / "fresh.parquet")
    assert made.keys() == fresh.keys()
    assert all(np.allclose(made[path], fresh[path], atol=1e-5) for path in fresh)
    for file in Vectors(out, may_be_empty=True).files:  # compacted
        groups = [pq.read_metadata(file).row_group(i).num_rows for i in range(pq.read_metadata(file).num_row_groups)]
        assert all(3 <= size <= 6 for size in groups[:-1])
        assert all(size > 0 for size in groups)
    left = {path.name for path in tmp_path.rglob("*") if not path.is_relative_to(root)}
    assert left == {out.name, "fresh.parquet"} | ({"part-1of2.parquet", "part-2of2.parquet"} & left)
