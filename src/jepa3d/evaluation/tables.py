"""Tables of text: printed on a terminal, or written as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

ON_TEST = "selected on TEST"  # marks runs whose epoch was chosen on the test split


class Sheet(NamedTuple):
    """A table whose cells are text, with a title above it and notes below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def mean_std(found: Mapping[str, Any], form: str = ".1f") -> str:
    """Return a mean and std as the text "mean ± std", or as "mean" if the std is None.

    found: a dictionary with "mean" and "std", as `moments` of protocol.py returns it. form: the
    format of both numbers. A + in the format, as in "+.1f", applies to the mean only.
    """
    std = "" if found["std"] is None else f" ± {found['std']:{form.lstrip('+')}}"
    return f"{found['mean']:{form}}{std}"


def show(sheets: Iterable[Sheet]) -> None:
    """Print tables with their notes. Cells are never cut or wrapped, even if a table is wider than
    the terminal.
    """
    for sheet in sheets:
        table = Table(*map(escape, sheet.columns))
        for row in sheet.rows:
            table.add_row(*(Text(cell, "bold red" if cell == ON_TEST else "") for cell in row))
        print(sheet.title)
        width = Console(width=10_000).measure(table).maximum
        Console(width=max(Console().width, width)).print(table)
        print(*sheet.notes, "", sep="\n")


def markdown(sheets: Iterable[Sheet], command: str) -> str:
    """Return tables with their notes as Markdown. The text ends with the command that made them."""

    def line(cells: list[str]) -> str:
        marked = [f"**{cell}**" if cell == ON_TEST else cell for cell in cells]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in marked) + " |"

    lines = []
    for sheet in sheets:
        lines += [f"### {sheet.title}", "", line(sheet.columns)]
        lines += ["|" + "---|" * len(sheet.columns), *map(line, sheet.rows), ""]
        lines += [*(f"- {note}" for note in sheet.notes), ""]
    return "\n".join([*lines, f"Made by `{command}`.", ""])
