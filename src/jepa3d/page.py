"""Builds a report as one HTML file, for screens, phones and print, with embedded pictures; it needs
no scripts and no network.

The functions return pieces of the page and escape the texts that they get. The `part` or `parts` of
`section`, `folded` and `document` are such pieces and are not escaped again.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


class Bar(float):
    """A percentage; `table` shows it as a number and a bar."""


def show(value: Any) -> str:
    """Return a value as text: a float with 6 significant digits, a bool as yes or no, None and ""
    as "-", and a list with commas.
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def note(text: str, kind: str = "note") -> str:
    """Return a paragraph. kind: "note" or "warning", which look different."""
    return f"<p class='{escape(kind)}'>{escape(text)}</p>"


def tiles(shown: Iterable[tuple[str, str, str]]) -> str:
    """Return tiles, which show values in large print. shown: (name, value, remark) of each tile."""
    cells = (
        f"<div class=tile><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>"
        for name, value, remark in shown
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def facts(values: dict[str, Any]) -> str:
    """Return a list with one line per name and value."""
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(show(v))}</dd>' for k, v in values.items())}</dl>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], strong: str | None = None) -> str:
    """Return a table. header: names of the columns; if all names are "", there is no header row.
    strong: rows whose first value is `strong` are emphasised.
    """

    def cell(value: Any) -> str:
        if isinstance(value, Bar):
            width = max(0.0, min(100.0, value))
            return f"<div class=bar><i style='--at:{width:.1f}%'></i><span>{value:.1f}</span></div>"
        return escape(show(value))

    top = "".join(f"<th>{escape(name)}</th>" for name in header)

    def line(row: Sequence[Any]) -> str:
        kind = " class=strong" if row[0] == strong else ""
        return f"<tr{kind}>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>"

    head = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    return f"<div class=wide><table>{head}<tbody>{''.join(map(line, rows))}</tbody></table></div>"


def picture(draw: Callable[[BinaryIO], object], caption: str) -> str:
    """Return a figure with an embedded PNG. draw: a function that writes the PNG to an open file."""
    file = io.BytesIO()
    draw(file)
    png, text = file.getvalue(), escape(caption)
    # the header of a PNG has the width at byte 16 and the height at byte 20, in 4 bytes each
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    shape = "wide panorama" if width > 1.6 * height else "wide"
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f"<img alt='{text}' width={width} height={height} src='{source}'>"
    return f"<figure><div class='{shape}'>{image}</div><figcaption>{text}</figcaption></figure>"


def section(title: str, *parts: str) -> str:
    """Return a section: the heading `title`, and the parts below it."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def folded(title: str, part: str) -> str:
    """Return a title with a part that is hidden until the reader unfolds it."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"


def document(name: str, status: str, kind: str, parts: Iterable[str]) -> str:
    """Return the whole page. Empty parts are skipped.

    name, status: those of the run. kind: what the run is, such as "Classification".
    """
    name, status, kind = escape(name), escape(status), escape(kind)
    return (
        "<!DOCTYPE html>\n<html lang=en>\n<head><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'><title>{name} - {kind}</title>"
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{name} <span class='status {status}'>{status}</span></h1><p class=kind>{kind}</p>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Made by jepa3d; 3D-JEPA is arXiv 2409.15803.</footer>\n</main></body>\n</html>\n"
    )


def pictures(html: str) -> list[bytes]:
    """Return the PNGs of a page, in the order in which the page shows them."""
    found = re.findall(r"data:image/png;base64,([\w+/=]+)", html)
    return [base64.b64decode(text) for text in found]
