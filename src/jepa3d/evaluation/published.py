"""Published figures to hold one's own against, each with its protocol, so that unlike is not
compared with like.

3D-JEPA's are those of arXiv 2409.15803v1, the others' those of their papers, digit by digit.
Fine-tuned figures are those of the best *test* epoch, as the field reports them. Voting: that of
ScanObjectNN is "no"; on ModelNet40 it is "yes" or "no" only where that is said, and the paper does
not say.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

SOURCE = "source: 3D-JEPA: arXiv 2409.15803v1; the others: their papers"
BEST_TEST = "best test epoch"
ON_TEST = "selected on TEST"  # the mark of one's own runs that did the same
CAUTION = (
    "all of them chose their epoch on the test part; retrained with a held-out validation set, published models lose "
    "0.4-3.4 points (Point-MAE 89.33 -> 85.89 on OBJ_BG)"
)


class Sheet(NamedTuple):
    """A table of text, to be printed or written as Markdown."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


class Figure(NamedTuple):
    """A row: what a method reached, as printed, a value a metric of its benchmark."""

    method: str
    epochs: int | None  # None: not stated
    values: tuple[str, ...]
    voting: str  # yes, no or not stated


class Benchmark(NamedTuple):
    """Figures of one protocol."""

    title: str
    figures: list[Figure]
    metrics: tuple[str, ...] = ("overall_accuracy",)
    selection: str = BEST_TEST
    test: int | None = None  # shapes
    num_points: int | None = None
    notes: tuple[str, ...] = ()


# Method, epochs, OBJ_BG, OBJ_ONLY, PB_T50_RS, and ModelNet40 by voting.
_CLASSIFY: list[tuple[str, int, tuple[str, str, str], dict[str, str]]] = [
    ("Transformer, from scratch", 300, ("83.04", "84.06", "79.11"), {"not stated": "91.4"}),
    ("Point-BERT", 300, ("87.43", "88.12", "83.07"), {"yes": "93.2"}),
    ("Point-MAE", 300, ("90.02", "88.29", "85.18"), {"yes": "93.8"}),
    ("Point-M2AE", 300, ("91.22", "88.81", "86.43"), {"yes": "94.0"}),
    ("point2vec", 800, ("91.2", "90.4", "87.5"), {"no": "94.7", "yes": "94.8"}),
    ("Point-JEPA", 500, ("92.9 ± 0.4", "90.1 ± 0.2", "86.6 ± 0.3"), {"not stated": "93.8 ± 0.2"}),
    ("ACT", 300, ("93.29", "91.91", "88.21"), {"not stated": "93.7"}),
    ("3D-JEPA", 150, ("93.80", "92.77", "88.65"), {"not stated": "93.8"}),
    ("3D-JEPA", 300, ("94.49", "93.63", "89.52"), {"not stated": "94.0"}),
    ("PCP-MAE", 300, ("95.52", "94.32", "90.35"), {"not stated": "94.1"}),
]
# Method, epochs, mean ± std over the ten folds of 5w10s, 5w20s, 10w10s, 10w20s.
_FEWSHOT: list[tuple[str, int | None, tuple[str, ...]]] = [
    ("Transformer", None, ("87.8 ± 5.2", "93.3 ± 4.3", "84.6 ± 5.5", "89.4 ± 6.3")),
    ("Point-MAE", None, ("96.3 ± 2.5", "97.8 ± 1.8", "92.6 ± 4.1", "95.0 ± 3.0")),
    ("Point-JEPA", None, ("97.4 ± 2.2", "99.2 ± 0.8", "95.0 ± 3.6", "96.4 ± 2.7")),
    ("3D-JEPA", 150, ("97.6 ± 2.0", "98.8 ± 0.4", "94.3 ± 3.6", "96.3 ± 2.4")),
]
# Method, epochs, category and instance mIoU.
_PARTS = [
    ("Transformer", None, "83.42", "85.10"),
    ("Point-MAE", None, "-", "86.1"),
    ("ACT", None, "84.66", "86.14"),
    ("Point-M2AE", None, "84.86", "86.51"),
    ("3D-JEPA", 150, "84.73", "86.28"),
    ("3D-JEPA", 300, "84.93", "86.41"),
]
_ABLATIONS = {
    "Table IV, sampler (ScanObjectNN OBJ_ONLY)": [
        ("random, mask ratio 0.25", "91.91"),
        ("one block, mask ratio 0.25", "91.57"),
        ("multi-block, 3 targets", "93.35"),
        ("multi-block, 4 targets", "93.63"),
    ],
    "Table V, decoder (ScanObjectNN OBJ_ONLY)": [
        ("depth 2, no cross-attention", "93.12"),
        ("context-aware, depth 0", "92.77"),
        ("context-aware, depth 2", "93.63"),
        ("context-aware, depth 4", "93.29"),
    ],
}
_SVM = [
    ("Point-BERT", "87.4"),
    ("Point-MAE", "91.0"),
    ("Point-M2AE", "92.87"),
    ("Point-JEPA", "93.7 ± 0.2"),
]


