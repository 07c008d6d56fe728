"""Tables of numbers: XYZ, TXT, CSV, PTS, ASC, as scanners, spreadsheets and scripts write them.

One reader, streamed, so that a file of any size needs bounded memory: a chunk of lines is parsed by
numpy and, where numpy cannot, line by line, which also knows the line that is wrong.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import numpy as np

from jepa3d.data.cloud import PointCloud, ReadError, Reservoir, to_bytes

_CHUNK = 200_000  # lines parsed at once
_COMMENT = ("#", "//", "%")
_MARKS = (";", "|", "\t", ",")  # delimiters beside white space; of several in a row, the first
_FREE = 100  # lines of other text that may stand above the numbers
_LONGEST = 100_000  # characters of a line above the numbers
_NO_VALUE = re.compile(r"-?|n/?a|null|none|-?nan\(\w+\)|-?1\.#(ind|qnan|snan)0*", re.IGNORECASE)
_ATTRIBUTES = {
    "normals": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")),
    "colors": (("r", "g", "b"), ("red", "green", "blue")),
    "parts": tuple((name,) for name in ("part", "label", "classification", "class", "segment")),
}
_KNOWN = {*"xyz", "intensity", "i"} | {
    name for groups in _ATTRIBUTES.values() for group in groups for name in group
}


def read_table(
    path: Path, columns: tuple[str, ...] | None = None, names: tuple[str, ...] = ()
) -> PointCloud:
    """A cloud from lines of numbers, with what its header names.

    Raises ReadError; arguments as of `Table`.
    """
    table = Table(path, columns, names)
    return collected(table.rows(), table.attributes)


def collected(chunks: Iterable[np.ndarray], attributes: dict[str, int]) -> PointCloud:
    """A cloud from chunks of rows x, y, z and attributes of so many columns; of too many rows, a
    random part.
    """
    reservoir, unseen = Reservoir(), 0
    for rows in chunks:
        seen = rows[~np.isnan(rows[:, :3]).any(1)]
        unseen += len(rows) - len(seen)
        reservoir.add(seen)
    rows, at, found = reservoir.rows(), 3, {}
    for key, width in attributes.items():
        values, at = rows[:, at : at + width], at + width
        if np.isfinite(values).any():
            found[key] = (
                values[:, 0]
                if key == "parts"
                else to_bytes(values)
                if key == "colors"
                else np.float32(values)
            )
    total = reservoir.total if reservoir.total > len(rows) else None
    return PointCloud.make(rows[:, :3], total=total, unseen=unseen, **found)


class Table:
    """The layout of a table's file: where its numbers begin, its delimiter, and which columns are
    used.

    columns: the header's names of x, y and z, where it has others than x, y, z. names: the columns
    of a file that is known to have no header. Without both, the first three columns are x, y, z and
    others are left alone. attributes: normals, colors, parts that the header names, with their
    numbers of columns. Raises ReadError.
    """

    def __init__(
        self, path: Path, columns: tuple[str, ...] | None = None, names: tuple[str, ...] = ()
    ):
        self._header = ""
        self._scan(path)
        row = _fields(self._first, self.mark)
        columns = (
            columns if columns and len(columns) == 3 else None
        )  # more are those of a .bin beside it
        names = names or self._names(row, columns)
        xyz = coordinate_columns(names, columns) if names else ("0", "1", "2")
        order = list(names or xyz)
        useful = {
            n
            for n in set(names) - set(xyz)
            if order.index(n) >= len(row) or _is_number(row[order.index(n)], True)
        }
        found = {
            key: next((g for g in groups if set(g) <= useful), ())
            for key, groups in _ATTRIBUTES.items()
        }
        self.attributes = {key: len(group) for key, group in found.items() if group}
        self.columns = [order.index(name) for name in chain(xyz, *found.values())]
        if self.columns[2] >= len(row) or max(self.columns[:2]) >= len(row):
            raise ReadError(f"{self._where} has {len(row)} columns, its header has {len(names)}")

    def rows(self, size: int | None = None, attributes: bool = True) -> Iterator[np.ndarray]:
        """Chunks of at most `size` rows x, y, z and attributes, float64 n D; NaN where nothing
        stands.

        Raises ReadError: a line that is no such row, or another number of rows than the count lines
        say.
        """
        columns, seen = self.columns if attributes else self.columns[:3], 0
        counts = [] if self._count is None else [self._count]

        def aside(text: str) -> bool:
            """Whether a line is no row, but the count of a further block or the header once more."""
            if counts and text.isdecimal():
                counts.append(int(text))
                return True
            return bool(self._header) and text == self._header

        with self._open() as file:
            lines = islice(file, self._skip, None)
            for rows in parsed(lines, self._skip + 1, size or _CHUNK, self.mark, columns, aside):
                seen += len(rows)
                yield rows
        if counts and seen != sum(counts):
            state = "truncated" if seen < sum(counts) else "damaged"
            raise ReadError(f"{state}: {seen:,} points, but its count says {sum(counts):,}")

    def _open(self) -> TextIO:
        errors = "surrogateescape" if self.encoding.startswith("utf-8") else "replace"
        return self.path.open(encoding=self.encoding, errors=errors)

    def _scan(self, path: Path) -> None:
        """Find the first row of numbers, whatever stands above it: comments, counts, names, a
        title.
        """
        self.path, self.encoding = path, encoding_of(path)
        self._above: list[tuple[int, str]] = []  # lines of other text, with their numbers
        self._comments = deque[str](maxlen=1000)  # the last of those that may be a header
        self._count: int | None = None
        for number, line in enumerate(self._first_lines(), 1):
            text = line.strip()
            if len(line) >= _LONGEST:
                raise ReadError(
                    f"line {number} is no row of a table: it has {_LONGEST:,} characters or more"
                )
            if text.startswith(_COMMENT):
                if {*"xyz"} <= {*text.lower()}:
                    self._comments.append(text)
            elif text.isdecimal():
                if self._count is not None:
                    raise ReadError(
                        "two counts above its numbers: name it .ptx if it is of that format"
                    )
                self._count = int(text)
            elif text.strip(",;|\t "):
                self.mark = delimiter_of(text)
                row = _fields(line, self.mark)
                numbers = [_is_number(field) for field in row]
                plain = any(numbers[:3]) and all(_is_number(field, True) for field in row[:3])
                names = self._split(self._above[-1][1], len(row)) if self._above else []
                cells = sum(numbers) >= 3 or all(_is_number(field, True) for field in row)
                named = len(names) == len(row) and cells and sum(map(_is_number, names)) < 3
                if len(row) >= 3 and (plain or named):
                    self._skip, self._first, self._where = number - 1, line, f"line {number}"
                    return
                if text.lower().startswith("ncols"):
                    raise ReadError(
                        "a grid of heights (ESRI), not a table of points: write its cells as x y z first"
                    )
                if all(numbers):
                    raise ReadError(
                        f"line {number} has {len(row)} columns, at least 3 are needed (x, y, z)"
                    )
                self._above.append((number, text))
                if len(self._above) > _FREE:
                    break
        first = f": the first line is {self._above[0][1][:60]!r}" if self._above else ""
        raise ReadError(f"no rows of numbers{first}")

    def _first_lines(self) -> Iterator[str]:
        with self._open() as file:
            yield from iter(lambda: file.readline(_LONGEST), "")

    def _split(self, text: str, width: int) -> list[str]:
        """Names of a line above the numbers: the split, by this delimiter or another, that has
        `width` names.
        """
        text = re.sub(r"\s*[\[(][^\])]*[\])]", "", text.lstrip("#/%! ")).rstrip(",;|\t ")
        marks = [mark for mark in (self.mark, *_MARKS) if mark]
        splits = [[_plain(field) for field in _fields(text, mark)] for mark in (*marks, None)]
        return max(
            splits, key=lambda names: (set("xyz") <= set(names), len(names) == width, len(names))
        )

    def _names(self, row: list[str], columns: tuple[str, ...] | None) -> tuple[str, ...]:
        """The header's names, from the last line above the numbers or from a comment;

        () where there is none.
        """
        filled = len(row) - next((i for i, field in enumerate(reversed(row)) if field), 0)
        if self._above:
            wanted = set(map(_plain, columns or "xyz"))
            splits = [(at, text, self._split(text, filled)) for at, text in self._above]
            named = [
                found for found in splits if wanted <= set(found[2]) and len(found[2]) == filled
            ]
            number, self._header, names = (
                named[-1] if named else splits[-1]
            )  # units may stand below the names
            if (
                len(names) == len(row) - 1
                and self._first.startswith('"')
                and self._first.count('"') == 2
            ):
                names.insert(0, "")  # R's row names have no name
            if len(names) in (filled, len(row)) or wanted <= set(names):
                if len(names) > len(row) and self.mark is None and names[:3] != list("xyz"):
                    raise ReadError(
                        f"line {number} names {len(names)} columns, {self._where} has {len(row)}"
                    )
                return tuple(names)
        for comment in reversed(self._comments):  # CloudCompare: //X Y Z R G B
            names = self._split(comment, filled)
            if set(map(_plain, columns or "xyz")) <= set(names) and (
                len(names) == filled or (len(names) < filled and set(names) <= _KNOWN)
            ):
                return tuple(names)
        return ()


def check_table(path: Path) -> None:
    """ReadError for a file that is no table of numbers, such as a README."""
    Table.__new__(Table)._scan(path)  # whatever its columns are called


def encoding_of(path: Path) -> str:
    """The encoding of a text file, by its first bytes; of unknown 8-bit ones, utf-8.

    Raises ReadError for no text.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    for mark, name in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if start.startswith(mark):
            return name
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if (
            len(start) > 8
            and start[first::2].count(0) > 0.9 * len(start[first::2])
            and 0 not in start[1 - first :: 2]
        ):
            return name
    if 0 in start:
        raise ReadError("no text: its first bytes are binary")
    return "utf-8-sig"


