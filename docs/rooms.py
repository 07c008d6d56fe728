"""Draw docs/rooms.png, which room imports which, from the code; fails where an arrow runs back up.

python docs/rooms.py
"""

import ast
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

SOURCE = Path(__file__).parent.parent / "src" / "jepa3d"
LEVELS = [  # highest first: a file imports from its own room and from lower levels
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
ROOMS = {  # of files that lie beside the rooms' folders
    "cli": ["__main__"],
    "pages": ["demo", "info", "predict", "report"],
    "evaluation": ["figures", "page"],
    "settings": ["config", "validate", "run"],
    "ground": ["allocator", "frame", "locking", "ops", "ops_triton", "plain"],
}


def room_of(name: str) -> str:
    """The room of a file or folder of the package."""
    return next((room for room, files in ROOMS.items() if name in files), name)


def imports() -> dict[str, dict[str, int]]:
    """Importing room -> imported room -> number of imports."""
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
    """Raises ValueError for an import that does not go down, so that there is no circle either."""
    level = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
    for room, others in found.items():
        for other in others:
            if level[other] <= level[room]:
                raise ValueError(f"{room} imports {other}, which is not below it")


def draw(found: dict[str, dict[str, int]], out: Path) -> None:
    """A box a room, with its lines of code; thicker arrows for more imports."""
    place, lines = {}, defaultdict(int)
    for path in SOURCE.rglob("*.py"):
        room = room_of(path.relative_to(SOURCE).parts[0].removesuffix(".py"))
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    for depth, rooms in enumerate(LEVELS):
        for i, room in enumerate(rooms):
            place[room] = (i - (len(rooms) - 1) / 2) * 2.4 + 0.5 * (-1) ** depth, -depth
    figure, axes = plt.subplots(figsize=(8, 9))
    for room, others in found.items():
        for other, count in others.items():
            width, far = 0.4 + count**0.5 / 3, place[room][1] - place[other][1]
            style = {"arrowstyle": "-|>", "lw": width, "color": "#2368b0", "alpha": 0.55}
            bend = f"arc3,rad={0.0 if far <= 1 else 0.12 + 0.06 * far}"
            places = {"xy": place[other], "xytext": place[room]}
            axes.annotate("", **places, arrowprops=style | {"connectionstyle": bend})
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": "#1c2330"}
        axes.text(x, y, f"{room}\n{lines[room]:,} lines", ha="center", va="center", bbox=box)
    axes.set(xlim=(-4, 4), ylim=(-len(LEVELS) + 0.4, 0.6))
    axes.axis("off")
    figure.savefig(out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    check(arrows := imports())
    draw(arrows, Path(__file__).with_suffix(".png"))