def _scanobjectnn(column: int, test: int, error: str) -> Benchmark:
    name = ("OBJ_BG", "OBJ_ONLY", "PB_T50_RS")[column]
    figures = [Figure(row[0], row[1], (row[2][column],), "no") for row in _CLASSIFY]
    notes = (f"standard error of {test:,} test shapes: about {error} points", CAUTION)
    return Benchmark(f"ScanObjectNN {name}", figures, test=test, num_points=2048, notes=notes)


PUBLISHED = {
    "obj_bg": _scanobjectnn(0, 581, "1.0"),
    "obj_only": _scanobjectnn(1, 581, "1.0"),
    "pb_t50_rs": _scanobjectnn(2, 2882, "0.6"),
    "modelnet40": Benchmark(
        "ModelNet40, 1,024 points",
        [
            Figure(row[0], row[1], (value,), voting)
            for row in _CLASSIFY
            for voting, value in row[3].items()
        ],
        test=2468,
        num_points=1024,
        notes=("a figure with voting and one without are not comparable", CAUTION),
    ),
    **{
        f"{ways}w{shots}s": Benchmark(
            f"ModelNet40 few-shot, {ways}-way {shots}-shot, mean ± std over the 10 published folds",
            [Figure(row[0], row[1], (row[2][column],), "not stated") for row in _FEWSHOT],
            notes=(CAUTION,),
        )
        for column, (ways, shots) in enumerate([(5, 10), (5, 20), (10, 10), (10, 20)])
    },
    "shapenetpart": Benchmark(
        "ShapeNetPart",
        [Figure(row[0], row[1], row[2:], "not stated") for row in _PARTS],
        ("category_miou", "instance_miou"),
        test=2874,
        num_points=2048,
        notes=(CAUTION,),
    ),
}
# Of the paper's settings and of frozen features: no run of one's own is recognised as one of these.
OTHERS = [
    *(
        Benchmark(
            title,
            [Figure(f"3D-JEPA, {name}", None, (value,), "no") for name, value in rows],
            notes=(note,),
        )
        for (title, rows), note in zip(
            _ABLATIONS.items(),
            (CAUTION, "3 of 581 shapes are 0.51 points; " + CAUTION),
            strict=True,
        )
    ),
    Benchmark(
        "ModelNet40, linear SVM on frozen features",
        [Figure(name, None, (value,), "not stated") for name, value in _SVM],
        selection="not stated",
        notes=(
            "SVC(linear, C=0.012) and LinearSVC are different protocols: jepa3d probe has both",
        ),
    ),
]


