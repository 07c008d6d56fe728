"""The package around the code: what a start imports, versions that agree, and a wheel that works by itself."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

import jepa3d

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
HEAVY = ("torch", "numpy", "scipy", "sklearn", "accelerate", "huggingface_hub", "safetensors", "matplotlib", "pyarrow")


def python(*words, **options) -> str:
    """What a Python process prints; it has to end well."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("command", [None, "--help", "--version", "pretrain --help", "embed --help"])
def test_a_start_imports_none_of_the_heavy_packages(command):
    code = "import jepa3d, sys\n"
    if command:
        code += f"from jepa3d.cli import main\ntry:\n    main({command.split()})\nexcept SystemExit:\n    pass\n"
    printed = python("-c", code + f"print('imported:', *(name for name in {HEAVY} if name in sys.modules))")
    assert printed.splitlines()[-1].strip() == "imported:"


def test_the_public_names_are_imported_on_first_use():
    assert jepa3d.embed([np.random.default_rng(0).normal(size=(2000, 3))]).shape == (1, 384)
    assert jepa3d.load.__module__ == "jepa3d.models.ready"
    assert {*jepa3d.__all__, "Embedder", "__version__"} <= set(dir(jepa3d))
    with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
        jepa3d.Encoder  # noqa: B018


def test_type_checkers_see_the_names_where_they_are_imported_from():
    tree = ast.parse(Path(jepa3d.__file__).read_text(encoding="utf-8"))
    seen = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name: seen.get(name) for name in jepa3d._MODULES} == jepa3d._MODULES
    assert set(jepa3d.__all__) < set(jepa3d._MODULES)
    assert (Path(jepa3d.__file__).parent / "py.typed").is_file()


def test_the_module_is_the_command_and_a_record_names_the_command():
    assert python("-m", "jepa3d", "--version").strip() == jepa3d.__version__
    code = "import runpy, sys; sys.argv = ['x', '--version']\ntry:\n    runpy.run_module('jepa3d', run_name='__main__')\n"
    code += "except SystemExit:\n    pass\nprint(sys.argv[0])"
    assert python("-c", code).splitlines()[-1] == "jepa3d"


# ------------------------------------------------------------------------------------------------------ the project


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == VERSION


def test_every_workflow_and_template_is_read_as_yaml():
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    read = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    for name in ("test.yml", "publish.yml"):
        steps = [step for job in read[name]["jobs"].values() for step in job["steps"]]
        assert all(("run" in step) != ("uses" in step) for step in steps), name
    for name in ("bug.yml", "question.yml"):
        assert {"name", "description", "body"} <= set(read[name])


def test_the_extras_that_a_workflow_installs_exist():
    extras = set(re.findall(r"^(\w+) = \[", PROJECT.partition("optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE))
    for file in ROOT.glob(".github/workflows/*.yml"):
        for named in re.findall(r"\[((?:\w+,)*\w+)\]\"", file.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, f"{file.name}: {named}"


def test_pre_commit_has_the_pinned_versions():
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "pyrefly"]
    assert all(version in pinned for hook in hooks for version in hook["additional_dependencies"])


@pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="builds a wheel, which needs hatchling")
def test_a_wheel_embeds_a_cloud_without_the_repository(tmp_path):
    """Installed into a folder of its own, where no path leads to the source, it gives the vector that the source gives."""
    python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob(f"jepa3d-{VERSION}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"jepa3d/py.typed", "jepa3d/__main__.py", "jepa3d/weights/model.safetensors"} <= set(names)
    assert all(name.startswith(("jepa3d/", f"jepa3d-{VERSION}.dist-info/")) for name in names)
    target = tmp_path / "installed"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    packages = [path for path in sys.path if path and not (Path(path) / "jepa3d").is_dir()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *packages])}
    cloud = np.random.default_rng(0).normal(size=(2000, 3))
    np.save(tmp_path / "cloud.npy", cloud)
    code = "import jepa3d, numpy; print(jepa3d.__file__, jepa3d.__version__)\n"
    code += "numpy.save('vector.npy', jepa3d.embed('cloud.npy', jepa3d.load('default')))"
    # -S: no .pth file of an editable installation adds the source
    printed = python("-S", "-c", code, cwd=tmp_path, env=environment).split()
    assert printed == [str(target / "jepa3d" / "__init__.py"), VERSION]
    assert np.load(tmp_path / "vector.npy") == pytest.approx(jepa3d.embed([cloud]), rel=1e-5, abs=1e-6)
    if importlib.util.find_spec("pyarrow"):
        command = ["-S", "-m", "jepa3d", "embed", "cloud.npy", "--out", "vectors.parquet", "--workers", "1"]
        assert "1 new" in python(*command, cwd=tmp_path, env=environment)
