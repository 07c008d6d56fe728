"""Packaging: what `import jepa3d` imports, whether all version numbers agree, and whether the wheel
works without the repository.
"""

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


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = text("pyproject.toml")
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "matplotlib",
    "pyarrow",
)


def python(*words, **options) -> str:
    """Run a Python process, which must succeed. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    "command", [None, "--help", "--version", "pretrain --help", "embed --help"]
)
def test_a_start_imports_none_of_the_heavy_packages(command):
    code = "import jepa3d, sys\n"
    if command:
        code += f"from jepa3d.cli import main\ntry:\n    main({command.split()})\nexcept SystemExit:\n    pass\n"
    printed = python(
        "-c", code + f"print('imported:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    assert printed.splitlines()[-1].strip() == "imported:"


def test_the_public_names_are_imported_on_first_use():
    assert jepa3d.embed([np.random.default_rng(0).normal(size=(2000, 3))]).shape == (1, 384)
    assert jepa3d.load.__module__ == "jepa3d.models.ready"
    assert {*jepa3d.__all__, "Embedder", "__version__"} <= set(dir(jepa3d))
    with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
        jepa3d.Encoder  # noqa: B018


def test_type_checkers_see_the_names_where_they_are_imported_from():
    tree = ast.parse(Path(jepa3d.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert {name: seen.get(name) for name in jepa3d._MODULES} == jepa3d._MODULES
    assert set(jepa3d.__all__) < set(jepa3d._MODULES)
    assert (Path(jepa3d.__file__).parent / "py.typed").is_file()


def test_the_module_is_the_command_and_a_record_names_the_command():
    assert python("-m", "jepa3d", "--version").strip() == jepa3d.__version__
    code = (
        "import runpy, sys; sys.argv = ['x', '--version']\n"
        "try:\n    runpy.run_module('jepa3d', run_name='__main__')\nexcept SystemExit:\n    print(sys.argv[0])"
    )
    assert python("-c", code).splitlines()[-1] == "jepa3d"


# -------------------------------------------------------------------------------------- the project


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {VERSION}\n" in text("CITATION.cff")
    newest = re.search(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", text("CHANGELOG.md"), re.MULTILINE)
    assert newest[1] == VERSION


def test_every_workflow_and_template_is_read_as_yaml():
    files = [
        *ROOT.glob(".github/**/*.yml"),
        ROOT / ".pre-commit-config.yaml",
        ROOT / "CITATION.cff",
    ]
    read = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    for name in ("test.yml", "publish.yml"):
        steps = [step for job in read[name]["jobs"].values() for step in job["steps"]]
        assert all(("run" in step) != ("uses" in step) for step in steps), name
    for name in ("bug.yml", "question.yml"):
        assert {"name", "description", "body"} <= set(read[name])


def test_the_extras_that_a_workflow_installs_exist():
    section = PROJECT.partition("optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    for file in ROOT.glob(".github/workflows/*.yml"):
        for named in re.findall(r"\[((?:\w+,)*\w+)\]\"", file.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, f"{file.name}: {named}"


def test_pre_commit_has_the_pinned_versions():
    pinned = text("constraints.txt").splitlines()
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "pyrefly"]
    assert all(version in pinned for hook in hooks for version in hook["additional_dependencies"])


@pytest.mark.skipif(
    not importlib.util.find_spec("hatchling"), reason="builds a wheel, which needs hatchling"
)
def test_a_wheel_embeds_a_cloud_without_the_repository(tmp_path):
    """The wheel is installed into its own folder, with no path to the source. It gives the same
    vector as the source.
    """
    pq = pytest.importorskip("pyarrow.parquet")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob(f"jepa3d-{VERSION}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    data = {"weights/model.safetensors", "evaluation/published.yaml", "page.css"}
    assert {f"jepa3d/{name}" for name in ("py.typed", "__main__.py", *data)} <= set(names)
    assert all(name.startswith(("jepa3d/", f"jepa3d-{VERSION}.dist-info/")) for name in names)
    target = tmp_path / "installed"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    packages = [path for path in sys.path if path and not (Path(path) / "jepa3d").is_dir()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *packages])}
    # -S ignores .pth files, so that an editable installation does not add the source.
    found = python(
        "-S",
        "-c",
        "import jepa3d; print(jepa3d.__file__, jepa3d.__version__)",
        cwd=tmp_path,
        env=environment,
    )
    assert found.split() == [str(target / "jepa3d" / "__init__.py"), VERSION]
    cloud = np.random.default_rng(0).normal(size=(2000, 3))
    np.save(tmp_path / "cloud.npy", cloud)
    command = [
        "-S",
        "-m",
        "jepa3d",
        "embed",
        "cloud.npy",
        "--out",
        "vectors.parquet",
        "--workers",
        "1",
    ]
    python(*command, cwd=tmp_path, env=environment)
    assert pq.read_table(tmp_path / "vectors.parquet")["vector"][0].as_py() == pytest.approx(
        jepa3d.embed([cloud])[0], abs=1e-5
    )
