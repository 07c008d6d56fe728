"""Rules that all source files follow."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "jepa3d"

CUT = re.compile(r'"""([^"\n]*[;:])\n\n')
ROOMS = runpy.run_path(str(SOURCE.parents[1] / "docs" / "rooms.py"))


def test_imports_go_down_only():
    ROOMS["check"](ROOMS["imports"]())


@pytest.mark.parametrize(
    "found", [{"data": {"training": 1}}, {"models": {"data": 1}}, {"ground": {"cli": 2}}], ids=str
)
def test_an_import_that_goes_up_is_found(found):
    with pytest.raises(ValueError, match="which is not below it"):
        ROOMS["check"](found)


def test_the_page_of_rooms_is_that_of_the_code():
    page = (SOURCE.parents[1] / "docs" / "rooms.md").read_text()
    assert page == ROOMS["page"](), "run: python docs/rooms.py"


def test_no_file_is_too_long_to_read():
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 475} == {}


# Names that Windows or macOS lack. A function that has an alternative may use them. No file may use
# them when it is imported.
LINUX_MODULES = {
    "resource",
    "fcntl",
    "pwd",
    "grp",
    "termios",
    "tty",
    "pty",
    "curses",
    "syslog",
    "readline",
}
LINUX_NAMES = {
    "fork",
    "sysconf",
    "pread",
    "pwrite",
    "posix_fallocate",
    "sched_getaffinity",
    "getuid",
    "geteuid",
    "killpg",
    "uname",
    "SIGKILL",
    "SIGHUP",
    "SIGUSR1",
    "SIGALRM",
    "SIGPIPE",
    "pthread_sigmask",
    "mkfifo",
}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a file is imported: all except the bodies of functions.
    Defaults and decorators of functions do run.
    """
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (child.args, *child.decorator_list):
                yield from at_import(part)
        elif not isinstance(child, ast.Lambda):
            yield from at_import(child)


def only_on_linux(source: str) -> set[str]:
    found = set()
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & LINUX_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)} & (
                LINUX_MODULES | LINUX_NAMES
            )
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & LINUX_NAMES
    return found


def test_what_only_linux_has_is_found():
    for source in ("import resource", "import os\nX = os.sysconf", "from os import fork"):
        assert only_on_linux(source)
    assert only_on_linux("import signal\ndef stop(number=signal.SIGKILL): pass") == {"SIGKILL"}
    assert not only_on_linux("import os, signal\ndef f():\n    import resource\n    os.fork()")


def test_no_file_needs_linux_to_be_imported():
    assert {
        p.name: found for p in SOURCE.rglob("*.py") if (found := only_on_linux(p.read_text()))
    } == {}


def test_the_first_line_of_a_docstring_is_a_whole_sentence():
    """If the first line ends with a semicolon or a colon and an empty line follows, its sentence
    was cut in two.
    """
    root = SOURCE.parents[1]
    files = [
        path for folder in ("src", "tests", "benchmarks") for path in (root / folder).rglob("*.py")
    ]
    cut = [f"{path.name}: {line}" for path in files for line in CUT.findall(path.read_text())]
    assert files
    assert cut == []


def test_a_sentence_that_was_cut_is_found():
    quotes = '"' * 3
    assert CUT.findall(f"    {quotes}Tokens B M C;\n\n    LayerNorm of each.{quotes}")
    assert not CUT.findall(f"    {quotes}Tokens B M C.\n\n    LayerNorm of each.{quotes}")
