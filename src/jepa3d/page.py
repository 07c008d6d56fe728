"""A page in one HTML file: no script, no network, pictures inside; for screens, telephones and
paper.

Every function escapes the texts that it is given and returns HTML; only `section` and `page` take
HTML.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, BinaryIO

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5d6778; --line: #e1e5eb; --pale: #f5f7fa; --blue: #2368b0; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.5;
  font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); }
p { margin: .5rem 0; }
.kind { color: var(--soft); margin: .25rem 0 1.5rem; }
.status { font-size: .8rem; vertical-align: middle; padding: .15rem .6rem; border-radius: 1rem; white-space: nowrap; }
.status, .warning { background: #fdf0d5; color: #7a4b00; }
.status.finished { background: #dff3e4; color: #17603a; }
.warning { border-radius: .5rem; padding: .6rem .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--pale); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; }
.tile span, .note, figcaption, footer { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 4.5rem; }
td:first-child, th:first-child { padding-left: .4rem; overflow-wrap: normal; }
tr.strong td { font-weight: 700; background: #eaf2fb; }
.bar { display: flex; align-items: center; gap: .6rem; min-width: 9rem; }
.bar i { flex: 1; height: .6rem; background: var(--line); border-radius: .3rem; overflow: hidden; }
.bar i::before { content: ""; display: block; height: 100%; width: var(--at); background: var(--blue); }
.bar span { min-width: 3rem; text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figcaption { margin-top: .4rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--blue); }
footer { margin-top: 3rem; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .9rem 2rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  .panorama img { max-width: none; width: 38rem; }
  dd { margin-bottom: .5rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .tile { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


class Bar(float):
    """Per cent, which a table draws as a bar too."""


def show(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def note(text: str, kind: str = "note") -> str:
    """A remark, or a "warning"."""
    return f"<p class='{escape(kind)}'>{escape(text)}</p>"


def tiles(shown: Iterable[tuple[str, str, str]]) -> str:
    """Large figures for the top of a page: a name, a value and a remark each."""
    cells = (
        f"<div class=tile><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>"
        for name, value, remark in shown
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def facts(values: dict[str, Any]) -> str:
    """Names and their values, a line each."""
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(show(v))}</dd>' for k, v in values.items())}</dl>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], strong: str | None = None) -> str:
    """Rows of values below a header; the row that begins with `strong` stands out."""

    def cell(value: Any) -> str:
        if isinstance(value, Bar):
            width = max(0.0, min(100.0, value))
            return f"<div class=bar><i style='--at:{width:.1f}%'></i><span>{value:.1f}</span></div>"
        return escape(show(value))

    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = (
        f"<tr{' class=strong' if row[0] == strong else ''}>"
        + "".join(f"<td>{cell(v)}</td>" for v in row)
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    return f"<div class=wide><table>{head}<tbody>{''.join(lines)}</tbody></table></div>"


def picture(draw: Callable[[BinaryIO], object], caption: str) -> str:
    """The PNG that `draw` writes to a file, embedded in the page."""
    file = io.BytesIO()
    draw(file)
    png, text = file.getvalue(), escape(caption)
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of its header
    shape = "wide panorama" if width > 1.6 * height else "wide"
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f"<img alt='{text}' width={width} height={height} src='{source}'>"
    return f"<figure><div class='{shape}'>{image}</div><figcaption>{text}</figcaption></figure>"


def section(title: str, *parts: str) -> str:
    """A heading and the HTML below it."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def folded(title: str, part: str) -> str:
    """HTML that is hidden until it is unfolded."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"


def page(name: str, status: str, kind: str, parts: Iterable[str]) -> str:
    """The document of HTML parts, empty ones left out."""
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
    """The PNGs of a page, in its order."""
    return [
        base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([\w+/=]+)", html)
    ]
