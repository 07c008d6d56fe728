"""The option `--corruptions` of `jepa3d retrieval` and `jepa3d probe`: how well the frozen
vectors of corrupted shapes retrieve shapes of the same class, or predict the class.

First a shape is corrupted in one of the ways that data/corruptions.py lists. Shapes of an .npz
bundle or a store are corrupted with all of their points. Then frame.py normalises the corrupted
shape and chooses the points that the networks see. The baselines are an untrained encoder and the
handcrafted descriptors of descriptors.py. The encoder and the baselines are given the same
corrupted shape. The shapes that are searched, or to which classifiers are fitted, are not
corrupted. No setting is tuned: the layer and the regularisation C are fixed.
"""

from typing import Any, Literal

import numpy as np

from jepa3d.data.corruptions import KINDS, corrupt
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.paired import Score, classifying, searching
from jepa3d.evaluation.probe import QUICK_C
from jepa3d.evaluation.protocol import provenance
from jepa3d.evaluation.retrieval import data_record, opened, queries_of
from jepa3d.evaluation.tables import Sheet

# At most this many shapes are corrupted. A kind of corruption with five severities is scored on
# every second one of these shapes only, and on the same shapes at each severity.
QUERIES = 400


def corrupted(
    task: Literal["retrieval", "probe"],
    models: list[str],
    dataset: LabelledSet,
    part: str = "test",
) -> dict[str, Any]:
    """Score each model, and the baselines of the first model, on corrupted shapes of a split.

    task: "retrieval" searches the clean shapes of the split, except the clean copy of the query.
    Its metrics are mAP and the share of queries whose nearest neighbour has the query's class. The
    metrics of "probe" are the accuracies of two protocols of probe.py, logistic_10 and knn, whose
    classifiers are fitted to clean train shapes. part: the split, see `opened` in retrieval.py.
    Returns the result record. For clean shapes and for every kind of corruption, the record has one
    list for each metric of each model or baseline, with one score per severity. Raises ValueError
    or ReadError if a model or the data cannot be used.
    """
    searches = task == "retrieval"
    record: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {"clean": {"levels": [0], "trained": True, "results": {}}}
    for kind, (_, levels, trained) in KINDS.items():
        found[kind] = {"levels": list(levels), "trained": trained, "results": {}}
    for encoder, descriptors, shapes in opened(models, dataset, part, whole=True):
        train, clouds, labels = shapes.train, shapes.test, shapes.y_test
        # for a shape that is alone in its class, there is no shape to retrieve
        queries = queries_of(shapes) if searches else np.arange(len(labels))
        queries = np.sort(np.random.default_rng(0).permutation(queries)[:QUERIES])
        clean = encoder.prepare((clouds if searches else train).points[:])
        scores: dict[str, Score] = {}
        for name, (of, likeness) in descriptors.items():
            scores[name] = (
                searching(likeness, of(clean), labels)
                if searches
                else classifying(of(clean), shapes.y, labels)
            )
        for kind, row in found.items():
            rows = queries[:: 1 if len(row["levels"]) == 1 else 2]
            row["results"] |= {name: {} for name in descriptors}
            for severity in range(len(row["levels"])):
                shown = [clouds.points[i] for i in rows]
                if kind in KINDS:
                    pairs = zip(shown, rows, strict=True)
                    shown = [corrupt(cloud, kind, severity, i) for cloud, i in pairs]
                points = encoder.prepare(shown)
                for name, (of, _) in descriptors.items():
                    for metric, values in scores[name](of(points), rows).items():
                        means = row["results"][name].setdefault(metric, [])
                        means.append(float(values.mean()))
        record = data_record(task, shapes, dataset, part)
        record |= {} if searches else {"train": len(train)}
        record["queries"] = len(queries)
    return record | {"corruptions": found} | provenance()


def sheet(result: dict[str, Any]) -> Sheet:
    """Return the table of a result. It has a row for clean shapes, a row for each kind of
    corruption, and a column for each model or baseline. Scores are means over severities.
    """
    data, rows = result["data"], result["corruptions"]
    how = "each compared with the clean copies of the other shapes"
    metrics = "nearest correct / mAP"
    if result["task"] == "probe":
        metrics = "10 labels a class / kNN"
        how = (
            f"classified by logistic_10 and knn, fitted to {result['train']:,} clean train shapes "
            f"(last layer, C {QUICK_C})"
        )
    title = (
        f"{data['name']} ({data['labels_key']}), {data['part']} split: {result['queries']:,} "
        f"shapes of {result['classes']} classes, corrupted before they are normalised, {how}; "
        "scores in %; no setting was chosen.\nThe first seven kinds of corruption are those of "
        "PointCloud-C. Their scores are means over five severities, on every second shape.\n"
        "* the encoder in the package was not trained with this corruption"
    )
    lines = []
    for kind, row in rows.items():
        line = [kind if row["trained"] else f"{kind} *"]
        for found in row["results"].values():
            line.append(" / ".join(f"{np.mean(values):.1f}" for values in found.values()))
        lines.append(line)
    return Sheet(title, [metrics, *rows["clean"]["results"]], lines, [])
