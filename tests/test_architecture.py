"""The house rules that a reader relies on."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "jepa3d"

# Lowest room first: a file may import its own room and those before it.
ROOMS = [
    {"ops", "allocator", "plain", "locking"},
    {"config", "validate"},
    {"models"},
    {"data"},
    {"objectives"},
    {"evaluation", "figures", "page"},
    {"training"},
    {"inference"},
    {"demo", "info", "predict", "report"},
    {"cli"},
]
# The probe loads networks and data but no trainer; the loop stamps runs with their provenance.


def room(name: str) -> int:
    return next(level for level, names in enumerate(ROOMS) if name in names)


def imported(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    whole = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names if node.module == "jepa3d"]
    inner = [node.module for node in nodes if node.module and node.module.startswith("jepa3d.")]
    return {name.split(".")[1] for name in whole + inner}


def test_imports_go_down_only():
    upward = []
    for path in SOURCE.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        upward += [f"{path.name} imports {name}" for name in imported(path) if room(name) > room(own)]
    assert not upward


def test_no_file_is_too_long_to_read():
    assert {p.name: n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350} == {}
