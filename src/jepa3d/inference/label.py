"""`jepa3d label`: turn unlabelled clouds into a classifier. The command clusters the clouds, takes
names for a few of them, trains a linear head on the frozen encoder, and labels every cloud.

OUT/vectors.parquet  vectors of the clouds, computed by the encoder
OUT/names.csv        columns path, name, cluster; lists the clouds nearest to each cluster centre.
                     Fill in the class names that you know, and add rows for other clouds if you
                     like
OUT/clusters.html    pictures of the clouds that names.csv lists
OUT/model            encoder and head, written as soon as two classes have names; they are used by
                     `jepa3d predict OUT`
OUT/labels.csv       written together with OUT/model; one row per cloud, least certain first. The
                     columns are path, class, probability, second (the second most probable class)
                     and second_probability

With `--unknown`, a cloud is unknown if it resembles none of the named clouds (those with a name in
names.csv): the cosine between its vector and the nearest class mean is below a threshold, which
`known_clouds` computes. In labels.csv, the class of an unknown cloud is `unknown`, its probability
is empty, and `second` is the most probable named class. The cosine with the nearest class mean was
chosen among five measures by experiments in which whole classes were left unnamed
(docs/experiments.md, benchmarks/unknown.py).
"""

import csv
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from jepa3d.data.cloud import ReadError
from jepa3d.evaluation.classifiers import fit_head, one_thread, set_head
from jepa3d.evaluation.descriptors import unit_length
from jepa3d.inference.embed_files import embed_files
from jepa3d.inference.neighbours import display, draw
from jepa3d.inference.predicting import CSV_COLUMNS, two_classes
from jepa3d.inference.vectors import Vectors
from jepa3d.models.heads import UNKNOWN, LinearClassifier
from jepa3d.models.ready import load
from jepa3d.page import document, note, section
from jepa3d.plain import log, printable, write_bytes, write_csv
from jepa3d.training.checkpoint import replace_folder

SHOWN = 6  # clouds shown per cluster
# About this share of the clouds of named classes is wrongly called unknown.
FALSE_ALARMS = 0.05
# The threshold needs at least this many named clouds. With 19 named clouds, the chance that a new
# cloud of their classes has a lower cosine than all of them is 1 in 20, which is FALSE_ALARMS. With
# fewer named clouds, even the lowest of their cosines would give more false alarms.
FEWEST = 19
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
    """Embed the clouds at `paths` and propose clusters; once there are names, train a classifier
    and label all clouds.

    names: a CSV file with names. By default, the names are read from OUT/names.csv. If this file
    does not exist or has no names, the clouds are clustered, and in a terminal the user is asked
    for names. clusters: number of clusters; the default is the square root of half the number of
    clouds, but at least 2 and at most 40. unknown: give the label "unknown" to clouds that resemble
    no named cloud. Raises ValueError for the up axis "none", for a number of clusters that is not
    between 2 and the number of clouds, if there are too few named clouds for `unknown`, if a class
    is named "unknown" although `unknown` is True, and as `embed_files` does. Raises ReadError if
    the file of names cannot be used, and as `embed_files` does.
    """
    if up_axis == "none":
        raise ValueError("--up-axis none: jepa3d predict cannot use it; give x, y or z")
    if names is not None and not names.is_file():
        raise ReadError(f"--names {names}: no such file")
    embed_files(paths, out / "vectors.parquet", model, up_axis)
    vectors = Vectors(out / "vectors.parquet")
    cloud_paths, x = vectors.column("path"), vectors.array()
    names = names or out / "names.csv"
    known = read_names(names, cloud_paths) if names.is_file() else {}
    if not known and names != out / "names.csv":
        raise ReadError(f"{names}: has no name for any of the clouds")
    if known and clusters is not None:
        log.info(f"--clusters {clusters}: ignored, since {names} has names already")
    if not known:
        known = _propose(x, cloud_paths, clusters, up_axis, out)
    if len(set(known.values())) < 2:
        log.info(f"next: name two or more classes in {out}/names.csv, and run again")
        return
    rows = np.array([i for i, path in enumerate(cloud_paths) if path in known])
    classes, y = np.unique([known[cloud_paths[i]] for i in rows], return_inverse=True)
    if unknown and UNKNOWN in classes:
        raise ValueError(f"--unknown: {names} has a class named {UNKNOWN}; rename it")
    threshold, appearance = known_clouds(x, rows, y) if unknown else (-1.0, {})
    head, estimate = fit_head(x[rows], y)
    encoder, spec = load(model), vectors.spec
    settings = vars(encoder)["_hub_mixin_config"], classes.tolist()
    network = LinearClassifier(*settings, spec.layer, spec.pooling, threshold)
    network.encoder.load_state_dict(encoder.state_dict())
    set_head(network, head)
    for name, values in appearance.items():
        getattr(network, name).copy_(torch.from_numpy(values))
    replace_folder(out / "model", network.save_pretrained)
    probability = head.predict_proba(x)
    unlike = network.unknown(torch.from_numpy(x)).numpy()
    order = np.argsort(np.where(unlike, 0, probability.max(1)), kind="stable")
    answers = [two_classes(classes, probability[i], unlike[i]) for i in order]
    labels = [(cloud_paths[i], *two) for i, two in zip(order, answers, strict=True)]
    write_csv(out / "labels.csv", ("path", *CSV_COLUMNS), *labels)
    named = f"{len(rows):,} named clouds of {len(classes)} classes"
    if estimate is None:
        alone = printable(", ".join(classes[np.bincount(y) == 1]))
        needed = f"a second named cloud of each of these classes: {alone}"
        log.info(f"{named}; an estimate of the accuracy needs {needed}")
    else:
        log.info(f"{named}: {100 * estimate:.1f} % correct, cross-validated")
    if unknown:
        expected = "of the clouds that belong to named classes, about 1 in 20 is called so wrongly"
        log.info(f"{unlike.sum():,} clouds are called unknown; {expected}")
    written = f"{out / 'labels.csv'}, {len(x):,} clouds, least certain first"
    log.info(f"written: {written}; to label other clouds, run: jepa3d predict {out}")