def delimiter_of(text: str) -> str | None:
    """The delimiter of a row of numbers;

    None for white space. A comma may be a decimal one beside another.
    """
    text = re.sub(r'"[^"]*"', lambda quoted: quoted.group().replace(",", "."), text.strip(" \r\n"))
    for mark in _MARKS:
        fields = [field.strip() for field in text.rstrip(mark).split(mark)]
        if mark == "\t" and any(not field or re.search(r"\d +[-+.\d]", field) for field in fields):
            continue  # tabs as white space
        if (
            mark == ","
            and len(fields) >= 2
            and re.fullmatch(r"([-+]?\d*[.,]?\d+(e[-+]?\d+)?[ \t]+){2,}\S+", text, re.I)
        ):
            return None  # decimal commas
        if len(fields) >= 3 or (len(fields) == 2 and mark == ","):
            return mark
    return None


# --------------------------------------------------------------------------------------------- rows


def parsed(
    lines: Iterable[str],
    first: int,
    size: int,
    mark: str | None,
    columns: list[int],
    aside: Callable[[str], bool] = lambda text: False,
) -> Iterator[np.ndarray]:
    """Chunks of these columns of lines of numbers, float64 n D, of which `first` is the number of
    the first line.

    Empty lines, comments and what `aside` takes are skipped. Raises ReadError that names the line:
    the first three columns must be numbers, or nothing; what is no number in others is NaN.
    """
    lines = iter(lines)
    while chunk := list(islice(lines, size)):
        kept = [line for line in chunk if line.strip() and not line.startswith(_COMMENT)]
        try:
            rows = (
                np.loadtxt(kept, delimiter=mark, usecols=columns, ndmin=2, comments=None)
                if kept
                else []
            )
        except ValueError:
            rows = list(_one_by_one(chunk, first, mark, columns, aside))
        yield np.asarray(rows, np.float64).reshape(-1, len(columns))
        first += len(chunk)


