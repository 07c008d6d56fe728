"""Read tables of numbers (XYZ, TXT, CSV, PTS, ASC) that scanners, spreadsheets and scripts write.

Files of any size are read in bounded memory: numpy parses the lines in chunks. A chunk that numpy
refuses is parsed again, line by line. The parser of lines accepts more notations than numpy, and
its errors name the bad line.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import TextIO

import numpy as np

from jepa3d.data import cloud as clouds
from jepa3d.data.cloud import PointCloud, ReadError, collected

Names = tuple[str, ...]
_COMMENT = ("#", "//", "%")
# Delimiters that are tried before white space, in this order. `delimiter_of` uses the first that
# splits a row into enough cells.
_MARKS = (";", "|", "\t", ",")
_BLANK = ",;|\t "  # a row that holds only these characters is empty
# Largest number of lines above the numbers; comments, counts of rows and empty lines do not count.
# With this limit, a long text without numbers is refused early.
_MAX_TITLE = 100
# Every line down to the first row of numbers must have fewer characters than this. With this limit,
# a large file without line ends is refused before all of it is in memory.
_MAX_LINE = 100_000
# how programs write a missing value
_NO_VALUE = re.compile(r"(?i)-?|n/?a|null|none|-?nan\(\w+\)|-?1\.#(ind|qnan|snan)0*")
# all names that the columns of an attribute may have, such as nx
_ATTRIBUTES = set().union(*chain(*clouds.ATTRIBUTE_COLUMNS.values()))
# a comment with fewer names than columns is a header only if all its names are in this set
_KNOWN = _ATTRIBUTES | {"x", "y", "z", "intensity", "i"}


def read_table(path: Path, columns: Names | None = None) -> PointCloud:
    """Read a table as a cloud, with the attributes that its header names. Raises ReadError.

    columns: as for `Table.used`.
    """
    table = Table(path)
    used = table.used(columns)
    return collected(table.rows([*used.values()]), used)


def table_rows(path: Path) -> Iterator[np.ndarray]:
    """Return an iterator over the rows in chunks: arrays [n, 3] float64 of the columns x, y and z.

    Raises ReadError.
    """
    table = Table(path)
    return table.rows([*table.used(None).values()][:3])


class Table:
    """A file with rows of numbers, which may stand below a header, comments or a count of rows.

    The constructor finds the first row. It raises ReadError for a file that is no text, for a text
    that has no rows of numbers, such as a README, and for a text in another format, such as PTX.
    """

    def __init__(self, path: Path):
        self.path, self.encoding = path, encoding_of(path)
        # (line number, text) of each line above the numbers, except comments, counts and empty
        # lines
        self._above: list[tuple[int, str]] = []
        # the last 1,000 comments above the numbers that contain the letters x, y and z; one of
        # these comments may be the header (older ones are dropped, to bound memory)
        self._comments = deque[str](maxlen=1000)
        self._count: int | None = None  # number of rows, if the file states it
        # the line with the names of the columns, if it is not a comment
        self._header = ""
        with self._open() as file:
            lines = enumerate(iter(lambda: file.readline(_MAX_LINE), ""), 1)
            for number, line in lines:
                if self._begins_at(number, line):
                    return
                if len(self._above) > _MAX_TITLE:
                    break
        first = f": the first line is {self._above[0][1][:60]!r}" if self._above else ""
        raise ReadError(f"has no rows of numbers{first}; a row must have x, y and z")

    def used(self, columns: Names | None) -> dict[str, int]:
        """Return a dict from x, y, z and the names of attribute columns, such as nx, to the indices
        of these columns.

        columns: names that the user gives, or None. If the table has a header, `columns` holds the
        three names that the header has for x, y and z; any other number of names is ignored. If the
        table has no header, `columns` holds the names of all its columns. Without a header and
        without `columns`, the first three columns are x, y and z. Without a header and with a wrong
        number of names in `columns`, a table of three columns is read as x, y and z, and a wider
        table raises ReadError.

        Also raises ReadError if a header does not fit the rows, and as `coordinate_columns` does.
        """
        row = _fields(self._first, self.mark)
        width = len(row)
        have = f"{self._where} has {width} columns"
        xyz = columns if columns and len(columns) == 3 else None
        names = self._names(row, xyz)
        if not names:
            named = len(columns or "xyz")
            if columns and named != width > 3:
                raise ReadError(f"{have} and no header, but --columns names {named}")
            names = tuple(map(_plain, columns if columns and named == width else "xyz"))
            # three other names, such as "east north height", mean x, y and z in this order
            xyz = names if named == 3 and {*names} != {*"xyz"} else None
        xyz = coordinate_columns(names, xyz)
        found = dict(zip("xyz", map(names.index, xyz), strict=True))
        if max(found.values()) >= width:
            raise ReadError(f"{have}, but the header names {len(names)}")
        cells = dict(zip(names, row, strict=False))
        numbers = {name for name, cell in cells.items() if _number(cell) is not None}
        others = _ATTRIBUTES & (numbers - {*xyz})
        return found | {name: names.index(name) for name in others}

    def rows(self, columns: list[int]) -> Iterator[np.ndarray]:
        """Yield D columns of all rows in chunks, arrays [n, D] float64; empty cells become NaN.

        columns: indices of the D columns. Raises ReadError for a line that is no row, and if the
        file states a wrong number of rows.
        """
        counts, seen = [] if self._count is None else [self._count], 0

        def is_skipped(text: str) -> bool:
            """Return True for a repeated header, and for the count above another block of rows."""
            if counts and text.isdecimal():
                counts.append(int(text))
                return True
            return bool(self._header) and text == self._header

        with self._open() as file:
            lines, first = islice(file, self._skip, None), self._skip + 1
            for rows in parsed(lines, first, self.mark, columns, is_skipped):
                seen += len(rows)
                yield rows
        if counts and seen != (total := sum(counts)):
            state = "truncated" if seen < total else "damaged"
            raise ReadError(f"{state}: {seen:,} points, but its count says {total:,}")

    def _open(self) -> TextIO:
        errors = "surrogateescape" if self.encoding.startswith("utf-8") else "replace"
        return self.path.open(encoding=self.encoding, errors=errors)

    def _begins_at(self, number: int, line: str) -> bool:
        """Return True if this line is the first row of numbers; if not, store what it says.

        The first row begins with x, y and z. Or the line above it is a header with a name for each
        of its cells; then the coordinates may stand in any columns. Raises ReadError if the line
        shows that the file cannot be read as a table.
        """
        text = line.strip()
        if len(line) >= _MAX_LINE:
            raise ReadError(f"line {number} has {_MAX_LINE:,} characters or more")
        if text.startswith(_COMMENT):
            if {*"xyz"} <= {*text.lower()}:
                self._comments.append(text)
            return False
        if text.isdecimal():
            if self._count is not None:
                raise ReadError("two counts above the rows; if it is PTX, name it .ptx")
            self._count = int(text)
            return False
        if not text.strip(_BLANK):
            return False
        self.mark = delimiter_of(text)
        above = self._above[-1][1].split("\t") if self._above else []
        cells = line.strip("\r\n ").split("\t")
        named = len(cells) == len(above) >= 3 and all(map(str.strip, above))
        spaced = any(" " in cell.strip() for cell in cells)
        if self.mark is None and named and not spaced:
            # below a header with as many tabs, two tabs enclose an empty cell
            self.mark = "\t"
        row = _fields(line, self.mark)
        # an empty cell counts as a number in `numbers`, but not in `filled`
        numbers = [_number(field) is not None for field in row]
        filled = [_is_number(field) for field in row]
        begins_with_xyz = any(filled[:3]) and all(numbers[:3])
        names = self._split(self._above[-1][1], len(row)) if self._above else []
        cells = sum(filled) >= 3 or all(numbers)
        headed = len(names) == len(row) and cells and sum(map(_is_number, names)) < 3
        if len(row) >= 3 and (begins_with_xyz or headed):
            self._skip, self._first, self._where = number - 1, line, f"line {number}"
            return True
        if text.lower().startswith("ncols"):
            raise ReadError("is an ESRI grid of heights: convert it to x y z first")
        if all(filled):
            raise ReadError(f"line {number} has {len(row)} columns, but needs 3")
        self._above.append((number, text))
        return False

    def _split(self, text: str, width: int) -> list[str]:
        """Split a line above the numbers into names, with the delimiter that gives the best split.

        A split that has the names x, y and z is better than one that lacks any of them. If this
        does not decide, a split of `width` names is better than any other. If this does not decide
        either, the split of more names is better.
        """
        text = re.sub(r"\s*[\[(][^\])]*[\])]", "", text.lstrip("#/%! ")).rstrip(_BLANK)
        marks = [*(mark for mark in (self.mark, *_MARKS) if mark), None]
        splits = [list(map(_plain, _fields(text, mark))) for mark in marks]
        return max(splits, key=lambda s: ({*"xyz"} <= {*s}, len(s) == width, len(s)))

    def _names(self, row: list[str], columns: Names | None) -> Names:
        """Return the names of the columns in the header; () if there is no header.

        The header is a line or a comment above the numbers. row: the cells of the first row.
        columns: the names for x, y and z, if the header has other names for them. Raises ReadError
        if the cells of the row are separated by white space, and the header has more names than the
        row has cells and does not begin with x, y and z.
        """
        filled = max((i for i, field in enumerate(row, 1) if field), default=len(row))
        wanted = set(map(_plain, columns or "xyz"))
        if self._above:
            splits = [(at, text, self._split(text, filled)) for at, text in self._above]
            # the header need not be the last line above the numbers: a line with the units of the
            # columns may stand between the header and the numbers
            named = [s for s in splits if wanted <= set(s[2]) and len(s[2]) == filled]
            number, self._header, names = (named or splits)[-1]
            quoted = self._first.startswith('"') and self._first.count('"') == 2
            if len(names) == len(row) - 1 and quoted:
                names.insert(0, "")  # the language R writes no name above its row names
            if len(names) in (filled, len(row)) or wanted <= set(names):
                if len(names) > len(row) and not self.mark and names[:3] != [*"xyz"]:
                    counts = f"{len(names)} columns, but {self._where} has {len(row)}"
                    raise ReadError(f"line {number} names {counts}")
                return tuple(names)
        for comment in reversed(self._comments):  # CloudCompare writes //X Y Z R G B
            names = self._split(comment, filled)
            known = len(names) < filled and set(names) <= _KNOWN
            if wanted <= set(names) and (known or len(names) == filled):
                return tuple(names)
        return ()


def encoding_of(path: Path) -> str:
    """Detect the encoding of a text file from its first bytes.

    For UTF-8 and all 8-bit encodings, such as Latin-1, the result is utf-8-sig. Raises ReadError
    for a file that is no text.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe\0\0", b"\xff\xfe", b"\xfe\xff")):
        return "utf-32" if start.startswith(b"\xff\xfe\0\0") else "utf-16"
    for high, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, others = start[high::2], start[1 - high :: 2]
        if len(start) > 8 and zeros.count(0) > 0.9 * len(zeros) and 0 not in others:
            return name
    if 0 in start:
        raise ReadError("is not a text file: its first bytes are binary")
    return "utf-8-sig"


