"""`jepa3d label`: from unlabelled clouds to a classifier: clusters, a few names, a linear head, and every label.

OUT/vectors.parquet  of the clouds, by the frozen encoder
OUT/names.csv        path, name, cluster: the clouds nearest to each centre; fill in names you know, add any others
OUT/clusters.html    these clouds, drawn
OUT/model            encoder and head, once there are names; `jepa3d predict OUT` uses it
OUT/labels.csv       path, class, probability, second class and its probability of every cloud; least certain first
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from jepa3d.data.cloud import ReadError
from jepa3d.evaluation.fitting import one_thread, side_by_side
from jepa3d.inference.embedding import embed_files
from jepa3d.inference.neighbours import display, draw
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.models.heads import LinearClassifier
from jepa3d.models.ready import load
from jepa3d.page import note, page, section
from jepa3d.plain import printable, write_bytes
from jepa3d.training.checkpoint import replace_folder

SHOWN = 6  # representatives of a cluster
_CS = (0.001, 0.01, 0.1, 1.0)  # inverse strengths of the head's regularisation that are tried
_SEED = 0


def label(
    paths: list[Path],
    out: Path,
    model: str = "default",
    up_axis: str = "z",
    clusters: int | None = None,
    names: Path | None = None,
) -> None:
    """Embed the clouds at `paths`, propose clusters, and with names (a CSV, or asked for) train and label all.

    clusters: their number; by default the square root of half the clouds, at most 40. Raises ValueError and ReadError.
    """
    if up_axis == "none":
        raise ValueError("--up-axis none: label needs x, y or z; jepa3d predict takes clouds as they stand")
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
        print(f"--clusters {clusters}: not used, since {names} has names already; another --out proposes clusters anew")
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
        print(f"to go on: names of two classes at least in {out / 'names.csv'}, and the same command")
        return
    rows = np.array([i for i, path in enumerate(where) if path in known])
    classes, y = np.unique([known[where[i]] for i in rows], return_inverse=True)
    head, estimate = fit(x[rows], y)
    probability = head.predict_proba(x)
    _save(head, model, vectors.making.layer, vectors.making.pooling, classes.tolist(), out / "model")
    order = np.argsort(probability.max(1), kind="stable")
    first, second = np.argsort(-probability, 1, kind="stable")[:, :2].T

    def cells(i: int, best: np.ndarray) -> tuple[str, str]:
        return classes[best[i]], f"{probability[i, best[i]]:.4f}"

    found = [(where[i], *cells(i, first), *cells(i, second)) for i in order]
    _write_csv(out / "labels.csv", [("path", "class", "probability", "second", "second_probability"), *found])
    alone = [printable(str(name)) for name, count in zip(classes, np.bincount(y), strict=True) if count == 1]
    told = f"no estimate while there is one cloud of {', '.join(alone)}; name a second of each, and run this again"
    told = told if estimate is None else f"{100 * estimate:.1f} % right, cross-validated"
    print(f"{len(rows):,} named clouds of {len(classes)} classes: {told}")
    print(f"written: {out / 'labels.csv'}, {len(x):,} clouds, least certain first; jepa3d predict {out} labels others")


def cluster(x: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Spherical k-means of vectors n E: the rows of each cluster, nearest to its centre first; largest first."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    with one_thread():
        means = KMeans(count, n_init=4, random_state=_SEED).fit(unit)
    distance = np.linalg.norm(unit - means.cluster_centers_[means.labels_], axis=1)
    sizes = np.bincount(means.labels_, minlength=count)
    for number in np.argsort(-sizes, kind="stable"):
        inside = np.flatnonzero(means.labels_ == number)
        yield inside[np.argsort(distance[inside], kind="stable")]


def fit(x: np.ndarray, y: np.ndarray):
    """Logistic regression on standardised vectors n E of classes n, and its cross-validated accuracy, or None.

    The strength of regularisation is chosen by the same folds, so the estimate is a little too good.
    """
    folds = min(5, int(np.bincount(y).min()))
    with one_thread():
        if folds < 2:
            return _head(_CS[1]).fit(x, y), None
        scores = side_by_side(_cross_validated, [(x, y, c, folds) for c in _CS], len(_CS) * folds * x.size)
        best = int(np.argmax(scores))
        return _head(_CS[best]).fit(x, y), scores[best]


def _head(c: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))


def _cross_validated(x: np.ndarray, y: np.ndarray, c: float, folds: int) -> float:
    split = StratifiedKFold(folds, shuffle=True, random_state=_SEED)
    return float(cross_val_score(_head(c), x, y, cv=split).mean())


def read_names(file: Path, where: list[str]) -> dict[str, str]:
    """Path -> name of the rows of a CSV that have a name. Raises ReadError for a path that is not among `where`."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReadError(f"{file}: not a CSV file in UTF-8 ({error})") from error
    known, there = {}, set(where)
    for row in rows:
        if not {"path", "name"} <= row.keys():
            raise ReadError(f"{file}: needs columns path and name, and has {', '.join(map(str, row))}")
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
    print("clusters.html shows them. A name for each; the same for several is fine, nothing skips, Ctrl-D ends.")
    for number, group in enumerate(groups, 1):
        some = printable(", ".join(Path(where[i]).name for i in group[:3]))
        print(f"{number}: {len(group):,} clouds, such as {some}")
        try:
            name = input("   name: ").strip()
        except EOFError:
            break
        known |= {where[i]: name for i in group[:SHOWN] if name}
    return known


def _save(head, model: str, layer: int, pooling: str, classes: list[str], folder: Path) -> None:
    """Encoder and head in one network; the standardisation becomes part of the head's weights."""
    encoder = load(model)
    scale, linear = head[0], head[1]
    weight, bias = linear.coef_ / scale.scale_, linear.intercept_
    if len(classes) == 2:  # scikit-learn has one row: the second class against the first
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    network = LinearClassifier(vars(encoder)["_hub_mixin_config"], classes, layer, pooling)
    network.encoder.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        network.out.weight.copy_(torch.from_numpy(weight))
        network.out.bias.copy_(torch.from_numpy(bias - weight @ scale.mean_))
    replace_folder(folder, network.save_pretrained)


def _write_page(groups: list[np.ndarray], where: list[str], up_axis: str, out: Path) -> None:
    sections = []
    for number, group in enumerate(groups, 1):
        paths = [where[i] for i in group[:SHOWN]]
        titles = [Path(path).name for path in paths]
        files = note(", ".join(map(display, paths)))
        drawn = draw(paths, titles, up_axis, "nearest to the centre first")
        sections.append(section(f"{number}: {len(group):,} clouds", *drawn, files))
    write_bytes(out, page("Clusters", f"{len(groups)} clusters", "spherical k-means of vectors", sections).encode())


def _write_csv(out: Path, rows: list) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    write_bytes(out, buffer.getvalue().encode())
