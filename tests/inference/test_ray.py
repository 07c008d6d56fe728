"""Embedding of files inside other engines: the callable alone, and on a real Ray cluster that loses
a node.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

import jepa3d
from jepa3d.data import parallel
from jepa3d.data.cloud import ReadError
from jepa3d.inference.embed_files import embed_files
from jepa3d.inference.embedding import Embedded
from jepa3d.inference.lance import create_or_update
from jepa3d.inference.search import search
from jepa3d.inference.vectors import Vectors, to_numpy, write

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_embed.py"
RNG = np.random.default_rng(0)


def make_scans(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True)
    for i in range(count):
        np.save(folder / f"{i:03d}.npy", RNG.normal(size=(200, 3)).astype(np.float32))
    (folder / "bad.ply").write_text("ply\nformat nonsense\n")
    return [
        *(str(folder / f"{i:03d}.npy") for i in range(count)),
        str(folder / "bad.ply"),
        str(folder / "lost.npy"),
    ]


def test_rows_are_those_of_embed_and_a_failed_file_is_one(tmp_path):
    paths = make_scans(tmp_path / "scans", 3)
    embed_files([tmp_path / "scans"], tmp_path / "v.parquet")
    expected = Vectors(tmp_path / "v.parquet")
    embedder = jepa3d.Embedder()
    assert embedder.spec == expected.spec
    rows = embedder({"path": np.array(paths)})
    assert rows.schema.metadata == pq.read_schema(tmp_path / "v.parquet").metadata
    good = rows.filter(rows["error"].is_null())
    for name in ("path", "num_points", "stamp"):
        assert good[name].to_pylist() == expected.column(name)
    vectors = np.concatenate([to_numpy(batch.column(0)) for batch in expected.batches(["vector"])])
    assert np.allclose(to_numpy(good["vector"]), vectors, atol=1e-5)
    bad = sorted(rows.filter(rows["error"].is_valid()).to_pylist(), key=lambda row: row["path"])
    assert [row["path"] for row in bad] == paths[3:]
    assert all(row["vector"] is None and row["num_points"] is None for row in bad)
    assert "damaged" in bad[0]["error"]
    assert "no such file" in bad[1]["error"]


def test_readers_take_the_rows_that_have_vectors(tmp_path):
    paths = make_scans(tmp_path / "scans", 3)
    embedder, folder = jepa3d.Embedder(), tmp_path / "vectors"
    folder.mkdir()
    write([embedder({"path": paths[::-1]})], folder / "a.parquet")
    write([embedder({"path": paths[3:]})], folder / "none.parquet")
    found = Vectors(folder)
    assert len(found) == 3
    assert found.column("path") == paths[2::-1]
    for path in paths[:3]:
        assert [(hit.path, hit.cosine) for hit in search(folder, jepa3d.embed(path), 1)[0]] == [
            (path, 1.0)
        ]
    assert len(search(folder, jepa3d.embed(paths[0]), 9, where=["num_points=200"])[0]) == 3
    assert create_or_update(found, tmp_path / "store.lancedb") == (3, 0)
    with pytest.raises(ReadError, match="holds no vectors"):
        Vectors(folder / "none.parquet")
    np.save(paths[0], RNG.normal(size=(300, 3)))
    embed_files([tmp_path / "scans"], folder / "a.parquet")
    assert pq.read_schema(folder / "a.parquet").names[-1] == "vector"
    assert sorted(Vectors(folder / "a.parquet").column("path")) == paths[:3]


def test_it_is_imported_when_asked_for():
    code = "import sys, jepa3d; assert 'pyarrow' not in sys.modules; jepa3d.Embedder; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_path_may_be_a_folder_or_an_address_and_no_cloud_is_lost(tmp_path):
    make_scans(tmp_path / "scans", 2)
    np.save(tmp_path / "many.npy", RNG.normal(size=(3, 200, 3)))
    (tmp_path / "scans" / "notes.pdf").write_text("no cloud")
    rows = jepa3d.Embedder()(
        {"path": [str(tmp_path / "scans"), f"{tmp_path}/many.npy#1", f"{tmp_path}/\udcff.ply"]}
    )
    found = {
        row["path"].removeprefix(f"{tmp_path}/"): row["error"] is None for row in rows.to_pylist()
    }
    assert found == {
        "scans/000.npy": True,
        "scans/001.npy": True,
        "many.npy#1": True,
        "scans/bad.ply": False,
        "scans/notes.pdf": False,
        r"\xff.ply": False,
    }


def crash(items: list) -> list:
    """Imitate work on items; the process dies if one of them is bad.ply."""
    if any(item.path.endswith("bad.ply") for item in items):
        os._exit(1)
    return [Embedded(np.ones(384, np.float32), 200, 0, [])] * len(items)


@pytest.mark.slow
def test_a_file_whose_parser_crashes_costs_its_own_row(tmp_path):
    paths = make_scans(tmp_path / "scans", 3)[:4]
    embedder = jepa3d.Embedder()
    embedder.work = crash
    rows = embedder({"path": paths})
    assert rows["path"].to_pylist() == paths
    assert rows["error"].to_pylist() == [None, None, None, f"{paths[3]}: {parallel.CRASHED}"]


# ---------------------------------------------------------------------------------------- a cluster


class Cluster:
    """A Ray cluster of nodes with one CPU each, on this machine."""

    def __init__(self):
        # Paths of sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self.environment |= {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
        self.nodes: list[subprocess.Popen] = []

    def start(self, *flags: str) -> str:
        """Start a node. Returns what it has printed when it is ready."""
        log = self.folder / f"node{len(self.nodes)}.log"
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--num-cpus",
            "1",
        ]
        command += ["--object-store-memory", "100000000", "--disable-usage-stats", *flags]
        with log.open("w") as file:
            self.nodes.append(
                subprocess.Popen(command, stdout=file, stderr=file, env=self.environment)
            )
        for _ in range(600):
            if "Ray runtime started" in (said := log.read_text()):
                return said
            assert self.nodes[-1].poll() is None, said
            time.sleep(0.1)
        raise AssertionError(said)

    def kill(self, node: subprocess.Popen) -> None:
        """Kill all processes of a node at once, as a power cut does."""
        if node.poll() is None:
            processes = psutil.Process(node.pid)
            for process in [processes, *processes.children(recursive=True)]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        node.wait()

    def close(self) -> None:
        for node in reversed(self.nodes):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def cluster():
    pytest.importorskip("ray")
    made = Cluster()
    try:
        yield made
    finally:
        made.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_embeds_every_file_once(cluster, tmp_path):
    paths, lists, out = [], tmp_path / "lists", tmp_path / "vectors"
    lists.mkdir()
    for part in range(8):
        paths.append(make_scans(tmp_path / "scans" / str(part), 24))
        (lists / f"part-{part}").write_text("\n".join(paths[-1]) + "\n")
    address = f"127.0.0.1:{free_port()}"
    cluster.start(
        "--head",
        "--port",
        address.split(":")[1],
        "--include-dashboard",
        "false",
        "--temp-dir",
        str(cluster.folder),
    )
    cluster.start("--address", address)
    command = [sys.executable, str(EXAMPLE), str(lists), str(out)]
    environment = cluster.environment | {"RAY_ADDRESS": address}
    killed, said = False, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as running:
        watch = threading.Timer(180, running.kill)
        watch.start()
        for line in running.stdout:
            said.append(line)
            if "; 78 done" in line:  # both nodes have finished some clouds and started others
                cluster.kill(cluster.nodes[1])
                killed = True
        watch.cancel()
    assert running.returncode == 0, "".join(said)
    assert killed
    assert f"{out}: 208 clouds done, 16 of them failed\n" in said
    stored = {file.name: pq.read_table(file).to_pylist() for file in out.glob("*.parquet")}
    assert sorted(stored) == [f"part-{part}.parquet" for part in range(8)]
    for part, expected in enumerate(paths):
        rows = sorted(stored[f"part-{part}.parquet"], key=lambda row: row["path"])
        assert [row["path"] for row in rows] == expected  # every file occurs once
        assert [row["vector"] is None for row in rows] == [False] * 24 + [True] * 2
        assert [row["error"] is None for row in rows] == [True] * 24 + [False] * 2
    assert len(Vectors(out)) == 8 * 24
    assert [hit.path for hit in search(out, jepa3d.embed(paths[5][7]), 1)[0]] == [paths[5][7]]

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.parquet")}
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "8 partitions, 0 to do" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before
