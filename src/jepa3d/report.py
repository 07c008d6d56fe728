"""`jepa3d report`: a run as one HTML file that needs nothing else; every text is escaped, every
picture inside.
"""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from jepa3d import figures
from jepa3d.config import FewshotConfig, FinetuneConfig, PretrainConfig, SegmentConfig
from jepa3d.data.cloud import UNLABELLED
from jepa3d.data.datasets import load
from jepa3d.data.errors import as_read_error
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled
from jepa3d.models.ready import load_network
from jepa3d.models.teacher import load_module
from jepa3d.page import (
    Bar,
    facts,
    folded,
    note,
    page,
    picture,
    pictures,
    section,
    show,
    table,
    tiles,
)
from jepa3d.plain import differences, from_dict, read_checked, to_dict, write_bytes
from jepa3d.run import Run
from jepa3d.training import checkpoint

KINDS = {
    "jepa": "3D-JEPA pretraining",
    "generative": "Masked autoencoder pretraining",
    "invariance": "Invariance pretraining",
    "dvae": "dVAE, stage I",
    "classify": "Classification",
    "segment": "Part segmentation",
    "fewshot": "Few-shot classification",
}
DEFAULTS = {"classify": FinetuneConfig(), "segment": SegmentConfig(), "fewshot": FewshotConfig()}
SELECTION = {
    "validation": "the epoch was chosen on validation; the test part was used once",
    "last epoch": "the last epoch; nothing was chosen",
    "best on test": "the epoch was chosen on the test part",
    "none": "nothing was chosen",
}
MOST_TSNE, MOST_PARTS = 2000, 8  # shapes in these pictures


def report(
    run: Path, data: str | None = None, out: Path | None = None, figures_to: Path | None = None
) -> Path:
    """Write the report of a run to `out`, RUN/report.html by default, whole or not at all; returns
    where.

    Its pictures go to the folder `figures_to` too, where given, as PNG files in the page's order.

    `data` is where the run's data lies now. Pictures that need data which cannot be read are left
    out, and the page says why; a `data` that cannot be read is a ValueError, as are a folder that
    is no run and a place that cannot be.
    """
    for name in ("config.json", "run.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run}: not a run folder, it has no {name}")
    out = out or run / "report.html"
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"{out}: --out names an .html file in a folder that exists")
    html = render(run, data)
    write_bytes(out, html.encode())
    if figures_to:
        figures_to.mkdir(parents=True, exist_ok=True)
        for i, png in enumerate(pictures(html), 1):
            write_bytes(figures_to / f"figure-{i}.png", png)
    return out


def render(run: Path, data: str | None = None) -> str:
    """The page of a run (see `report`)."""
    config, record = Run(run).config, Run(run).record
    kind = config.get("task") or config["objective"]
    if kind in DEFAULTS:
        result = read_checked(found) if (found := run / "results.json").is_file() else None
        parts = [*_outcome(run, config, result, data), _training(run, config)]
    else:
        parts = [_last_step(run, record), *_probes(run), _training(run, config), _collapse(run)]
        parts += [_blocks(config, data), _departures(record)]
    parts += [_provenance(run, config, record), _settings(config, record)]
    return page(run.resolve().name, record["status"], KINDS[kind], parts)


# ---------------------------------------------------------------------------------- downstream runs
def _outcome(run: Path, config: dict, result: dict | None, data: str | None) -> list[str]:
    """Numbers and how they were come by, details, and pictures of what was predicted."""
    if result is None:
        return [section("Result", note("There is no result yet."))]
    details, done = result["details"], [_result(result)]
    if folds := details.get("folds"):
        rows = [[i, Bar(score)] for i, score in enumerate(folds)]
        done.append(section("Folds", table(["fold", "overall accuracy, %"], rows)))
    if "per_category" in details:
        rows = [
            [name, Bar(value)]
            for name, value in details["per_category"].items()
            if value is not None
        ]
        done.append(section("Categories", table(["category", "mIoU, %"], rows)))
    if "per_class" in details:
        done.append(_classes(details))
    if config["task"] == "segment":
        done.append(section("True and predicted parts", _parts(run, details["class_names"])))
    if config["task"] == "classify":
        done.append(
            section("Features before and after fine-tuning", _tsne(run, config, details, data))
        )
    return done


