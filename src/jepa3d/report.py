"""`jepa3d report`: writes a run's report as one HTML file that contains its pictures."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from jepa3d import figures, page
from jepa3d.config import KINDS, FinetuneConfig, PretrainConfig
from jepa3d.data.cloud import UNLABELLED
from jepa3d.data.datasets import load
from jepa3d.data.errors import as_read_error
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled
from jepa3d.evaluation.probe import summary_table
from jepa3d.info import listed, run_facts
from jepa3d.models.ready import load_network
from jepa3d.models.teacher import load_module
from jepa3d.plain import differences, from_dict, read_checked, to_dict, write_bytes
from jepa3d.run import Run

# Value of `task` or `objective` -> the kind of run, as its report names it. Stage I trains networks
# that another run needs first, such as a teacher.
TITLES = {
    "jepa": "3D-JEPA pretraining",
    "generative": "Masked autoencoder pretraining",
    "invariance": "Invariance pretraining",
    "dvae": "dVAE, stage I",
    "classify": "Classification",
    "segment": "Part segmentation",
    "fewshot": "Few-shot classification",
}
# value of `selection` in results.json -> how the epoch was chosen, in words
SELECTION = {
    "validation": "the epoch was chosen on the validation split; the test split was used once",
    "last epoch": "the last epoch was used; nothing was chosen",
    "best on test": "the epoch was chosen on the test split",
    "none": "nothing was chosen",
}
# largest numbers of shapes in the t-SNE picture and in the picture of parts
MOST_TSNE, MOST_PARTS = 2000, 8


def report(
    folder: Path, data: str | None = None, out: Path | None = None, figures_to: Path | None = None
) -> Path:
    """Write the report of a run as one HTML file, atomically, and return its path.

    data: where the run's data is now; None: where it was during the run. If `data` is None and the
    data cannot be read, the page says why a picture is missing. out: the file to write; None:
    RUN/report.html. figures_to: a folder for copies of the pictures as PNG files, numbered in the
    order of the page. Raises ValueError if `folder` is not a run, if a file of the run is damaged,
    if `out` is a folder, if the parent folder of `out` does not exist, or if `data` is given but
    cannot be read.
    """
    for name in ("config.json", "run.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not a run folder: it has no {name}")
    out = out or folder / "report.html"
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"{out}: --out must be an .html file in a folder that exists")
    run = Run(folder)
    config, record = run.config, run.record
    kind = config.get("task") or config["objective"]
    if "task" in config:
        parts = [*_outcome(run, config, data), _training(run, config)]
    else:
        last = run.metrics[-1] if run.metrics else {}
        parts = [_last_step(last, record), *_probes(folder), _training(run, config)]
        parts.append(_collapse(last))
        if kind == "jepa":
            parts.append(_from_data("Sampled blocks", data, partial(_blocks, config)))
        parts.append(_departures(record))
    versions = record["versions"] | {"python": record["python"]}
    about = run_facts(run) | {"versions": listed(versions)}
    about |= {key: record[key] for key in ("commit", "machine")}
    parts += [page.section("Provenance", page.facts(about)), _settings(config, record)]
    html = page.document(
        folder.resolve().name, record["status"], TITLES.get(kind, f"Pretraining: {kind}"), parts
    )
    # the name of a file may have bytes that are not UTF-8
    write_bytes(out, html.encode("utf-8", "backslashreplace"))
    if figures_to:
        figures_to.mkdir(parents=True, exist_ok=True)
        for i, png in enumerate(page.pictures(html), 1):
            write_bytes(figures_to / f"figure-{i}.png", png)
    return out


def _from_data(title: str, data: str | None, draw: Callable[..., str]) -> str:
    """Return a section with a picture that needs the run's data, or with the reason why the picture
    is missing.

    draw: makes the picture from `data`. If `data` is given but cannot be read, the error is raised.
    """
    try:
        body = draw(data)
    except (ValueError, OSError) as error:
        if data:
            raise
        body = page.note(f"Missing: {error}. If the data was moved, give --data.")
    return page.section(title, body)


# ---------------------------------------------------------------------------------- downstream runs
def _outcome(run: Run, config: dict, data: str | None) -> Iterator[str]:
    """Yield the sections with the test scores of a downstream run (classify, segment or fewshot):
    metrics, details and pictures.
    """
    if (result := run.result) is None:
        yield page.section("Result", page.note("There is no result yet."))
        return
    details = result["details"]
    yield _result(result)
    if folds := details.get("folds"):
        rows = [[i, page.Bar(score)] for i, score in enumerate(folds)]
        yield page.section("Folds", page.table(["fold", "overall accuracy, %"], rows))
    if "per_category" in details:
        scores = details["per_category"].items()
        rows = [[name, page.Bar(value)] for name, value in scores if value is not None]
        yield page.section("Categories", page.table(["category", "mIoU, %"], rows))
    if "per_class" in details:
        yield _classes(details)
    if config["task"] == "segment":
        body = _parts(run.folder, details["class_names"])
        yield page.section("True and predicted parts", body)
    if config["task"] == "classify":
        title = "Features before and after fine-tuning"
        yield _from_data(title, data, partial(_tsne, run.folder, config, details))


def _result(result: dict) -> str:
    """Return a section with a downstream run's metrics, protocol and warnings."""
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
        words = name.replace("_", " ").replace("miou", "mIoU")
        shown.append((words, f"{value:.1f} %", remark))
    before = dict(result["pretraining"] or {})
    if isinstance(before.get("data"), dict):
        before["data"] = before["data"]["name"]
    keys = [key for key in ("objective", "teacher", "data", "seed") if key in before]
    counts = {part: source[part] or 0 for part in ("train", "validation", "test")}
    rows = {
        "protocol": result["protocol"],
        "selection": SELECTION.get(result["selection"], result["selection"]),
        "encoder from": result["init"],
        "pretrained by": "; ".join(f"{key} {page.show(before[key])}" for key in keys),
        "data": source["name"] + (f", {source['variant']}" if source.get("variant") else ""),
        "classes": source["classes"],
        "shapes": ", ".join(f"{count:,} {part}" for part, count in counts.items()),
        "labelled share of train": f"{100 * source['labels']:.4g} %",
        "seed": result["seed"],
        "votes": result["votes"],
    }
    warning = ""
    if result["selection"] == "best on test":
        text = (
            "The epoch was chosen on the test split: compare only with results chosen the same way."
        )
        warning = page.note(text, "warning")
    return page.section("Result", page.tiles(shown), warning, page.facts(rows))


def _classes(details: dict) -> str:
    """Return a section with the accuracy of each class, the most frequent mistakes and the
    confusion matrix.
    """
    scores, names = details["per_class"].items(), details["class_names"]
    rows = [[name, row["count"], page.Bar(row["accuracy"])] for name, row in scores]
    confusion = np.asarray(details["confusion"])
    wrong = confusion * (1 - np.eye(len(names), dtype=int))
    share = 100 * wrong / np.maximum(confusion.sum(1, keepdims=True), 1)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:5]
    mistakes = [
        [names[true], names[found], wrong[true, found], f"{share[true, found]:.0f} %"]
        for true, found in zip(*np.unravel_index(worst, wrong.shape), strict=True)
        if wrong[true, found]
    ]
    caption = "Confusion matrix of the test split. Rows: true classes. Colours: shares of a row."
    columns = ["most frequent mistakes", "predicted as", "shapes", "share of class"]
    return page.section(
        "Classes",
        page.table(["class", "test shapes", "accuracy, %"], rows),
        page.table(columns, mistakes) if mistakes else "",
        page.picture(partial(figures.draw_confusion, confusion, names), caption),
    )


def _predictions(run: Path) -> dict[str, np.ndarray]:
    """Load the arrays of RUN/predictions.npz. Raises ReadError if it is missing or damaged."""
    file = run / "predictions.npz"
    with as_read_error(file), np.load(file, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def _parts(run: Path, names: list[str]) -> str:
    """Return a picture of some test shapes with their true and predicted parts. names: the names of
    the categories.
    """
    saved = _predictions(run)
    labels = saved["label"]
    first = figures.first_of_each(labels)[: max(len(np.unique(labels)), MOST_PARTS)]
    rows = first[figures.evenly(len(first), MOST_PARTS)]
    keys = ("points", "parts", "predicted")
    points, truth, predicted = (saved[key][rows] for key in keys)
    titles = [names[label] for label in labels[rows]]
    known = truth != UNLABELLED
    correct = 100 * ((predicted == truth) & known).sum(1) / known.sum(1)
    shares = map("{} {:.0f} %".format, titles, correct)
    return page.picture(
        partial(figures.draw_parts, points, truth, predicted, titles),
        "As in the paper's figure 6: the first test shapes of each category or, if there are more "
        f"than {MOST_PARTS} categories, of {MOST_PARTS} of them. No shape was selected by quality. "
        "Points with the "
        f"correct part: {', '.join(shares)}.",
    )


def _tsne(run: Path, config: dict, details: dict, data: str | None) -> str:
    """Return a t-SNE picture of the test shapes' features before fine-tuning (with the network in
    RUN/start) and after it (RUN/model).
    """
    if not (run / "start").is_dir():
        raise ValueError(f"{run / 'start'}: no such folder")
    start, network = load_module(str(run / "start")), load_network(run)
    values = {key: value for key, value in config.items() if key != "task"}
    settings = from_dict(FinetuneConfig, values | {"data": data or config["data"]})
    shapes = Labelled.load(settings, network.encoder.num_points)
    if not np.array_equal(shapes.y_test, _predictions(run)["label"]):
        raise ValueError(f"{shapes.name}: its test split differs from that of the run")
    if len(shapes.test) < 5:
        return page.note("Missing: t-SNE needs at least 5 test shapes.")
    rows = figures.evenly(len(shapes.test), MOST_TSNE)
    some = shapes.test.subset(rows)
    before = layer_features(start, some)[-1]
    after = layer_features(network.encoder, some)[-1]
    names = details["class_names"]
    return page.picture(
        partial(figures.draw_tsne, before, after, shapes.y_test[rows], names),
        f"As in the paper's figure 7: t-SNE of the pooled features of {len(rows):,} test shapes, "
        "before the first step and in the fine-tuned network. Distances between groups and sizes of "
        "groups have no meaning in t-SNE.",
    )


# --------------------------------------------------------------------------------- pretraining runs
def _last_step(last: dict, record: dict) -> str:
    """Return tiles with the loss and other numbers of the last logged step."""
    if not last:
        return ""
    data = record["data"]
    others = {
        "constant_loss": "loss of the best constant prediction",
        "position_loss": "loss of predictions from positions alone",
    }
    known = [f"{text} {last[key]:.3f}" for key, text in others.items() if key in last]
    shown = [
        ("loss", f"{last['loss']:.3g}", ", ".join(known)),
        ("steps", f"{last['step']:,}", f"{last['epoch']:.1f} epochs"),
        ("shapes", f"{data['shapes']:,}", data["name"]),
    ]
    rank = ("encoded_rankme", "effective rank", "of the encoder's tokens")
    for key, text, remark in (rank, ("perplexity", "code perplexity", "")):
        if key in last:
            shown.append((text, f"{last[key]:.1f}", remark))
    return page.tiles(shown)


def _probes(run: Path) -> Iterator[str]:
    """Yield a section for each result of `jepa3d probe` in the folder of the run. Results of
    `jepa3d probe --parts` and `--corruptions` are skipped.
    """
    for path in sorted(run.glob("probe-*.json")):
        probe = read_checked(path)
        # --parts and --corruptions write files of another format.
        if "summary" not in probe:
            continue
        data, split = probe["data"], probe["data"].get("part", "test")
        columns, rows = summary_table(probe["summary"])
        text = (
            f"Overall accuracy in % on {data['test']:,} shapes of the {split} split; "
            f"{data['classes']} classes, {data['train']:,} training shapes, {probe['pooling']} pooling, layer "
            f"{probe['layer']}, seeds {page.show(probe['seeds'])}. Selection: {probe['selection']}."
        )
        if probe.get("seen_in_pretraining"):
            text += f" Pretraining also used this {split} split, without its labels."
        labels = "" if data["labels"] == "labels" else f", {data['labels']}"
        title = f"Frozen features on {data['name']}{labels}"
        scores = page.table(columns, rows, strong="pretrained")
        yield page.section(title, scores, page.note(text))


def _collapse(last: dict) -> str:
    """Return a section with the measures of collapse at the last logged step, and with the values
    that they have in a healthy run (docs/method.md).
    """
    names = {
        "prediction": "predictions",
        "target": "targets",
        "embedding": "embeddings",
        "encoded": "encoder's tokens",
    }
    measures = ("std", "cosine", "rankme")
    rows = [
        [words, *(f"{last[f'{name}_{measure}']:.3g}" for measure in measures)]
        for name, words in names.items()
        if f"{name}_std" in last
    ]
    if not rows:
        return ""
    text = (
        "Healthy: std near 1, mean cosine near 0, effective rank in the tens. "
        "Collapsed: std 0, mean cosine 1, effective rank 1."
    )
    if "constant_loss" in last:
        text += (
            " The loss should be well below the losses of the best constant prediction and of "
            "predictions from positions alone."
        )
    columns = ["last step", "std", "mean cosine", "effective rank"]
    return page.section("Collapse", page.table(columns, rows), page.note(text))


def _blocks(config: dict, data: str | None) -> str:
    """Return a picture of sampled context and target blocks, like the paper's figure 4."""
    settings = from_dict(PretrainConfig, config)
    sources = [data] if data else list(settings.data)
    axes = settings.up_axis[: len(sources)]
    clouds = load(sources, settings.encoder.num_points, settings.split, axes)
    return page.picture(
        partial(figures.draw_blocks, clouds, settings),
        f"As in the paper's figure 4, on four shapes of {clouds.name}: what the encoder sees (blue) "
        "and what it has to predict (red), sampled as in training.",
    )


def _departures(record: dict) -> str:
    """Return a section with the settings that differ from the paper's."""
    rows = [[name, *pair] for name, pair in record.get("departures", {}).items()]
    body = page.table(["setting", "here", "paper"], rows)
    none = page.note("None: these are the paper's settings.")
    return page.section("Departures from the paper", body if rows else none)


# ---------------------------------------------------------------------------------------- every run
def _training(run: Run, config: dict) -> str:
    """Return a section with curves of the run and, if they exist, of its first few-shot fold and of
    its runs of stage I (the training of networks that the run needs first, such as a teacher).
    """
    on_test = config.get("select") == "best-on-test"
    split = "test, by which the epoch is chosen" if on_test else "validation"
    metric = "instance mIoU" if config.get("task") == "segment" else "overall accuracy"
    draw = partial(figures.draw_curves, selected=f"{split}, {metric}")
    runs = {"Metrics by optimiser step.": run}
    runs["Metrics of fold 0 by optimiser step."] = Run(run.folder / "fold-0")
    for stage in run.stages:
        runs[f"Metrics of stage I ({stage.folder.name}) by optimiser step."] = stage
    drawn = [
        page.picture(partial(draw, found.folder), caption)
        for caption, found in runs.items()
        if found.metrics
    ]
    return page.section("Training", *(drawn or [page.note("No step has been logged.")]))


def _settings(config: dict, record: dict) -> str:
    """Return a section with the settings that differ from the defaults, and a folded list of all
    settings.
    """
    chosen = {name: value for name, value in config.items() if name != "task"}
    changed = differences(chosen, to_dict(KINDS[config.get("task", "pretrain")]()))
    departures = record.get("departures", {})
    rows = [[name, *pair] for name, pair in changed.items() if name not in departures]
    groups = {name: value for name, value in chosen.items() if isinstance(value, dict)}
    every = [(name, value) for name, value in chosen.items() if name not in groups]
    every += [(f"{name}.{k}", v) for name, x in groups.items() for k, v in x.items()]
    body = page.note("No setting differs from the defaults, apart from any departures above.")
    if rows:
        apart = ", apart from the departures above" if "departures" in record else ""
        body = page.note(f"Settings that differ from the defaults{apart}.")
        body += page.table(["setting", "here", "default"], rows)
    whole = page.folded("All settings", page.table(["", ""], every))
    return page.section("Settings", body, whole)
