"""`jepa3d info`: describes a run, a network, a source of shapes or this installation as text."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.store import SPLITS, Store
from jepa3d.evaluation.features import default_device
from jepa3d.evaluation.protocol import provenance
from jepa3d.evaluation.tables import Sheet, show
from jepa3d.figures import draw_contact_sheet, evenly, first_of_each
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import fingerprint, load_any
from jepa3d.plain import printable
from jepa3d.run import Run
from jepa3d.training.engine import named
from jepa3d.training.runs import outcome

_DRAWN = 60  # a contact sheet shows at most this many shapes
# How a run's cost is printed: key in the cost, divisor, and text. Stage I is the training of
# networks that the run needs first, such as a teacher (run.py).
_STAGE_I = "{:.1f} CPU-minutes before the first step (stage I, cached targets)"
_COSTS: list[tuple[str, float, str]] = [
    ("step", 1, "{:,.0f} steps"),
    ("cpu_seconds", 60, "{:.1f} CPU-minutes"),
    ("wall_seconds", 60, "{:.1f} minutes"),
    ("peak_memory", 2**30, "{:.2f} GiB of memory at the peak"),
    ("stage1_cpu_seconds", 60, _STAGE_I),
]


def describe(
    path: str | None,
    up_axis: str = "z",
    labels_key: str = "labels",
    picture: Path | None = None,
    verify: bool = False,
) -> None:
    """Print a description of a run, a network or a source of shapes.

    path: what to describe; None describes this installation. The other arguments are used only for
    a source of shapes, which is any source of `load` in data/datasets.py. up_axis, labels_key: the
    up axis of the source, and the name of the array of labels in an .npz file. picture: a file to
    which pictures of some shapes are written. verify: compare the files of a store with their
    checksums. For any other source, every cloud is read even without `verify`; with `verify`, a
    line is printed that says so. Raises ValueError if `path` is nothing that can be described, or
    is damaged; if the up axis is unknown; or if a picture is wanted but matplotlib is missing.
    """
    if path is None:
        _installation()
        return
    folder = Path(path)
    configs = [folder / name / "config.json" for name in ("", "model", "encoder")]
    if Run.is_at(folder):
        _run(Run(folder))
    elif any(map(Path.is_file, configs)):
        _network(folder)
    elif (folder / "store.json").is_file():
        _store(Store(path, unfinished=True), verify, picture)
    else:
        # The number of points to ask for. The source "synthetic" makes clouds of twice this number.
        # In any other source, a cloud keeps all of its points, and must have at least this number.
        count = 512 if path.split(":")[0] == "synthetic" else 1
        clouds = load([path], count, "all", [up_axis], labels_key, raw=True)
        _shapes(clouds)
        if verify:
            print("every cloud was read: none has NaN or infinite coordinates")
        if picture:
            none = np.full(len(clouds), -1)
            labels = none if clouds.labels is None else clouds.labels
            _draw(clouds.points.__getitem__, labels, clouds.class_names, str, picture)


def listed(values: Mapping[str, Any]) -> str:
    """Return names and their values as one line, such as "train 32, test 16"."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _installation() -> None:
    """Print the versions, the machine, and which extras are installed."""
    about = provenance()
    print(listed(about["versions"]))
    print(f"python {about['python']}, {about['machine']}, device {default_device()}")
    for module, use in (
        ("torch_quickfps", "compiled sampling (extra: fast)"),
        ("matplotlib", "pictures (extra: view)"),
        ("laspy", "LAS, E57, PCD and HDF5 files (extra: io)"),
    ):
        print(f"{use}: {'yes' if importlib.util.find_spec(module) else 'no'}")


def run_facts(run: Run) -> dict[str, Any]:
    """Return facts about a run, finished or not, as name -> value: its command, data and seed and,
    as far as they are known, its initial weights, numbers of parameters, image transformer,
    precision, device and cost.

    Only a downstream run (of `classify`, `segment` or `fewshot`) has the fact on initial weights.
    Only a run that trains a dVAE has the fact on the image transformer, and only if the setting
    `dvae.backbone` names one.
    """
    config, record, cost = run.config, run.record, run.cost or {}
    data = record["data"]
    found: dict[str, Any] = {
        "command": record["command"],
        "data": f"{data['name']}, {data['shapes']:,} shapes",
        "sha256 of the data": data["fingerprint"],
        "seed": config["seed"],
    }
    if "task" in config:
        found["initial weights"] = config["init"] or "random"
    if sizes := record.get("parameters"):
        millions = {key: f"{count / 1e6:.2f} M" for key, count in sizes.items()}
        found["parameters"] = listed(millions)
    if backbone := record.get("backbone"):
        text = f"{backbone['name']}, sha256 {backbone['sha256'][:16]}"
        found["image transformer (not stored in the run)"] = text
    if engine := run.engine:
        device = f" on {engine['device']}" if "device" in engine else ""
        precision = named(engine["mixed_precision"], engine["compile"])
        found["computed in"] = precision + device
    spent = [text.format(cost[key] / by) for key, by, text in _COSTS if cost.get(key)]
    return found | ({"cost": ", ".join(spent)} if spent else {})


def _run(run: Run) -> None:
    """Print a description of a run, finished or not, of `jepa3d pretrain`, `classify`, `segment` or
    `fewshot`.
    """
    config, record = run.config, run.record
    kind = config.get("task") or config["objective"]
    print(f"{run.folder}: {kind}, {record['status']}")
    for name, value in run_facts(run).items():
        print(f"{name}: {value}")
    if folds := len(list(run.folder.glob("fold-*/results.json"))):
        print(f"{folds} of {config['folds']} folds done")
    if result := run.result:
        print(outcome(result))
    if departures := record.get("departures"):
        print("settings that differ from the paper's:")
        for name, (ours, paper) in departures.items():
            print(f"  {name}: {ours} (paper: {paper})")


def _network(folder: Path) -> None:
    """Print a description of an encoder, or of a network from `jepa3d label` or fine-tuning."""
    network = load_any(folder)
    encoder = network if isinstance(network, PointEncoder) else network.encoder
    count = sum(parameter.numel() for parameter in network.parameters())
    size = f"{count / 1e6:.2f} M parameters, fingerprint {fingerprint(encoder)}"
    print(f"{folder}: {type(network).__name__}, {size}")
    fewest, seen = encoder.min_points, encoder.num_points
    print(f"input: {fewest:,} points or more per cloud, reduced or filled to {seen:,}")
    if not isinstance(network, PointEncoder):
        names = network.class_names
        print(printable(f"{len(names)} classes: {', '.join(names)}"))


def _counts(numbers: np.ndarray, names: Sequence[str]) -> str:
    """Return as one line how often each name occurs. numbers: indices into `names`."""
    found = zip(names, np.bincount(numbers, minlength=len(names)), strict=True)
    return listed({printable(name): f"{count:,}" for name, count in found})


def _shapes(clouds: PointClouds) -> None:
    """Describe a source of shapes: its shapes, points per shape, splits and classes."""
    sizes = sorted({len(cloud) for cloud in clouds.points})
    span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    shapes = f"{len(clouds):,} shapes of {span} points"
    print(f"{clouds.name}: {shapes}, sha256 {clouds.fingerprint}")
    if clouds.split is not None:
        print(f"split: {_counts(clouds.split, SPLITS)}")
    if clouds.labels is None:
        print("no labels")
    else:
        names = clouds.class_names
        print(f"{len(names)} classes: {_counts(clouds.labels, names)}")


def _store(store: Store, verify: bool, picture: Path | None) -> None:
    """Print a description of a store; verify it and draw a contact sheet if that was requested."""
    header, columns = store.header, store.columns
    size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    points = f"of {store.num_points:,} points" if store.num_points else "with all points"
    state = "" if header["complete"] else ", UNFINISHED: run jepa3d prepare again"
    what = f"{len(store):,} clouds {points}, {size / 2**20:,.1f} MiB"
    print(f"{store.path}: {what}, sha256 {store.fingerprint}{state}")
    settings = header["settings"]
    chosen = {k: value for k, value in settings.items() if value not in (None, [])}
    print(f"prepared with {listed(chosen)}")
    if not len(store):
        return
    counts = np.diff(columns["end"], prepend=0)
    if not store.num_points:
        span = f"{counts.min():,} to {counts.max():,}"
        print(f"points per cloud: {span}, median {int(np.median(counts)):,}")
    radius, unit = columns["frame"][:, 3], settings["unit"] or "units of the files"
    span = f"{radius.min():.4g} to {radius.max():.4g}"
    print(f"radius: {span}, median {np.median(radius):.4g} {unit}")
    print(f"up axis of the files (in this store, it is z): {_counts(columns['up'], 'xyz')}")
    content = columns["content"]
    _, first, count = np.unique(content, return_index=True, return_counts=True)
    if count.max() > 1:
        key = printable(store.key(int(first[np.argmax(count > 1)])))
        print(
            f"duplicates: {(count - 1).sum():,} clouds are copies of others, for example of {key}"
        )
    _classes(store)
    if verify:
        store.verify()
        print("every file has the stored checksum")
    if picture:
        labels = np.asarray(columns["label"])
        _draw(store.points, labels, store.class_names, store.key, picture)


def _classes(store: Store) -> None:
    """Print a table of clouds by class and split."""
    labels, split = (np.asarray(store.columns[name]) for name in ("label", "split"))
    names, splits = [*store.class_names, "no class"], [*SPLITS, "no split"]
    cells = np.zeros((len(names), len(splits)), np.int64)
    # A cloud without a class or split has the index -1, which means the last row or column.
    np.add.at(cells, (labels, split), 1)
    used = np.flatnonzero(cells.sum(0))
    filled = cells[:, used]
    found = zip([*names, "all"], [*filled, filled.sum(0)], strict=True)
    rows = [[printable(x), *map("{:,}".format, n)] for x, n in found if n.any()]
    columns = ["class", *(splits[i] for i in used)]
    show([Sheet("clouds by class and split", columns, rows, [])])


def _draw(
    points: Callable[[int], np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    key: Callable[[int], str],
    picture: Path,
) -> None:
    """Draw a contact sheet (pictures of some shapes); it begins with one shape of each class.

    Then come the second shape of each class, the third, and so on, up to `_DRAWN` shapes. If no
    shape has a class, the sheet shows shapes that are evenly spread over the source. The title of a
    shape is its class or, if it has none, its key. points, key: functions that return the points
    and the key of shape i. labels: class numbers, -1 for no class.
    """
    rows = first_of_each(labels)[:_DRAWN].tolist()
    if labels.max() < 0:
        rows = evenly(len(labels), _DRAWN).tolist()
    titles = [class_names[labels[i]] if labels[i] >= 0 else key(i) for i in rows]
    shapes = [np.asarray(points(i), np.float32) for i in rows]
    draw_contact_sheet(shapes, titles, picture)
    print(f"written: {picture}")
