"""`jepa3d label`: from unlabelled clouds to a classifier: clusters, a few names, a linear head, and
every label.

OUT/vectors.parquet  of the clouds, by the frozen encoder
OUT/names.csv        path, name, cluster: the clouds nearest to each centre; fill in names you know, add any others
OUT/clusters.html    these clouds, drawn
OUT/model            encoder and head, once there are names; `jepa3d predict OUT` uses it
OUT/labels.csv       path, class, probability, second class and its probability of every cloud; least certain first.
                     Of an unknown cloud the class is `unknown`, the probability empty, the second
                     its likeliest class
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.pipeline import Pipeline

from jepa3d.data.cloud import ReadError
from jepa3d.evaluation.classifiers import fit_head, set_head
from jepa3d.evaluation.fitting import one_thread
from jepa3d.inference.embedding import embed_files
from jepa3d.inference.neighbours import display, draw
from jepa3d.inference.unknown import Known, known_clouds
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import UNKNOWN, LinearClassifier
from jepa3d.models.ready import load
from jepa3d.page import note, page, section
from jepa3d.plain import printable, write_bytes
from jepa3d.training.checkpoint import replace_folder

SHOWN = 6  # representatives of a cluster
_SEED = 0


def label(
    paths: list[Path],
    out: Path,
    model: str = "default",
    up_axis: str = "z",
    clusters: int | None = None,
    names: Path | None = None,
    unknown: bool = False,
) -> None:
    """Embed the clouds at `paths`, propose clusters, and with names (a CSV, or asked for) train and
    label all.

    clusters: their number; by default the square root of half the clouds, at most 40. unknown: call
    clouds that are unlike every named one unknown. Raises ValueError and ReadError.
    """
    if up_axis == "none":
        raise ValueError(
            "--up-axis none: label needs x, y or z; jepa3d predict takes clouds as they stand"
        )
    if names is not None and not names.is_file():
        raise ReadError(f"--names {names}: no such file")
    embed_files(paths, out / "vectors.parquet", model, up_axis)
    vectors = Vectors(out / "vectors.parquet")
    where = vectors.column("path")
    x = np.concatenate([to_numpy(batch.column(0)) for batch in vectors.batches(["vector"])])
    names = names or out / "names.csv"
    known = read_names(names, where) if names.is_file() else {}
    if not known and names != out / "names.csv":
        raise ReadError(f"{names}: no names of these clouds")
    if known and clusters is not None:
        print(
            f"--clusters {clusters}: not used, since {names} has names already; another --out proposes clusters anew"
        )
    if not known:
        count = clusters or min(40, max(2, round((len(x) / 2) ** 0.5)))
        if not 2 <= count <= len(x):
            raise ValueError(f"--clusters {count}: from 2 to the number of clouds, {len(x):,}")
        groups = list(cluster(x, count))
        _write_page(groups, where, up_axis, out / "clusters.html")
        known = _ask(groups, where) if sys.stdin.isatty() else {}
        numbered = ((number, i) for number, group in enumerate(groups, 1) for i in group[:SHOWN])
        rows = [(where[i], known.get(where[i], ""), number) for number, i in numbered]
        _write_csv(out / "names.csv", [("path", "name", "cluster"), *rows])
        print(f"written: {out / 'clusters.html'} and {out / 'names.csv'}, {count} clusters")
    if len(set(known.values())) < 2:
        print(
            f"to go on: names of two classes at least in {out / 'names.csv'}, and the same command"
        )
        return
    rows = np.array([i for i, path in enumerate(where) if path in known])
    classes, y = np.unique([known[where[i]] for i in rows], return_inverse=True)
    if unknown and UNKNOWN in classes:
        raise ValueError(f"--unknown: {names} has a class of that name; give it another")
    seen = known_clouds(x, rows, y) if unknown else None
    head, estimate = fit_head(x[rows], y)
    making = vectors.making
    network = _network(head, load(model), making.layer, making.pooling, classes.tolist(), seen)
    replace_folder(out / "model", network.save_pretrained)
    probability, unlike = head.predict_proba(x), network.unknown(torch.from_numpy(x)).numpy()
    order = np.argsort(np.where(unlike, 0, probability.max(1)), kind="stable")
    first, second = np.argsort(-probability, 1, kind="stable")[:, :2].T

    def cells(i: int) -> tuple[str, ...]:
        (a, b), (c, d) = ((classes[k], f"{probability[i, k]:.4f}") for k in (first[i], second[i]))
        return (UNKNOWN, "", a, b) if unlike[i] else (a, b, c, d)

    found = [(where[i], *cells(i)) for i in order]
    _write_csv(
        out / "labels.csv",
        [("path", "class", "probability", "second", "second_probability"), *found],
    )
    alone = [
        printable(str(name))
        for name, count in zip(classes, np.bincount(y), strict=True)
        if count == 1
    ]
    told = f"no estimate while there is one cloud of {', '.join(alone)}; name a second of each, and run this again"
    told = told if estimate is None else f"{100 * estimate:.1f} % right, cross-validated"
    print(f"{len(rows):,} named clouds of {len(classes)} classes: {told}")
    if unknown:
        print(
            f"{unlike.sum():,} clouds are called unknown; of those of the named classes about 1 in 20 is"
        )
    print(
        f"written: {out / 'labels.csv'}, {len(x):,} clouds, least certain first; jepa3d predict {out} labels others"
    )


def cluster(x: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Spherical k-means of vectors n E: the rows of each cluster, nearest to its centre first;
    largest first.
    """
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    with one_thread():
        means = KMeans(count, n_init=4, random_state=_SEED).fit(unit)
    distance = np.linalg.norm(unit - means.cluster_centers_[means.labels_], axis=1)
    sizes = np.bincount(means.labels_, minlength=count)
    for number in np.argsort(-sizes, kind="stable"):
        inside = np.flatnonzero(means.labels_ == number)
        yield inside[np.argsort(distance[inside], kind="stable")]