def delimiter_of(text: str) -> str | None:
    """Find the delimiter of a row of numbers; None means white space.

    If the delimiter is not the comma, all commas in the row are decimal commas.
    """
    text = text.strip(" \r\n")
    text = re.sub(r'"[^"]*"', lambda quoted: quoted.group().replace(",", "."), text)
    for mark in _MARKS:
        fields = [field.strip() for field in text.rstrip(mark).split(mark)]
        blank = any(not field or re.search(r"\d +[-+.\d]", field) for field in fields)
        if mark == "\t" and blank:
            continue  # in this row, tabs and blanks are both white space
        decimal = r"([-+]?\d*[.,]?\d+(e[-+]?\d+)?[ \t]+){2,}\S+"
        if mark == "," and len(fields) >= 2 and re.fullmatch(decimal, text, re.I):
            return None  # the commas are decimal commas
        if len(fields) >= 3 or (len(fields) == 2 and mark == ","):
            return mark
    return None


# --------------------------------------------------------------------------------------------- rows


def parsed(
    lines: Iterable[str],
    first: int,
    mark: str | None,
    columns: list[int],
    is_skipped: Callable[[str], bool] = lambda text: False,
) -> Iterator[np.ndarray]:
    """Parse D columns of a table, given as lines of text; yields chunks, arrays [n, D] float64.

    first: number of the first line, for error messages. mark: the delimiter, None for white space.
    columns: indices of the D columns. is_skipped: returns True for further lines to leave out;
    comments and empty lines are always left out. The first three of the D columns must hold numbers
    or be empty; if not, a ReadError names the line. A ReadError also names a line that lacks one of
    these three columns or, if the delimiter is white space, any of the D columns. In the other
    columns, text and missing cells become NaN.
    """

    def cells(number: int, line: str) -> Iterator[list[float]]:
        """Yield the row in a line, or nothing if the line is to be left out."""
        text = line.strip()
        if not text.strip(_BLANK) or text.startswith(_COMMENT) or is_skipped(text):
            return
        row = _fields(line.partition(" #")[0], mark)
        damaged = f"damaged: line {number} is not a row of"
        if len(row) <= (needed := max(columns if mark is None else columns[:3])):
            raise ReadError(f"{damaged} at least {needed + 1} columns: {text[:60]!r}")
        fields = [row[column] if column < len(row) else "" for column in columns]
        values = [_number(field) for field in fields]
        if None in values[:3]:
            wrong = fields[values.index(None)][:60]
            raise ReadError(f"{damaged} numbers, but has {wrong!r}: {text[:60]!r}")
        yield [np.nan if value is None else value for value in values]

    lines = iter(lines)
    while chunk := list(islice(lines, clouds.CHUNK)):
        kept = [row for row in chunk if row.strip() and not row.startswith(_COMMENT)]
        try:
            options = {"delimiter": mark, "usecols": columns, "comments": None}
            rows = np.loadtxt(kept, ndmin=2, **options) if kept else []
        except ValueError:
            rows = list(chain.from_iterable(map(cells, count(first), chunk)))
        yield np.asarray(rows, np.float64).reshape(-1, len(columns))
        first += len(chunk)