def benchmark_of(result: dict[str, Any]) -> str | None:
    """The key in PUBLISHED of what a result was measured on, by its data's variant, else its name;
    or None.
    """
    task, data = result["task"], result["data"]
    variant, name = (
        re.sub(r"[^a-z0-9]", "", str(data.get(key) or "").lower()) for key in ("variant", "name")
    )
    for text, bare in ((variant, True), (name, False)):
        if task == "classify" and (bare or "scanobjectnn" in text):
            for key in ("obj_bg", "obj_only", "pb_t50_rs"):
                if text.endswith(key.replace("_", "")):  # pb_t50_rs_nobg is another
                    return key
        if task == "classify" and "modelnet" in text and data.get("classes") == 40:
            return "modelnet40"
        if task == "fewshot" and re.search(
            r"modelnet(40)?few", text
        ):  # the folds; episodes drawn here are others
            asked = re.search(r"(\d+)-way (\d+)-shot", result["protocol"])
            key = f"{asked[1]}w{asked[2]}s" if asked else ""
            return key if key in PUBLISHED else None
        if task == "segment" and "shapenetpart" in text:
            return "shapenetpart"
    return None


def departures(result: dict[str, Any], benchmark: Benchmark) -> list[str]:
    """In what a result's protocol is not that of the published figures, in words."""
    data, settings, found = result["data"], result["settings"], []
    if benchmark.test not in (None, data.get("test")):
        found.append(f"{data.get('test') or 0:,} test shapes, not {benchmark.test:,}")
    if benchmark.num_points not in (None, settings.get("num_points", benchmark.num_points)):
        found.append(f"{settings['num_points']:,} points, not {benchmark.num_points:,}")
    if (share := data.get("labels") or 1) != 1:
        found.append(f"{100 * share:g} % of the labels")
    if (
        settings.get("trained") == "head"
        or "frozen" in result["protocol"]
        or "head only" in result["protocol"]
    ):
        found.append("frozen encoder")
    if settings.get("trained") == "head_first":
        found.append("a linear head, fitted first")
    if (
        result["task"] == "fewshot"
        and (folds := len((result.get("details") or {}).get("folds", ()))) != 10
    ):
        found.append(f"{folds} folds, not 10")
    return found


def published_sheet(benchmark: Benchmark, results: Iterable[dict[str, Any]] = ()) -> Sheet:
    """Its figures, with what to heed when comparing one's own `results` with them."""
    results, notes = list(results), list(benchmark.notes)
    if results:
        votes = sorted({"yes" if result["votes"] > 1 else "no" for result in results})
        rules = sorted({result["selection"] for result in results})
        notes.append(
            f"your runs: voting {' and '.join(votes)}, selection {' and '.join(rules)}; compare like with like"
        )
        others = dict.fromkeys(text for result in results for text in departures(result, benchmark))
        notes += (
            [f"NOTE: your runs depart from the published protocol: {'; '.join(others)}"]
            if others
            else []
        )
    rows = [
        [
            row.method,
            "-" if row.epochs is None else str(row.epochs),
            *row.values,
            row.voting,
            benchmark.selection,
        ]
        for row in benchmark.figures
    ]
    columns = ["method", "epochs", *benchmark.metrics, "voting", "selection"]
    return Sheet(f"published: {benchmark.title}, per cent", columns, rows, [*notes, SOURCE])


def all_published() -> list[Sheet]:
    """Every published table."""
    return [published_sheet(benchmark) for benchmark in (*PUBLISHED.values(), *OTHERS)]


# ------------------------------------------------------------------------------------------ showing


def show(sheets: list[Sheet]) -> None:
    """Print tables with their notes."""
    console, wide = Console(), Console(width=10_000)  # no cell is cut or wrapped
    for sheet in sheets:
        table = Table(*map(escape, sheet.columns))
        for row in sheet.rows:
            table.add_row(*(Text(cell, "bold red" if cell == ON_TEST else "") for cell in row))
        print(sheet.title)
        Console(width=max(console.width, wide.measure(table).maximum)).print(table)
        print("\n".join(sheet.notes), end="\n\n" if sheet.notes else "\n")


def markdown(sheets: list[Sheet], command: str) -> str:
    """Tables with their notes, and the command that makes them again."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = []
    for sheet in sheets:
        rows = [[f"**{cell}**" if cell == ON_TEST else cell for cell in row] for row in sheet.rows]
        lines += [f"### {sheet.title}", "", line(sheet.columns), "|" + "---|" * len(sheet.columns)]
        lines += [*map(line, rows), "", *(f"- {note}" for note in sheet.notes), ""]
    return "\n".join([*lines, f"Made by `{command}`.", ""])