def _result(result: dict) -> str:
    source, metrics = result["data"], dict(result["metrics"])
    spread, shown = metrics.pop("std_over_folds", None), []
    for name, value in metrics.items():
        remark = f"{source['test']:,} test shapes"
        if spread is not None:
            remark = f"± {spread:.1f}, standard deviation over folds"
        elif name == "overall_accuracy" and source["test"]:
            remark += f", standard error {math.sqrt(value * (100 - value) / source['test']):.1f}"
        held = (result["validation"] or {}).get(name)
        remark += "" if held is None else f"; validation {held:.1f} %"
        shown.append((name.replace("_", " ").replace("miou", "mIoU"), f"{value:.1f} %", remark))
    before = dict(result["pretraining"] or {})
    if isinstance(before.get("data"), dict):
        before["data"] = before["data"]["name"]
    told = [
        f"{key} {show(before[key])}"
        for key in ("objective", "teacher", "data", "seed")
        if key in before
    ]
    rows = {
        "protocol": result["protocol"],
        "selection": SELECTION.get(result["selection"], result["selection"]),
        "encoder from": result["init"],
        "pretrained by": "; ".join(told),
        "data": source["name"] + (f", {source['variant']}" if source.get("variant") else ""),
        "classes": source["classes"],
        "shapes": ", ".join(
            f"{source[part] or 0:,} {part}" for part in ("train", "validation", "test")
        ),
        "labelled part of train": f"{100 * source['labels']:.4g} %",
        "seed": result["seed"],
        "votes": result["votes"],
    }
    text = "The epoch was chosen on the test part: compare only with published numbers chosen the same way."
    warning = note(text, "warning") if result["selection"] == "best on test" else ""
    return section("Result", tiles(shown), warning, facts(rows))


def _classes(details: dict) -> str:
    """Accuracy by class, what is taken for what, and the whole confusion matrix."""
    rows = [
        [name, row["count"], Bar(row["accuracy"])] for name, row in details["per_class"].items()
    ]
    names, confusion = details["class_names"], np.asarray(details["confusion"])
    wrong = confusion * (1 - np.eye(len(names), dtype=int))
    worst = [divmod(int(at), len(names)) for at in np.argsort(-wrong, axis=None, kind="stable")[:5]]
    mistakes = [
        [
            names[true],
            names[given],
            wrong[true, given],
            f"{100 * wrong[true, given] / confusion[true].sum():.0f} %",
        ]
        for true, given in worst
        if wrong[true, given]
    ]
    return section(
        "Classes",
        table(["class", "test shapes", "accuracy, %"], rows),
        table(["most frequent mistakes", "taken for", "shapes", "of its class"], mistakes)
        if mistakes
        else "",
        picture(
            partial(figures.draw_confusion, confusion, names),
            "Confusion matrix of the test part. Rows are true classes; numbers are shapes, the colour is their share "
            "of the row.",
        ),
    )


