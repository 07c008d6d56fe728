"""Writes docs/settings.md, tables of all settings, from src/jepa3d/config.py.

Run it with: python docs/settings.py
"""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from jepa3d.config import KINDS

HEAD = """# Settings

This page lists every setting of `jepa3d pretrain`, `classify`, `segment` and `fewshot`.
`python docs/settings.py` writes it from `src/jepa3d/config.py`. On the command line
`encoder.embed_dim` is `--encoder.embed-dim`; in a recipe it is `embed_dim` below `encoder`. Flags
override the recipe, the recipe overrides the preset, and the preset overrides the defaults. The
defaults of `jepa3d pretrain` are the paper's settings.

A range such as `[0, 1)` contains its lower end, but not its upper end. A setting with two numbers
that is marked "rising" must have the lower number first. A dash means that there is no value.
"""


def rows(part: Field, prefix: str) -> Iterator[str]:
    """Yield the table's line for a setting, or the lines for a group of settings."""
    if is_dataclass(part.type):
        for inner in fields(part.type):
            yield from rows(inner, f"{part.name}.")
        return
    said = part.metadata
    presets = "; ".join(f"{name}: {shown(value)}" for name, value in said["presets"].items())
    literal = str(part.type).partition("Literal[")[2].partition("]")[0]
    allowed = said["range"] or literal.replace("'", "")
    words = [f"`{prefix}{part.name}`", shown(part.default), presets, allowed, said["doc"]]
    yield f"| {' | '.join(words)} |"


def shown(value: Any) -> str:
    """Return a value as the page shows it."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, ""):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """Return the text of docs/settings.md."""
    head = "| setting | default | presets | allowed | meaning |\n|---|---|---|---|---|"
    text, base, known = HEAD, "", set()
    for command, kind in KINDS.items():
        lines = [line for part in fields(kind) for line in rows(part, "")]
        text += f"\n## `jepa3d {command}`\n\n{kind.__doc__.splitlines()[0]}"
        text += f" All other settings are as for `jepa3d {base}`." if base else ""
        text += "\n".join(["\n", head, *(line for line in lines if line not in known)]) + "\n"
        if command != "segment":  # its defaults are not those of fewshot
            base, known = command, set(lines)
    return text


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