def _fields(line: str, mark: str | None) -> list[str]:
    """Split a line into cells, without quotes."""
    line = " ".join(line.split()) if mark is None else line.strip("\r\n ")
    if '"' in line:
        with suppress(csv.Error):
            reader = csv.reader([line], delimiter=mark or " ", skipinitialspace=True)
            return [cell.strip() for cell in next(reader, [])]
    return [field.strip() for field in line.split(mark)]


def _number(field: str) -> float | None:
    """Parse the number in a cell, with a decimal point or comma.

    Returns NaN for an empty cell and for the texts that programs write for a missing value, and
    None for other text.
    """
    if _NO_VALUE.fullmatch(field):
        return np.nan
    try:
        return None if "_" in field else float(field.replace(",", "."))
    except ValueError:
        return None


def _is_number(field: str) -> bool:
    """Return True if a cell holds a number or a word for a missing value, such as null.

    Returns False if the cell is empty, is "-", or holds other text.
    """
    return field not in ("", "-") and _number(field) is not None


def coordinate_columns(names: Names, columns: Names | None) -> Names:
    """Return the names of the x, y and z columns.

    names: the names of all columns. columns: the three names that the user gives; None searches for
    names such as x, y, z or px, py, pz. Raises ReadError if there are no such columns, if two
    columns share one of these names, or if there are several triples such as px, py, pz.
    """
    wanted, have = tuple(_plain(name) for name in columns or "xyz"), ", ".join(names)
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise ReadError(f"two columns of its header are named {twice[0]!r}: {have}")
    if not (missing := [name for name in wanted if name not in names]):
        return wanted
    if columns:
        raise ReadError(f"has no column {missing[0]!r} (--columns); it has {have}")
    named = [name for name in names if "x" in name and name[0] != "n"]
    triples = [tuple(name.replace("x", axis, 1) for axis in "xyz") for name in named]
    triples = [triple for triple in triples if set(triple) <= set(names)]
    if len(triples) == 1:
        return triples[0]
    if triples:
        have = f"{len(triples)} triples: {'; '.join(map(','.join, triples))}"
    raise ReadError(f"has no columns x, y, z, but {have}; choose with --columns")


def _plain(name: str) -> str:
    """Remove quotes and the unit from a name in a header, and convert it to lower case.

    For example, 'X [m]' becomes 'x'. Bytes that are not UTF-8 are taken as Latin-1.
    """
    name = re.sub(r"\s*[\[(].*[\])]$", "", name.strip().strip("\"'")).lower()
    if name.isprintable():
        return name
    return name.encode("utf-8", "surrogateescape").decode("latin-1")