def _propose(
    x: np.ndarray, paths: list[str], clusters: int | None, up_axis: str, out: Path
) -> dict[str, str]:
    """Cluster vectors [n, E], and write clusters.html and names.csv. In a terminal, also ask for
    the clusters' names.

    Returns the names typed in the terminal, as a dict from path to name. Raises ValueError for
    a single cloud, for fewer than 2 clusters, or for more clusters than clouds.
    """
    if len(x) < 2:
        raise ValueError("there is only one cloud: label needs at least two")
    default = min(40, max(2, round((len(x) / 2) ** 0.5)))
    count = default if clusters is None else clusters
    if not 2 <= count <= len(x):
        allowed = f"2 to {len(x):,} (the number of clouds)"
        raise ValueError(f"--clusters {count}: give {allowed}")
    # for each cluster: its size, and the paths of the clouds nearest to its centre
    found = cluster(x, count)
    groups = [(len(rows), [paths[i] for i in rows[:SHOWN]]) for rows in found]
    sections = []
    for number, (size, shown) in enumerate(groups, 1):
        titles = [Path(path).name for path in shown]
        drawn = draw(shown, titles, up_axis, "nearest to the centre first")
        files = note(", ".join(map(display, shown)))
        sections.append(section(f"{number}: {size:,} clouds", *drawn, files))
    kind = "spherical k-means of vectors"
    html = document("Clusters", f"{len(groups)} clusters", kind, sections)
    write_bytes(out / "clusters.html", html.encode())
    known, rows = _ask(groups) if sys.stdin.isatty() else {}, []
    for number, (_, shown) in enumerate(groups, 1):
        rows += [(path, known.get(path, ""), number) for path in shown]
    write_csv(out / "names.csv", ("path", "name", "cluster"), *rows)
    files = f"{out / 'clusters.html'} and {out / 'names.csv'}"
    log.info(f"written: {files}, {len(groups)} clusters")
    return known


