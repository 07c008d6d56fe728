"""`jepa3d info`: what a run, a source of shapes or this installation is, in plain lines."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.store import SPLITS, Store
from jepa3d.evaluation.protocol import provenance
from jepa3d.figures import draw_contact_sheet
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import fingerprint, load_any
from jepa3d.plain import printable, read_checked
from jepa3d.run import Run
from jepa3d.training import checkpoint
from jepa3d.training.engine import named
from jepa3d.training.runs import outcome


def describe(
    path: str | None,
    up_axis: str = "z",
    labels_key: str = "labels",
    picture: Path | None = None,
    verify: bool = False,
) -> None:
    """Print what `path` is;

    `picture` is where a contact sheet of shapes goes. Raises ValueError for anything else.
    """
    if path is None:
        _installation()
    elif (Path(path) / "run.json").is_file():
        _run(Path(path))
    elif any(
        (Path(path) / folder / "config.json").is_file() for folder in ("", "model", "encoder")
    ):
        _network(Path(path))
    elif (Path(path) / "store.json").is_file():
        _store(Store(path, unfinished=True), verify, picture)
    else:
        clouds = load(
            [path],
            512 if path.startswith("synthetic") else 1,
            "all",
            [up_axis],
            labels_key,
            raw=True,
        )
        _shapes(clouds)
        if verify:
            print("every cloud was read: none has NaN or infinite coordinates")
        if picture:
            rows = _spread(clouds.labels, len(clouds))
            titles = [
                clouds.class_names[clouds.labels[i]] if clouds.labels is not None else str(i)
                for i in rows
            ]
            draw_contact_sheet([clouds.points[i] for i in rows], titles, picture)
            print(f"written: {picture}")


def _installation() -> None:
    facts = provenance()
    print(", ".join(f"{name} {value}" for name, value in facts["versions"].items()))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    print(f"python {facts['python']}, {facts['machine']}, device {device}")
    for module, use in (
        ("torch_quickfps", "compiled sampling (extra: fast)"),
        ("matplotlib", "pictures (extra: view)"),
        ("laspy", "LAS, E57, PCD and HDF5 files (extra: io)"),
    ):
        print(f"{use}: {'yes' if importlib.util.find_spec(module) else 'no'}")


def _run(run: Path) -> None:
    """Any run folder, finished or not: of pretrain, classify, segment or fewshot."""
    config, record = Run(run).config, Run(run).record
    data, cost, task = record["data"], record.get("cost"), config.get("task", "pretrain")
    print(
        f"{run}: {config['objective'] if task == 'pretrain' else task}, {record['status']}, {record['command']}"
    )
    print(f"data: {data['name']}, {data['shapes']:,} shapes, sha256 {data['fingerprint'][:16]}")
    if task != "pretrain":
        print(f"begins with: {config['init'] or 'random weights'}")
    if counts := record.get("parameters"):
        print(
            "parameters: "
            + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
        )
    if backbone := record.get("backbone"):
        print(
            f"image transformer, not in the run: {backbone['name']}, sha256 {backbone['sha256'][:16]}"
        )
    if engine := Run(run).engine:
        device = f" on {engine['device']}" if "device" in engine else ""
        print(f"computed in {named(engine['mixed_precision'], engine['compile'])}{device}")
    if folds := sum(1 for _ in run.glob("fold-*/results.json")):
        print(f"{folds} of {config['folds']} folds done")
    if (run / "results.json").is_file():
        print(outcome(read_checked(run / "results.json")))
    if cost is None and (newest := checkpoint.latest(run / "checkpoints")):
        cost = read_checked(newest / "state.json")
    if cost:
        step = f"step {cost['step']:,}, " if "step" in cost else ""
        peak = (
            f", peak memory {cost['peak_memory'] / 2**30:.2f} GiB" if "peak_memory" in cost else ""
        )
        print(
            f"{step}{cost['cpu_seconds'] / 60:.1f} CPU-minutes, {cost['wall_seconds'] / 60:.1f} minutes{peak}"
        )
        if cost.get("stage1_cpu_seconds"):
            print(
                f"before that, stage I and cached targets: {cost['stage1_cpu_seconds'] / 60:.1f} CPU-minutes"
            )
    if departures := record.get("departures"):
        print("departs from the paper's setting in:")
        for name, (ours, paper) in departures.items():
            print(f"  {name}: {ours} (paper: {paper})")


def _network(folder: Path) -> None:
    """An encoder, or a network that jepa3d label or a fine-tuning run made."""
    network = load_any(folder)
    encoder = network if isinstance(network, PointEncoder) else network.encoder
    count = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{folder}: {type(network).__name__}, {count / 1e6:.2f} M parameters, fingerprint {fingerprint(encoder)}"
    )
    print(
        f"takes clouds of {encoder.min_points:,} points or more, sees {encoder.num_points:,} of them"
    )
    if not isinstance(network, PointEncoder):
        print(printable(f"{len(network.class_names)} classes: {', '.join(network.class_names)}"))


def _shapes(clouds: PointClouds) -> None:
    sizes = sorted({len(cloud) for cloud in clouds.points})
    span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    print(f"{clouds.name}: {len(clouds):,} shapes of {span} points, sha256 {clouds.fingerprint}")
    if clouds.split is not None:
        counts = np.bincount(clouds.split, minlength=len(SPLITS))
        print(
            "split: "
            + ", ".join(f"{n:,} {part}" for part, n in zip(SPLITS, counts, strict=True) if n)
        )
    if clouds.labels is None:
        print("no labels")
        return
    counts = np.bincount(clouds.labels, minlength=len(clouds.class_names))
    print(
        f"{len(clouds.class_names)} classes: "
        + ", ".join(f"{printable(n)} {c}" for n, c in zip(clouds.class_names, counts, strict=True))
    )


def _store(store: Store, verify: bool, picture: Path | None) -> None:
    header, columns = store.header, store.columns
    size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    points = f"{store.num_points:,} points" if store.num_points else "all their points"
    state = "" if header["complete"] else ", UNFINISHED: run its jepa3d prepare again"
    print(
        f"{store.path}: {len(store):,} clouds of {points}, {size / 2**20:,.1f} MiB, sha256 {store.fingerprint}{state}"
    )
    chosen = {name: value for name, value in header["settings"].items() if value not in (None, [])}
    print("prepared with " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    if not len(store):
        return
    counts = np.diff(columns["end"], prepend=0)
    if not store.num_points:
        print(
            f"points a cloud: {counts.min():,} to {counts.max():,}, median {int(np.median(counts)):,}"
        )
    radius, unit = columns["frame"][:, 3], header["settings"]["unit"] or "units of the files"
    print(
        f"radius: {radius.min():.4g} to {radius.max():.4g}, median {np.median(radius):.4g} {unit}"
    )
    axes = np.bincount(columns["up"], minlength=3)
    print(
        "up axis of the files, turned to z here: "
        + ", ".join(f"{a} {n:,}" for a, n in zip("xyz", axes, strict=True) if n)
    )
    first, again = np.unique(columns["content"], return_index=True, return_counts=True)[1:]
    if again.max() > 1:
        row = int(first[np.argmax(again > 1)])
        print(
            f"duplicates: {int((again - 1).sum()):,} clouds repeat another, such as {printable(store.key(row))}"
        )
    _classes(store)
    if verify:
        store.verify()
        print("every checksum is as written")
    if picture:
        rows = _spread(np.asarray(columns["label"]), len(store))
        titles = [
            store.key(i) if columns["label"][i] < 0 else store.class_names[columns["label"][i]]
            for i in rows
        ]
        draw_contact_sheet([np.asarray(store.points(i), np.float32) for i in rows], titles, picture)
        print(f"written: {picture}")


def _classes(store: Store) -> None:
    """A table of clouds by class and split."""
    labels, split = np.asarray(store.columns["label"]), np.asarray(store.columns["split"])
    names, parts = [*store.class_names, "no class"], [*SPLITS, "no split"]
    cells = np.zeros((len(names), len(parts)), np.int64)
    np.add.at(cells, (labels, split), 1)  # -1 is the last
    shown = np.flatnonzero(cells.sum(0))
    table = Table("class", *(parts[i] for i in shown))
    for name, row in zip(names, cells, strict=True):
        if row.any():
            table.add_row(escape(printable(name)), *(f"{row[i]:,}" for i in shown))
    table.add_row("all", *(f"{cells[:, i].sum():,}" for i in shown))
    Console().print(table)


def _spread(labels: np.ndarray | None, count: int, shown: int = 60) -> list[int]:
    """At most `shown` indices, as many classes as there are room for first."""
    if labels is None:
        return np.unique(np.linspace(0, count - 1, shown).astype(int)).tolist()
    turn = np.zeros(count, np.int64)  # 0 for the first of each class, 1 for the second, …
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, turn))[:shown].tolist()
