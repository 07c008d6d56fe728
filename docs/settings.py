"""Write docs/settings.md, a table of every setting, from src/jepa3d/config.py.

python docs/settings.py
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
override the recipe, the recipe overrides the preset, and the preset overrides the defaults, which
are the paper's settings.
"""


def rows(part: Field, prefix: str) -> Iterator[str]:
    """The table's lines of a setting, or of a group of settings."""
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
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, ""):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """docs/settings.md."""
    head = "| setting | default | presets | allowed | meaning |\n|---|---|---|---|---|"
    text, before = HEAD, set()
    for command, kind in KINDS.items():
        lines = [line for part in fields(kind) for line in rows(part, "")]
        text += f"\n## `jepa3d {command}`\n\n{kind.__doc__.splitlines()[0]}"
        text += " Settings that are not listed are those above." if before else ""
        text += "\n".join(["\n", head, *(line for line in lines if line not in before)]) + "\n"
        before |= set(lines)
    return text


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
