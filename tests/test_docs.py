"""The documents cite source files, names and commands that exist."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jepa3d.cli import app, main
from jepa3d.data.synthetic import make_shapes

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "jepa3d"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "src/jepa3d/weights/README.md",
]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def definitions(file: Path) -> set[str]:
    """Return the qualified names of the functions, classes and methods of a source file."""

    def inside(node: ast.AST, before: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield before + child.name
                yield from inside(child, f"{before}{child.name}.")

    return set(inside(ast.parse(file.read_text()), ""))


def wrong_citations(text: str) -> list[str]:
    """Return all citations in a text that are wrong: words that look like FILE.py or FILE.py::NAME,
    where the file does not exist or does not define the name.
    """
    wrong = []
    for cited in re.findall(r"[\w./-]*\.py\b[\w:.#-]*", text):
        path, separator, name = re.sub(r"[.:]$", "", cited).partition("::")
        around = [ROOT / path, SOURCE / path, *([] if "/" in path else SOURCE.rglob(path))]
        file = next((file for file in around if file.is_file()), None)
        if file is None or (separator and name not in definitions(file)):
            wrong.append(cited)
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_the_source_that_a_page_cites_exists(page):
    assert wrong_citations((ROOT / page).read_text()) == []


def test_the_method_cites_the_code_of_its_parts():
    assert len(re.findall(r"\w\.py::\w", (ROOT / "docs" / "method.md").read_text())) > 40


@pytest.mark.parametrize(
    "cited",
    [
        "models/encoder.py:None",
        "models/encoder.py:59",
        "`models/encoder.py:59` (`hidden_states`)",
        "nothing.py",
        "models/encoder.py::nothing",
        "models/encoder.py::hidden_states",
        "models/encoder.py::",
        "models/encoder.py#L3",
        "models/encoder.pyc",
        "encoder.py:",
        "data/encoder.py",
        "src/models/encoder.py",
        "encoder.py::Point-Encoder",
    ],
)
def test_what_cannot_be_read_as_a_citation_is_wrong(cited):
    # A .pyc file is no source file, and the colon belongs to the sentence.
    expected = cited not in ("models/encoder.pyc", "encoder.py:")
    assert bool(wrong_citations(f"see {cited} for it")) == expected


def test_the_page_of_settings_is_that_of_the_code():
    page = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "run: python docs/settings.py"
    assert not re.findall(r"^\| `(.*?)`.*\|  \|$", page, re.MULTILINE), "settings without a meaning"


def test_what_is_a_citation_is_right():
    text = (
        "`encoder.py`, models/encoder.py: a, `src/jepa3d/ops.py`. tests/test_docs.py::definitions;"
    )
    text += " benchmarks/step.py"
    assert wrong_citations(text + " models/encoder.py::PointEncoder.hidden_states.") == []


@pytest.mark.parametrize(
    "forbidden", [".cuda(", ".half(", '"cuda"', "except Exception", "pickle.load"]
)
def test_the_package_is_free_of(forbidden):
    # Parsers, and readers of other people, raise errors of any kind.
    allowed = {"errors.py"} if forbidden == "except Exception" else set()
    assert {p.name for p in SOURCE.rglob("*.py") if forbidden in p.read_text()} == allowed


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def commands_of(document: str) -> list[list[str]]:
    """Return the words of each line that calls jepa3d in a document's shell blocks.

    `jepa3d view` is left out, since it would wait for a browser.
    """
    lines = [
        shlex.split(line, comments=True)
        for block in blocks("sh", document)
        for line in block.splitlines()
    ]
    # test_view.py tests jepa3d view.
    return [words[1:] for words in lines if words and words[0] == "jepa3d" and words[1] != "view"]


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "src/jepa3d/weights/README.md",
]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def unquoted(line: str) -> str:
    """Return the text of a line that is outside quotes and comments."""
    line = re.sub(r"'[^']*'|\"[^\"$`]*\"|\\.", "", line)
    return re.split(r"(?:^|\s)#", line)[0]


def taken_by_the_shell(line: str) -> list[str]:
    """Return the words of a line with < > * ? outside quotes, except runs/NAME-?, which the shell
    should expand.
    """
    words = [word for word in unquoted(line).split() if re.search(r"[<>*?;&()]", word)]
    return [word for word in words if not re.fullmatch(r"runs/[$\w-]+[*?]", word)]


def commands_in(document: str) -> list[str]:
    """Return every line that calls jepa3d, from shell blocks and from inline code."""
    text = (ROOT / document).read_text()
    lines = [line for block in blocks("sh", document) for line in block.splitlines()]
    lines += re.findall(
        r"(?<!`)`(jepa3d [^`\n]*)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    return [line for line in lines if re.search(r"\bjepa3d ", line)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_shell_takes_nothing_of_a_command_for_itself(document):
    """Otherwise an unquoted num_points>=1000 would write a file named =1000, and file names would
    replace * and ?.
    """
    assert [line for line in commands_in(document) if taken_by_the_shell(line)] == []


def test_what_a_shell_would_take_is_found():
    for line in (
        "search a b --where num_points>=1",
        "index a --delete path~*/x",
        "embed scan?.xyz",
        "embed a>b",
    ):
        assert len(taken_by_the_shell(f"jepa3d {line}")) == 1
    for line in (
        "search --where 'num_points>=1' \"path~*\"  # > and *",
        r"embed a\*b",
        "probe runs/jepa-?",
    ):
        assert taken_by_the_shell(f"jepa3d {line}") == []


@pytest.mark.parametrize("command", sorted(app))
def test_help_quotes_what_a_shell_would_take(command, capsys):
    """The help quotes every example that contains an operator or a pattern next to letters."""
    if command.startswith("-"):
        return
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert re.findall(r"\w[<>]=?\w|\w~\S*[*?]", re.sub(r"'[^']*'", "", said)) == []


def cut_grid(path: str) -> str:
    """Write a copy of a grid to the current folder, with two training steps and one seed. Returns
    its path.
    """
    cut = yaml.safe_load(Path(path).read_text()) | {"settings": {"max_steps": 2}, "seeds": [0]}
    cut["recipe"] = str((Path(path).parent / cut["recipe"]).resolve())
    Path("cut.yaml").write_text(yaml.safe_dump(cut))
    return "cut.yaml"


def run(words: list[str], capsys) -> None:
    """Run a command, with two training steps."""
    stages = {"pretrain": ("", "generative.", "invariance."), "classify": ("",), "segment": ("",)}
    trained = stages.get(words[0], ()) if "--out" in words else ()
    short = [flag for name in trained for flag in (f"--{name}max-steps", "2")]
    if words[0] == "compare":
        words = [words[0], cut_grid(words[1]), *words[2:]]
    with pytest.raises(SystemExit) as stop:
        main(words + short)
    assert not stop.value.code, capsys.readouterr().err


COMMANDS = {
    "README.md": "embed search label prepare pretrain pretrain probe classify predict report",
    "docs/train.md": "prepare info pretrain info fewshot segment predict results pretrain pretrain "
    "curve compare",
}


@pytest.mark.parametrize(
    "document", ["README.md", pytest.param("docs/train.md", marks=pytest.mark.slow)]
)
def test_the_commands_of_a_page_run_in_order(document, tmp_path, monkeypatch, capsys, quick_probe):
    """They run on a folder of clouds and on bundles, with two training steps and a few fits per
    probe.
    """
    made = make_shapes(150, 2048, seed=1)
    (tmp_path / "scans").mkdir()
    for i, points in enumerate(made["points"][:40]):
        np.save(tmp_path / "scans" / f"{i}.npy", points)
    np.savetxt(tmp_path / "scan.xyz", made["points"][0])
    labels = np.arange(150) // 3 % 5
    shapes = {
        "points": made["points"],
        "labels": labels,
        "split": (np.arange(150) % 3 > 0).astype(np.int8),
        "class_names": [f"kind{i}" for i in range(5)],
    }
    np.savez(tmp_path / "labelled.npz", **shapes)
    parts = 2 * labels[:, None] + (made["points"][..., 2] > 0)
    np.savez(tmp_path / "parts.npz", **shapes, seg=parts)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    commands = commands_of(document)
    assert [words[0] for words in commands] == COMMANDS[document].split()
    for words in commands:
        run(words, capsys)
    if document != "README.md":
        return
    scope: dict = {"points": torch.from_numpy(made["points"][:2])}
    exec(blocks("python")[0], scope)
    assert scope["vectors"].shape == (40, 384)
    exec(blocks("python")[1], scope)
    assert scope["vectors"].shape == (2, 192)
    assert scope["tokens"].shape == (2, 32, 96)
    assert scope["centers"].shape == (2, 32, 3)


SITE = [pytest.param("docs/using.md", marks=pytest.mark.slow), "docs/index.md"]


@pytest.mark.parametrize("document", SITE)
def test_the_commands_of_the_site_run_in_order(document, tmp_path, monkeypatch, capsys):
    made = make_shapes(60, 2048, seed=1)
    for i, points in enumerate(made["points"]):
        file = tmp_path / ("scans" if i < 50 else "more") / "car" / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, points)
    np.savetxt(tmp_path / "scan.xyz", made["points"][0])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for words in commands_of(document):
        run(words, capsys)
    scope: dict = {"clouds": made["points"][:6], "labels": np.arange(6) % 2}
    for text in blocks("python", document):
        exec(text, scope)
    if document == "docs/using.md":
        assert scope["vectors"].shape == (50, 384)


def test_the_site_has_every_document_and_no_dead_link(tmp_path):
    config = (ROOT / "mkdocs.yml").read_text()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == set(
        re.findall(r"- (\w+\.md)", config)
    )
    mkdocs = pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        mkdocs.__name__,
        "build",
        "--strict",
        "--quiet",
        "-d",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


def test_the_table_of_formats_is_what_running_them_gives(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    formats = pytest.importorskip("formats")
    assert formats.table() in (ROOT / "docs" / "data.md").read_text()


def test_the_make_targets_of_the_readme_exist():
    targets = re.findall(r"\bmake ([\w-]+)", "\n".join(blocks("sh")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test", "test-all"]
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["parts.py --batch 2 --rounds 1", "step.py --size tiny --batch 4 --rounds 1 --steps 1"],
    ids=str,
)
def test_the_benchmarks_of_the_step_run(command):
    script, *flags = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *flags],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("| whole step", "| jepa3d tiny"))
    ]
    assert len(rows) == (1 if script == "parts.py" else 3)


@pytest.mark.slow
def test_the_notebook_s_cells_run(tmp_path):
    """They run without Jupyter. A picture that a cell displays must only exist."""
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shim = """\
import sys
from types import ModuleType, SimpleNamespace
sys.modules["IPython"] = ModuleType("IPython")
sys.modules["IPython"].get_ipython, sys.modules["IPython"].version_info = lambda: None, (9, 0)
sys.modules["IPython.display"] = SimpleNamespace(Image=lambda path: path.stat().st_size, display=print)
"""
    script = tmp_path / "tour.py"
    text = "\n".join([shim, *code, "assert vectors.shape == (8, 192)"])
    for whole, cut in (("synthetic:400", "synthetic:60"), ('"max_steps": 60', '"max_steps": 6')):
        assert whole in text
        text = text.replace(whole, cut)
    script.write_text(text)
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout
