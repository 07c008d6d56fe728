"""The code of docs/extending.md, installed as a separate package, trains and reads files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jepa3d.data.store import Store
from jepa3d.run import Run

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n# module mylab\.(\w+)\n(.*?)```", PAGE, re.DOTALL)
*FLAGS, READER = re.findall(r"(--\S+ mylab\.\S+) --out", PAGE)
PROJECT = """[project]
name = "mylab"
version = "1.0"
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Install the page's code as a package. Returns the folder of the installation."""
    source, site = tmp_path_factory.mktemp("mylab"), tmp_path_factory.mktemp("site")
    (source / "mylab").mkdir()
    (source / "mylab" / "__init__.py").touch()
    (source / "pyproject.toml").write_text(PROJECT)
    for name, code in BLOCKS:
        (source / "mylab" / f"{name}.py").write_text(code)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", site]
    command = [sys.executable, "-m", "pip", "install", *options, source]
    subprocess.run(list(map(str, command)), check=True, timeout=120)
    return site


def run(site: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jepa3d", *words]
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def pretrain(site: Path, *words: str) -> subprocess.CompletedProcess:
    sizes = "--preset tiny --encoder.depth 1 --target.layers 1 --batch-size 8 --max-steps 3"
    return run(site, "pretrain", "--data", "synthetic:64", *sizes.split(), *words)


@pytest.mark.parametrize("flags", [*FLAGS, "--teacher ema mylab.teachers:moments"])
def test_code_of_another_package_is_trained_with(flags, site, tmp_path):
    assert len(BLOCKS) == len([*FLAGS, READER]) == 4
    done = pretrain(site, *flags.split(), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    made = Run(tmp_path / "run")
    assert made.finished
    assert made.encoder.is_dir()
    again = pretrain(site, *flags.split(), "--out", str(tmp_path / "run"), "--resume")
    assert "finished already" in again.stdout


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--sampler.name mylab.samplers:lower_half", "cannot be imported"),
        ("--teacher nowhere.at:all", "nowhere.at:all: cannot be imported"),
        ("--sampler.name randon", "did you mean 'random'?"),
        ("--objective jpea", "did you mean 'jepa'?"),
        ("--sampler.name mylab.leaks:peek", "context and target share no token"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(flags, reason, site, tmp_path):
    leak = dict(BLOCKS)["samplers"].replace("target[:, None]", "context[:, None]")
    (site / "mylab" / "leaks.py").write_text(leak.replace("upper_half", "peek"))
    done = pretrain(site, *flags.split(), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def records(folder: Path, count: int) -> np.ndarray:
    """Write files in the page's format, in two classes, and one damaged file. Returns the points
    [count, 100, 3].
    """
    points = np.random.default_rng(0).normal(size=(count, 100, 3))
    for i, cloud in enumerate(points):
        file = folder / "ab"[i % 2] / f"{i}.rec"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.column_stack([np.arange(100.0), cloud]).tofile(file)
    (folder / "a" / "bad.rec").write_bytes(bytes(5 * 8))
    return points


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_reader_of_another_package_reads_files_in_any_process(site, tmp_path, workers):
    points = records(tmp_path / "scans", 20)
    words = ["--points", "100", "--keep-strays", *READER.split(), "--out", str(tmp_path / "store")]
    done = run(site, "prepare", str(tmp_path / "scans"), *words, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert "took 20 clouds (20 .rec); left out 1" in done.stdout
    assert "bad.rec: damaged or not a REC file" in done.stdout
    store = Store(tmp_path / "store")
    assert store.class_names == ("a", "b")
    for row in range(len(store)):
        wanted = points[int(Path(store.key(row)).stem)]
        found = store.cloud(row).file_coordinates()
        assert np.allclose(found[np.lexsort(found.T)], wanted[np.lexsort(wanted.T)], atol=1e-5)
    assert "were there already" in run(site, "prepare", str(tmp_path / "scans"), *words).stdout
    assert run(site, "info", str(tmp_path / "store"), "--verify").returncode == 0


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        ("mylab.readers:others", "mylab.readers:others: cannot be imported"),
        ("records", "records: cannot be imported"),
    ],
)
def test_a_reader_that_is_none_is_refused_before_a_file_is_read(site, tmp_path, reader, reason):
    records(tmp_path / "scans", 2)
    words = ["--reader", reader, "--out", str(tmp_path / "store")]
    done = run(site, "prepare", str(tmp_path / "scans"), *words)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()