def read_names(file: Path, where: list[str]) -> dict[str, str]:
    """Path -> name of the rows of a CSV that have a name.

    Raises ReadError for a path that is not among `where`.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReadError(f"{file}: not a CSV file in UTF-8 ({error})") from error
    known, there = {}, set(where)
    for row in rows:
        if not {"path", "name"} <= row.keys():
            raise ReadError(
                f"{file}: needs columns path and name, and has {', '.join(map(str, row))}"
            )
        if not (name := (row["name"] or "").strip()):
            continue
        path = row["path"] if row["path"] in there else str(Path(row["path"]).absolute())
        if path not in there:
            raise ReadError(f"{file}: {row['path']} is not among the clouds that were embedded")
        known[path] = name
    return known


def _ask(groups: list[np.ndarray], where: list[str]) -> dict[str, str]:
    """Names of clusters from whoever sits there; a cluster's name is that of its representatives."""
    known = {}
    print(
        "clusters.html shows them. A name for each; the same for several is fine, nothing skips, Ctrl-D ends."
    )
    for number, group in enumerate(groups, 1):
        some = printable(", ".join(Path(where[i]).name for i in group[:3]))
        print(f"{number}: {len(group):,} clouds, such as {some}")
        try:
            name = input("   name: ").strip()
        except EOFError:
            break
        known |= {where[i]: name for i in group[:SHOWN] if name}
    return known


def _network(
    head: Pipeline,
    encoder: PointEncoder,
    layer: int,
    pooling: str,
    classes: list[str],
    known: Known | None,
) -> LinearClassifier:
    """Encoder, head, and where `known` is given what is unlike every class, in one network."""
    least = known.least if known else -1.0
    network = LinearClassifier(vars(encoder)["_hub_mixin_config"], classes, layer, pooling, least)
    network.encoder.load_state_dict(encoder.state_dict())
    set_head(network, head)
    if known:
        for name in ("shift", "spread", "means"):
            getattr(network, name).copy_(torch.from_numpy(getattr(known, name)))
    return network


def _write_page(groups: list[np.ndarray], where: list[str], up_axis: str, out: Path) -> None:
    sections = []
    for number, group in enumerate(groups, 1):
        paths = [where[i] for i in group[:SHOWN]]
        titles = [Path(path).name for path in paths]
        files = note(", ".join(map(display, paths)))
        drawn = draw(paths, titles, up_axis, "nearest to the centre first")
        sections.append(section(f"{number}: {len(group):,} clouds", *drawn, files))
    write_bytes(
        out,
        page(
            "Clusters", f"{len(groups)} clusters", "spherical k-means of vectors", sections
        ).encode(),
    )


def _write_csv(out: Path, rows: list) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    write_bytes(out, buffer.getvalue().encode())
