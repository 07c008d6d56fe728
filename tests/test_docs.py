"""The documents name lines and commands that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "jepa3d"
REFERENCE = re.compile(r"`([\w/]+\.py):(\d+)` \(`(\w+)`\)")


def definition(path: str, name: str) -> int | None:
    """The line of a definition in a source file."""
    lines = (SOURCE / path).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
    return found[0] if found else None


def test_method_refers_to_the_right_lines():
    references = REFERENCE.findall((ROOT / "docs" / "method.md").read_text())
    assert len(references) > 20
    wrong = [
        f"{p}:{n} {name} is at {definition(p, name)}" for p, n, name in references if int(n) != definition(p, name)
    ]
    assert not wrong


@pytest.mark.parametrize("forbidden", [".cuda(", ".half(", '"cuda"', "except Exception", "pickle.load"])
def test_the_package_is_free_of(forbidden):
    assert [str(p) for p in SOURCE.rglob("*.py") if forbidden in p.read_text()] == []


def test_the_readme_s_tree_is_the_tree():
    text = (ROOT / "README.md").read_text()
    missing = [p.name for p in SOURCE.rglob("*.py") if p.name != "__init__.py" and p.stem not in text]
    assert not missing
