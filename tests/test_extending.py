"""docs/extending.md: its code, installed as a package of its own, trains."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from site import addsitedir

import pytest
from processes import Command

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


def pretrain(site: Path, *words: str, out: Path) -> Command:
    """The ended command, with the distribution on its path."""
    sizes = "--preset tiny --encoder.depth 1 --target.layers 1 --batch-size 8 --max-steps 3"
    given = ["--data", "synthetic:64", *sizes.split(), *words, "--out", out]
    log = out.with_name(f"log{len(list(out.parent.iterdir()))}")
    command = Command("pretrain", *given, log=log, before=partial(addsitedir, str(site)))
    command.end()
    return command


@pytest.mark.parametrize("flags", [*FLAGS, "--teacher ema mylab.teachers:moments"])
def test_code_of_another_package_is_trained_with(flags, site, tmp_path):
    assert len(BLOCKS) == len(FLAGS) == 3
    done = pretrain(site, *flags.split(), out=tmp_path / "run")
    assert done.process.exitcode == 0, done.printed("err")
    run = Run(tmp_path / "run")
    assert run.finished
    assert run.encoder.is_dir()
    again = pretrain(site, *flags.split(), "--resume", out=tmp_path / "run")
    assert "finished already" in again.printed()


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
    done = pretrain(site, *flags.split(), out=tmp_path / "run")
    assert done.process.exitcode == 2
    assert reason in done.printed("err")
    assert done.printed("err").count("\n") == 1
    assert not (tmp_path / "run").exists()