def _one_by_one(
    lines: list[str], first: int, mark: str | None, columns: list[int], aside: Callable[[str], bool]
) -> Iterator[list[float]]:
    for number, line in enumerate(lines, first):
        text = line.strip()
        if not text.strip(",;|\t ") or text.startswith(_COMMENT) or aside(text):
            continue
        row = _fields(line.partition(" #")[0], mark)
        if len(row) <= (max(columns) if mark is None else max(columns[:3])):
            raise ReadError(
                f"damaged: line {number} is not a row of at least {max(columns) + 1} columns: {text[:60]!r}"
            )
        values = []
        for i, column in enumerate(columns):
            field = row[column] if column < len(row) else ""
            if i < 3 and not _is_number(field, True):
                raise ReadError(
                    f"damaged: line {number} is not a row of numbers, with {field[:60]!r}: {text[:60]!r}"
                )
            values.append(_number(field) if _is_number(field, True) else np.nan)
        yield values


def _fields(line: str, mark: str | None) -> list[str]:
    """The cells of a line, without quotes."""
    line = " ".join(line.split()) if mark is None else line.strip("\r\n ")
    if '"' in line:
        with suppress(csv.Error):
            return [
                cell.strip()
                for cell in next(
                    csv.reader([line], delimiter=mark or " ", skipinitialspace=True), []
                )
            ]
    return line.split() if mark is None else [field.strip() for field in line.split(mark)]


