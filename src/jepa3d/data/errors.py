"""Turn every error of a parser into a `ReadError` with one line of text that names the file."""

import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jepa3d.data.cloud import ReadError
from jepa3d.plain import printable

# If laspy's logger had no handler, Python would print its log lines beside our error message.
logging.getLogger("laspy").addHandler(logging.NullHandler())


@contextmanager
def as_read_error(path: Path) -> Iterator[None]:
    """Turn every error that a parser raises in this block into a ReadError that names the file.

    Warnings in the block are not shown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ReadError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ReadError(f"{path}: {printable(str(error))}") from error
    except OSError as error:
        reason = first_line(error.strerror or error)
        raise ReadError(f"{path}: cannot be read ({reason})") from error
    except Exception as error:  # for damaged files, parsers raise nearly every kind of error
        if str(error).startswith(f"{path}: "):
            raise ReadError(printable(str(error))) from error
        what = f"damaged or not a {suffix_of(path)[1:].upper()} file"
        raise ReadError(f"{path}: {what} ({first_line(error)})") from error


def first_line(error: Any) -> str:
    """Return the first line of an error's message, or the name of the error's type if there is no
    message. The result is printable and has at most 200 characters.
    """
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return printable(text)[:200]


def because(name: str, reason: str) -> str:
    """Return "name: reason" for an unusable file, on one line.

    name: path of the file; for one cloud of a file of many clouds, the path with #row added. If the
    reason already begins with the path of the file, the path is not repeated.
    """
    last = re.escape(name.rsplit("/", 1)[-1])
    file = re.sub(r"\\#\d+$", "", last)
    reason = re.sub(rf"^(?:.*?/)?(?:{last}|{file}): ", "", reason)
    return printable(f"{name}: {reason}")


def refuse(message: str) -> NoReturn:
    """Raise a ReadError.

    Some files are found to be unusable before they are read. The entry of such a file (entries.py)
    has this function, with the message, as its reader `Entry.read`. So the error is raised when the
    file's turn comes.
    """
    raise ReadError(message)


def shortened(text: str, most: int) -> str:
    """Shorten text to at most `most` printable characters.

    If the text is longer, its middle is replaced by "…", since long names mostly differ at the
    beginning or at the end.
    """
    text = printable(text)
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[most // 2 - most :]}"


def check_claim(path: Path, claimed: int, factor: int) -> None:
    """Raise ReadError if a header claims more bytes than `factor` times the size of the file.

    Call this before memory for these bytes is allocated.
    """
    if claimed > factor * path.stat().st_size:
        raise ReadError(f"truncated or damaged: its header claims {claimed:,} bytes")


def check_unpacked(path: Path, total: int, factor: int, always: int) -> None:
    """Raise ReadError if a file unpacks to over `factor` times its size and over `always` bytes."""
    size = path.stat().st_size
    if total > max(factor * size, always):
        reason = f"its {size:,} bytes would unpack to {total:,}, too many for its size"
        raise ReadError(f"{reason}; unpack it yourself, or save it without compression")


def io_module(name: str) -> Any:
    """Import a parser of the `io` extra. Raises a ReadError that says how to install the parser."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReadError(f"needs {name}: pip install 'jepa3d[io]'") from error


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case, ignoring a final .gz."""
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()
