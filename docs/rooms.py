"""Writes docs/rooms.md, a list of all files, and docs/rooms.png, a picture of the imports.

A room is a folder of src/jepa3d, or a group of files beside these folders. docs/rooms.md has the
first sentence of each file, and docs/rooms.png shows which room imports which. An import from a
room that is not below the importing room is an error.

Run it with: python docs/rooms.py
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "jepa3d"
HEAD = """# Where the code is

This page lists the files of `src/jepa3d`, grouped into "rooms". `python docs/rooms.py` writes it
from the first sentence of every file, and draws the picture from the imports. Data flows in one
direction: from files to `PointClouds`, patches, tokens, context and targets, and the loss. A file
imports only from its own room and from the rooms below it.

![rooms and their imports](rooms.png)
"""
LEVELS = [  # the highest level first
    ["cli"],
    ["pages"],
    ["inference"],
    ["training"],
    ["evaluation"],
    ["objectives"],
    ["data", "models"],
    ["settings"],
    ["ground"],
]
ROOMS = {  # room -> files that lie in src/jepa3d instead of a folder
    "cli": ["__main__"],
    "pages": ["demo", "info", "report"],
    "evaluation": ["figures", "page"],
    "settings": ["config", "validate", "run"],
    "ground": ["allocator", "frame", "locking", "ops", "ops_triton", "plain", "shapes"],
}


def room_of(name: str) -> str:
    """Return the room of a file or folder of the package."""
    return next((room for room, files in ROOMS.items() if name in files), name)


def imports() -> dict[str, dict[str, int]]:
    """Count the imports between rooms: importing room -> imported room -> number of imports."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "__init__.py":
            continue
        room = room_of(path.relative_to(SOURCE).parts[0].removesuffix(".py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jepa3d"):
                names = [alias.name for alias in node.names]
                parts = node.module.split(".")[1:2] or names
                for name in parts:
                    if (other := room_of(name)) != room:
                        found[room][other] += 1
    return found


def check(found: dict[str, dict[str, int]]) -> None:
    """Raise ValueError if a room imports one that is not below it, so no imports are circular."""
    level = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
    for room, others in found.items():
        for other in others:
            if level[other] <= level[room]:
                raise ValueError(f"{room} imports {other}, which is not below it")


def draw(found: dict[str, dict[str, int]], out: Path) -> None:
    """Draw a box per room, with its number of lines, and thicker arrows for more imports."""
    import matplotlib.pyplot as plt

    place, lines = {}, defaultdict(int)
    for path in SOURCE.rglob("*.py"):
        room = room_of(path.relative_to(SOURCE).parts[0].removesuffix(".py"))
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    for depth, rooms in enumerate(LEVELS):
        for i, room in enumerate(rooms):
            place[room] = (i - (len(rooms) - 1) / 2) * 4 + 1.6 * (-1) ** depth, -depth
    figure, axes = plt.subplots(figsize=(9, 9))
    for room, others in found.items():
        for other, count in others.items():
            width, far = 0.4 + count**0.5 / 3, place[room][1] - place[other][1]
            style = {
                "arrowstyle": "-|>",
                "lw": width,
                "color": "#2368b0",
                "alpha": 0.55,
                "shrinkA": 20,
                "shrinkB": 20,
            }
            bend = f"arc3,rad={0.0 if far <= 1 else 0.12 + 0.06 * far}"
            places = {"xy": place[other], "xytext": place[room]}
            axes.annotate("", **places, arrowprops=style | {"connectionstyle": bend})
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": "#1c2330"}
        axes.text(x, y, f"{room}\n{lines[room]:,} lines", ha="center", va="center", bbox=box)
    axes.set(xlim=(-5, 5), ylim=(-len(LEVELS) + 0.4, 0.6))
    axes.axis("off")
    figure.savefig(out, dpi=110, bbox_inches="tight")


def page() -> str:
    """Return the text of docs/rooms.md."""
    text, files = HEAD, defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE)
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if said:
            first = re.split(r"(?<=[.?])\s+(?=[A-Z`])", " ".join(said.split("\n\n")[0].split()))[0]
            files[room_of(name.parts[0].removesuffix(".py"))].append((name.as_posix(), first))
    for room in (room for rooms in LEVELS for room in rooms):
        lines = [f"| `{name}` | {first.rstrip('.')} |" for name, first in files[room]]
        text += "\n".join([f"\n## {room}\n", "| file | what it is |", "|---|---|", *lines]) + "\n"
    return text


if __name__ == "__main__":
    check(arrows := imports())
    draw(arrows, Path(__file__).with_suffix(".png"))
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