def _number(field: str) -> float:
    """The number in a cell, with a decimal point or comma;

    NaN for what programs write where there is none.
    """
    if _NO_VALUE.fullmatch(field):
        return np.nan
    if "_" in field:  # which Python would skip
        raise ValueError(field)
    return float(field.replace(",", "."))


def _is_number(field: str, or_none: bool = False) -> bool:
    """Whether a cell holds a number, or, with or_none, nothing."""
    if _NO_VALUE.fullmatch(field):
        return or_none or len(field) > 1
    try:
        _number(field)
    except ValueError:
        return False
    return True


def coordinate_columns(names: tuple[str, ...], columns: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the x, y and z columns; a choice between several is never guessed."""
    wanted = tuple(_plain(name) for name in columns) if columns else ("x", "y", "z")
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise ReadError(f"two columns of one name in its header, {twice[0]!r}: {', '.join(names)}")
    if set(wanted) <= set(names):
        return wanted
    if columns:
        missing = next(name for name in wanted if name not in names)
        raise ReadError(f"has no column {missing!r} (--columns); it has {', '.join(names)}")
    stems = [re.sub("x", "{}", name, count=1) for name in names if "x" in name]
    triples = [
        t for t in ([stem.format(axis) for axis in "xyz"] for stem in stems) if set(t) <= set(names)
    ]
    triples = [t for t in triples if not t[0].startswith("n")]
    if len(triples) == 1:
        return tuple(triples[0])
    found = (
        f"{len(triples)} triples: {'; '.join(','.join(t) for t in triples)}"
        if triples
        else ", ".join(names)
    )
    raise ReadError(f"no columns x, y, z, but {found}; choose with --columns of jepa3d prepare")


def _plain(name: str) -> str:
    """A header's name without quotes, unit and case: 'X [m]' is x.

    Bytes that are not UTF-8 are taken as Latin-1.
    """
    name = re.sub(r"\s*[\[(].*[\])]$", "", name.strip().strip("\"'")).lower()
    return name if name.isprintable() else name.encode("utf-8", "surrogateescape").decode("latin-1")
