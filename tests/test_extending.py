"""docs/extending.md: its code, installed as a package of its own, trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jepa3d.run import Run

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n# module mylab\.(\w+)\n(.*?)```", PAGE, re.DOTALL)
FLAGS = re.findall(r"(--\S+ mylab\.\S+) --out", PAGE)
PROJECT = """[project]
name = "mylab"
version = "1.0"
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Where a distribution of the page's code is installed."""
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


def pretrain(site: Path, *words: str) -> subprocess.CompletedProcess:
    sizes = "--preset tiny --encoder.depth 1 --target.layers 1 --batch-size 8 --max-steps 3"
    command = [sys.executable, "-m", "jepa3d", "pretrain", "--data", "synthetic:64", *sizes.split()]
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *words], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize("flags", [*FLAGS, "--teacher ema mylab.teachers:moments"])
def test_code_of_another_package_is_trained_with(flags, site, tmp_path):
    assert len(BLOCKS) == len(FLAGS) == 3
    done = pretrain(site, *flags.split(), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    assert run.finished
    assert run.encoder.is_dir()
    again = pretrain(site, *flags.split(), "--out", str(tmp_path / "run"), "--resume")
    assert "finished already" in again.stdout


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--sampler.name mylab.samplers:lower_half", "cannot be imported"),
        ("--teacher nowhere.at:all", "nowhere.at:all: cannot be imported"),
        ("--sampler.name randon", "did you mean 'random'?"),
        ("--objective jpea", "did you mean 'jepa'?"),
        ("--sampler.name mylab.leaks:peek", "context has no token of its target"),
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