def _predictions(run: Path) -> dict[str, np.ndarray]:
    """The arrays of RUN/predictions.npz. Raises ReadError where it is missing or damaged."""
    file = run / "predictions.npz"
    with as_read_error(file), np.load(file, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def _parts(run: Path, names: list[str]) -> str:
    saved = _predictions(run)
    points, truth, predicted, labels = (
        saved[name] for name in ("points", "parts", "predicted", "label")
    )
    nth = np.zeros(len(labels), int)  # 0 for the first of each category, 1 for the second, …
    for label in np.unique(labels):
        nth[labels == label] = np.arange((labels == label).sum())
    order = np.lexsort((labels, nth))
    first = order[: max((nth == 0).sum(), MOST_PARTS)]
    rows = first[_spread(len(first), MOST_PARTS)]
    titles = [names[labels[row]] for row in rows]
    right = [100 * (predicted[row] == truth[row])[truth[row] != UNLABELLED].mean() for row in rows]
    told = ", ".join(f"{name} {share:.0f} %" for name, share in zip(titles, right, strict=True))
    return picture(
        partial(figures.draw_parts, points[rows], truth[rows], predicted[rows], titles),
        f"The paper's figure 6: the first test shapes of each category, or of {MOST_PARTS} evenly spread categories, "
        f"not chosen for their looks. Points given their true part: {told}.",
    )


def _tsne(run: Path, config: dict, details: dict, data: str | None) -> str:
    """The picture, or why it is left out."""
    try:
        before, after, labels = _test_features(run, config, data or config["data"])
    except (ValueError, OSError) as error:
        if data:
            raise
        return note(f"Left out: {error}. Where the data is now: --data.")
    if len(labels) < 5:
        return note(f"Left out: {len(labels)} test shapes are too few.")
    return picture(
        partial(figures.draw_tsne, before, after, labels, details["class_names"]),
        f"The paper's figure 7: t-SNE of the pooled features of {len(labels):,} test shapes, before the first step "
        "and in the fine-tuned network. Distances between groups and their sizes mean nothing in it.",
    )


def _test_features(run: Path, config: dict, data: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled features n E of the test part in RUN/start and RUN/model, and labels n as the run
    numbers them.
    """
    for folder in (run / "start", run / "model"):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    start, network = load_module(str(run / "start")), load_network(run)
    settings = from_dict(
        FinetuneConfig, {k: v for k, v in config.items() if k != "task"} | {"data": data}
    )
    shapes = Labelled.load(settings, network.encoder.num_points).test
    labels = shapes.labels
    assert labels is not None
    if not np.array_equal(labels, _predictions(run)["label"]):
        raise ValueError(f"{shapes.name}: its test part is not what the run was tested on")
    rows = _spread(len(labels), MOST_TSNE)
    before, after = (
        layer_features(model, shapes.subset(rows))[-1] for model in (start, network.encoder)
    )
    return before, after, labels[rows]


# --------------------------------------------------------------------------------- pretraining runs
def _last_step(run: Path, record: dict) -> str:
    if not (lines := Run(run).metrics):
        return ""
    last = lines[-1]
    beside = {"best constant": "constant_loss", "position alone": "position_loss"}
    remark = ", ".join(
        f"{words} {last[name]:.3f}" for words, name in beside.items() if name in last
    )
    shown = [
        ("loss", f"{last['loss']:.3g}", remark),
        ("steps", f"{last['step']:,}", f"{last['epoch']:.1f} epochs"),
        ("shapes", f"{record['data']['shapes']:,}", record["data"]["name"]),
    ]
    for name, words in (("encoded_rankme", "effective rank"), ("perplexity", "code perplexity")):
        if name in last:
            shown.append(
                (
                    words,
                    f"{last[name]:.1f}",
                    "of the encoder's tokens" if name == "encoded_rankme" else "",
                )
            )
    return tiles(shown)


def _probes(run: Path) -> Iterable[str]:
    """A table for every probe-*.json."""
    for path in sorted(run.glob("probe-*.json")):
        probe = read_checked(path)
        data, summary = probe["data"], probe["summary"]
        protocols, part = list(next(iter(summary.values()))), data.get("part", "test")
        rows = []
        for model, scores in summary.items():
            name, sign = ("pretrained - untrained", "+") if model == "gain" else (model, "")
            spreads = [
                "" if scores[p]["std"] is None else f" ± {scores[p]['std']:.1f}" for p in protocols
            ]
            rows.append(
                [
                    name,
                    *(
                        f"{scores[p]['mean']:{sign}.1f}{s}"
                        for p, s in zip(protocols, spreads, strict=True)
                    ),
                ]
            )
        told = (
            f"Overall accuracy in per cent on {data['test']:,} {part} shapes of {data['classes']} classes, "
            f"{data['train']:,} train; {probe['pooling']} pooling, layer {probe['layer']}, "
            f"seeds {show(probe['seeds'])}. Selection: {probe['selection']}."
        )
        if probe.get("seen_in_pretraining"):
            told += f" The {part} part was among the (unlabelled) pretraining data."
        labels = "" if data["labels"] == "labels" else f", {data['labels']}"
        title = f"Frozen features on {data['name']}{labels}"
        yield section(title, table(["", *protocols], rows, strong="pretrained"), note(told))


def _collapse(run: Path) -> str:
    """Is the loss worth anything? The last step's figures beside what is healthy (docs/method.md)."""
    last = (Run(run).metrics or [{}])[-1]
    names = {
        "prediction": "predictions",
        "target": "targets",
        "embedding": "embeddings",
        "encoded": "encoder's tokens",
    }
    rows = [
        [words, *(f"{last[f'{name}_{figure}']:.3g}" for figure in ("std", "cosine", "rankme"))]
        for name, words in names.items()
        if f"{name}_std" in last
    ]
    if not rows:
        return ""
    told = "Of vectors at unit length. Healthy: std near 1, cosine near 0, rank in the tens. Collapsed: 0, 1 and 1."
    if "constant_loss" in last:
        told += " A loss that is not well below that of the best constant, and of position alone, says little."
    return section(
        "Collapse", table(["last step", "std", "mean cosine", "effective rank"], rows), note(told)
    )


def _blocks(config: dict, data: str | None) -> str:
    """The paper's figure 4, or why it is left out."""
    if config["objective"] != "jepa":
        return ""
    try:
        settings = from_dict(PretrainConfig, config)
        sources = [data] if data else list(settings.data)
        clouds = load(
            sources, settings.encoder.num_points, settings.split, settings.up_axis[: len(sources)]
        )
        body = picture(
            partial(figures.draw_blocks, clouds, settings),
            f"The paper's figure 4 on four shapes of {clouds.name}: what the encoder sees (blue) and what it has to "
            "predict (red), drawn as in training.",
        )
    except (ValueError, OSError) as error:
        if data:
            raise
        body = note(f"Left out: {error}. Where the data is now: --data.")
    return section("Sampled blocks", body)


def _departures(record: dict) -> str:
    rows = [[name, ours, paper] for name, (ours, paper) in record.get("departures", {}).items()]
    body = (
        table(["setting", "here", "paper"], rows)
        if rows
        else note("None: these are the paper's settings.")
    )
    return section("Departures from the paper", body)


# ---------------------------------------------------------------------------------------- every run
def _training(run: Path, config: dict) -> str:
    """Curves of the run and of its stage I."""
    selected = (
        "test, by which the epoch is chosen"
        if config.get("select") == "best-on-test"
        else "validation"
    )
    selected += ", instance mIoU" if config.get("task") == "segment" else ", overall accuracy"
    draw = (
        partial(figures.draw_supervised, selected=selected)
        if config.get("task")
        else figures.draw_curves
    )
    runs = {
        "By optimiser step.": run,
        "Fold 0, by optimiser step.": run / "fold-0",
    }  # a few-shot run's folds are runs
    runs |= {
        f"Stage I, {stage.name}, by optimiser step.": stage
        for stage in sorted(run.glob("stage1/*"))
    }
    logged = {caption: folder for caption, folder in runs.items() if Run(folder).metrics}
    pictures = [picture(partial(draw, folder), caption) for caption, folder in logged.items()]
    return section("Training", *(pictures or [note("No step has been logged.")]))


def _provenance(run: Path, config: dict, record: dict) -> str:
    data, cost = record["data"], record.get("cost")
    if cost is None and (newest := checkpoint.latest(run / "checkpoints")):
        cost = read_checked(newest / "state.json")
    rows = {
        "command": record["command"],
        "data": f"{data['name']}, {data['shapes']:,} shapes" if "shapes" in data else data["name"],
        "sha256 of the data": data["fingerprint"],
        "seed": config["seed"],
    }
    if sizes := record.get("parameters"):
        rows["parameters"] = ", ".join(
            f"{name} {count / 1e6:.2f} M" for name, count in sizes.items()
        )
    if cost:
        units = {
            "step": (1, ",.0f", "steps"),
            "cpu_seconds": (60, ".1f", "CPU-minutes"),
            "wall_seconds": (60, ".1f", "minutes"),
            "peak_memory": (2**30, ".2f", "GiB of memory at the peak"),
            "stage1_cpu_seconds": (60, ".1f", "CPU-minutes before that: stage I, cached targets"),
        }
        spent = [
            f"{cost[key] / by:{form}} {unit}"
            for key, (by, form, unit) in units.items()
            if cost.get(key)
        ]
        rows["cost"] = ", ".join(spent)
    versions = record["versions"] | {"python": record["python"]}
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return section(
        "Provenance", facts(rows | {"commit": record["commit"], "machine": record["machine"]})
    )


def _settings(config: dict, record: dict) -> str:
    """What differs from the defaults; all settings folded away."""
    chosen = {name: value for name, value in config.items() if name != "task"}
    changed = differences(chosen, to_dict(DEFAULTS.get(config.get("task", ""), PretrainConfig())))
    told = "Settings that are not the defaults."
    if "departures" in record:
        changed = {name: pair for name, pair in changed.items() if name not in record["departures"]}
        told = "Settings that are not the defaults, beside the departures above."
    rows = [[name, *pair] for name, pair in changed.items()]
    flat = [
        (f"{name}.{k}", v)
        for name, value in chosen.items()
        if isinstance(value, dict)
        for k, v in value.items()
    ]
    every = [(name, value) for name, value in chosen.items() if not isinstance(value, dict)] + flat
    body = (
        note(told) + table(["setting", "here", "default"], rows)
        if rows
        else note("All others are the defaults.")
    )
    return section("Settings", body, folded("All settings", table(["", ""], every)))


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))