def cluster(x: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Cluster vectors [n, E] by spherical k-means: each vector is scaled to length 1 before
    k-means. Yields for each cluster the indices of its vectors, the largest cluster first. Within a
    cluster, the vectors are ordered by their distance to its centre, nearest first. If fewer than
    `count` of the vectors differ, there are fewer clusters.
    """
    unit = unit_length(x)
    with one_thread(), warnings.catch_warnings():
        # sklearn warns of equal vectors
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(count, n_init=4, random_state=_SEED).fit(unit)
    distance = np.linalg.norm(unit - means.cluster_centers_[means.labels_], axis=1)
    sizes = np.bincount(means.labels_)
    for number in np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]:
        inside = np.flatnonzero(means.labels_ == number)
        yield inside[np.argsort(distance[inside], kind="stable")]


def read_names(file: Path, paths: list[str]) -> dict[str, str]:
    """Read the rows of a CSV file that have a name; returns a dict from path to name.

    Raises ReadError for a file that cannot be used, or if a path with a name is not among `paths`.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReadError(f"{file}: not a CSV file in UTF-8 ({error})") from error
    known, embedded = {}, set(paths)
    for row in rows:
        if not {"path", "name"} <= row.keys():
            raise ReadError(f"{file}: needs columns path and name, has {[*row]}")
        if not (name := (row["name"] or "").strip()):
            continue
        if not row["path"]:
            raise ReadError(f"{file}: the name {name!r} has no path")
        spellings = row["path"], os.path.abspath(row["path"])
        if not (path := next((path for path in spellings if path in embedded), None)):
            raise ReadError(f"{file}: {row['path']} is not among the embedded clouds")
        known[path] = name
    return known


def _ask(groups: list[tuple[int, list[str]]]) -> dict[str, str]:
    """Ask for the clusters' names in the terminal. Returns a dict from path to name for the clouds
    that clusters.html shows.

    groups: the size of each cluster, and the paths of its clouds that are shown.
    """
    known = {}
    print("Name the clusters that clusters.html shows; several may have the same name.")
    print("Press Enter to skip a cluster, Ctrl-D to end.")
    for number, (size, shown) in enumerate(groups, 1):
        files = printable(", ".join(Path(path).name for path in shown[:3]))
        print(f"{number}: {size:,} clouds, such as {files}")
        try:
            name = input("   name: ").strip()
        except EOFError:
            break
        known |= {path: name for path in shown if name}
    return known


def known_clouds(
    x: np.ndarray, rows: np.ndarray, y: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Compute, from the named clouds, the threshold below which a cloud is called unknown.

    x: vectors [n, E] of all clouds. rows: indices of the named clouds in x. y: class numbers of the
    named clouds. Returns the threshold and three arrays. `shift` [E] and `spread` [E] are the mean
    and standard deviation of all vectors, by which vectors are standardised. `means` [classes, E]
    are the class means of the named clouds' standardised vectors; each vector, and then each mean,
    is scaled to length 1. The threshold applies to the cosine between a standardised vector and the
    nearest class mean.

    The threshold is chosen so that about 95 % of the named clouds reach it. For this choice, the
    mean of a cloud's own class is computed without the cloud itself; so a cloud that is the only
    named one of its class is not counted. Raises ValueError if fewer than `FEWEST` named clouds are
    counted.
    """
    shift, spread = x.mean(0), np.maximum(x.std(0), 1e-12)
    named = unit_length((x[rows] - shift) / spread)
    sums = np.stack([named[y == number].sum(0) for number in range(y.max() + 1)])
    inside = np.flatnonzero(np.bincount(y)[y] > 1)
    if len(inside) < FEWEST:
        needed = f"at least {FEWEST} named clouds in classes with two or more of them"
        count = f"there are {len(inside)}; name more"
        raise ValueError(f"--unknown: needs {needed}, but {count}")
    cosines, every = named @ unit_length(sums).T, np.arange(len(y))
    cosines[every, y] = (named * unit_length(sums[y] - named)).sum(1)
    lowest = np.sort(cosines[inside].max(1))
    threshold = float(lowest[int(FALSE_ALARMS * (len(inside) + 1)) - 1])
    return threshold, {"shift": shift, "spread": spread, "means": unit_length(sums)}
