"""Read published results from published.yaml, and list how a run's protocol differs from theirs.

Published accuracies after fine-tuning are those of the epoch with the highest *test* accuracy, as
is usual in the field.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jepa3d.evaluation.tables import Sheet

SOURCE = "sources: 3D-JEPA: arXiv 2409.15803v1; other methods: their papers"
BEST_TEST = "best test epoch"
CAUTION = (
    "all these methods chose their epoch on the test split; if published models are retrained and "
    "their epoch is chosen on a held-out validation set, they lose 0.4 to 3.4 points "
    "(Point-MAE 89.33 -> 85.89 on OBJ_BG)"
)


class Benchmark(NamedTuple):
    """Published results under one protocol.

    A row has the method, its number of epochs, whether it votes (averages its predictions over
    several copies of a test shape), and one value per metric.
    """

    title: str
    rows: list[list[str]]
    metrics: list[str]
    selection: str  # how the epoch was chosen
    notes: list[str]
    test: int | None  # number of test shapes; None: any number
    num_points: int | None  # points per shape; None: any number


def _read(file: Path) -> dict[str, Benchmark]:
    """Read the benchmarks of a YAML file; returns key -> benchmark. The comments of published.yaml
    explain the form of such a file.
    """
    found = {}
    for table in yaml.safe_load(file.read_text(encoding="utf-8")):
        metrics = table.get("metrics", ["overall_accuracy"])
        selection = table.get("selection", BEST_TEST)
        cells = [[cell.strip() for cell in row.split("|")] for row in table["rows"]]
        for i, (key, about) in enumerate(table["benchmarks"].items()):
            # the first three cells of a row are method, epochs and voting
            at = 3 + i * len(metrics)
            rows = [row[:3] + row[at : at + len(metrics)] for row in cells]
            test, notes = about.get("test"), [*table.get("notes", [])]
            if error := about.get("standard_error"):
                what = f"standard error with {test:,} test shapes"
                notes.append(f"{what}: about {error} percentage points")
            notes += [CAUTION] * (selection == BEST_TEST)
            known = metrics, selection, notes, test, table.get("num_points")
            found[key] = Benchmark(about["title"], rows, *known)
    return found


PUBLISHED = _read(Path(__file__).with_suffix(".yaml"))


def benchmark_of(result: dict[str, Any]) -> str | None:
    """Return the key in PUBLISHED of the benchmark on which a result was measured; None if it was
    measured on other data.

    A benchmark is recognised by the variant of the data, such as "ScanObjectNN obj_bg", or else by
    the name of the data.
    """
    task, data = result["task"], result["data"]
    for key in ("variant", "name"):
        text = re.sub(r"[^a-z0-9]", "", str(data.get(key) or "").lower())
        if task == "classify" and (key == "variant" or "scanobjectnn" in text):
            for split in ("obj_bg", "obj_only", "pb_t50_rs"):
                # `endswith` and not `in`, since pb_t50_rs_nobg is a different variant
                if text.endswith(split.replace("_", "")):
                    return split
        if task == "classify" and "modelnet" in text and data.get("classes") == 40:
            return "modelnet40"
        # the published folds are a benchmark; episodes sampled from ModelNet40 are not
        if task == "fewshot" and re.search(r"modelnet(40)?few", text):
            size = re.search(r"(\d+)-way (\d+)-shot", result["protocol"])
            known = f"{size[1]}w{size[2]}s" if size else ""
            return known if known in PUBLISHED else None
        if task == "segment" and "shapenetpart" in text:
            return "shapenetpart"
    return None


def departures(result: dict[str, Any], benchmark: Benchmark) -> list[str]:
    """Return one text for each difference between a result's protocol and the published one."""
    data, settings, protocol = result["data"], result["settings"], result["protocol"]
    trained, share = settings.get("trained"), data.get("labels") or 1
    found = []
    if benchmark.test not in (None, data.get("test")):
        found.append(f"{data.get('test') or 0:,} test shapes, not {benchmark.test:,}")
    points = benchmark.num_points
    if points not in (None, settings.get("num_points", points)):
        found.append(f"{settings['num_points']:,} points, not {points:,}")
    if share != 1:
        found.append(f"{100 * share:g} % of the labels")
    if trained == "head" or "frozen" in protocol or "head only" in protocol:
        found.append("frozen encoder")
    if trained == "head_first":
        found.append("a linear head, fitted first")
    folds = len((result.get("details") or {}).get("folds", ()))
    if result["task"] == "fewshot" and folds != 10:
        found.append(f"{folds} folds, not 10")
    return found


def published_sheet(benchmark: Benchmark, results: Iterable[dict[str, Any]] = ()) -> Sheet:
    """Return the table of a benchmark. If `results` of the user's runs are given, the notes of the
    table say how their protocol differs from the published one.
    """
    results, notes = list(results), list(benchmark.notes)
    if results:
        votes = sorted({"yes" if result["votes"] > 1 else "no" for result in results})
        rules = " and ".join(sorted({result["selection"] for result in results}))
        what = f"voting {' and '.join(votes)}, selection {rules}"
        notes.append(f"your runs: {what}; compare only with rows of the same voting and selection")
    found = [text for result in results for text in departures(result, benchmark)]
    if found:
        listed = "; ".join(dict.fromkeys(found))
        notes.append(f"NOTE: your runs depart from the published protocol: {listed}")
    rows = [
        [method, epochs, *values, voting, benchmark.selection]
        for method, epochs, voting, *values in benchmark.rows
    ]
    columns = ["method", "epochs", *benchmark.metrics, "voting", "selection"]
    title = f"published: {benchmark.title}, per cent"
    return Sheet(title, columns, rows, [*notes, SOURCE])
