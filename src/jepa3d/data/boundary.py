"""Where parsers meet the rest: whatever they raise on a damaged file becomes a `ReadError` that
names the file.
"""

import importlib
import logging
import lzma
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jepa3d.data.cloud import ReadError
from jepa3d.plain import printable

# What the parsers were seen to raise on damaged files (benchmarks/fuzz.py).
_PARSER_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    ImportError,
    StopIteration,
    NameError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)
# else it prints beside the one line of the error
logging.getLogger("laspy").addHandler(logging.NullHandler())


@contextmanager
def boundary(path: Path) -> Iterator[None]:
    """Turns what a parser raises, and what it lacks, into one ReadError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ReadError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ReadError(f"{path}: {printable(str(error))}") from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({line(error.strerror or error)})") from error
    except _PARSER_ERRORS as error:
        if str(error).startswith(f"{path}: "):
            raise ReadError(printable(str(error))) from error
        kind = suffix_of(path)[1:].upper()
        raise ReadError(f"{path}: damaged or not a {kind} file ({line(error)})") from error


def line(error: Any) -> str:
    """The first line of an error, printable and short."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return printable(text)[:200]


def left_out(name: str, reason: str) -> str:
    """A line on a file that cannot be used; where the reason begins with the file's path, it is not
    said twice.
    """
    last = name.rsplit("/", 1)[-1]
    for file in (last, last.rpartition("#")[0]):
        at = reason.find(f"{file}: ") if file else -1
        if at == 0 or (at > 0 and reason[at - 1] == "/"):
            reason = reason[at + len(file) + 2 :]
            break
    return f"left out: {printable(name)}: {printable(reason)}"


def shortened(text: str, most: int) -> str:
    """Printable text of at most so many letters, its middle cut out: names differ at their ends."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[most // 2 - most :]}"


def check_claim(path: Path, claimed: int, factor: int) -> None:
    """ReadError, before anything is allocated, where a header claims more bytes than `factor` times
    the file's.
    """
    if claimed > factor * path.stat().st_size:
        raise ReadError(f"truncated or damaged: its header claims {claimed} bytes")


def module(name: str) -> Any:
    """A parser of the `io` extra; without it, a ReadError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReadError(f"needs {name}: pip install 'jepa3d[io]'") from error


def suffix_of(path: Path) -> str:
    """The suffix that says what a file is, in lower case; of a.ply.gz it is .ply."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
