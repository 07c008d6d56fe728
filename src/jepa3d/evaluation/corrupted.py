"""`--corruptions` of retrieval and probe: what frozen vectors are worth for damaged shapes.

A shape is corrupted before the frame, from all the points that its source has (data/corruptions.py
has the kinds), for the encoder and everything beside it alike. The clean shapes that are searched,
or that classifiers were fitted to, stay as they are. Nothing is chosen.
"""

from typing import Any, Literal

import numpy as np

from jepa3d.data.corruptions import KINDS, corrupt
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.paired import Score, classifying, searching
from jepa3d.evaluation.probe import QUICK_C
from jepa3d.evaluation.protocol import provenance
from jepa3d.evaluation.retrieval import data_record, opened
from jepa3d.evaluation.tables import Sheet

QUERIES = 400  # at most; where a kind has five severities, half as many at each


def corrupted(
    task: Literal["retrieval", "probe"],
    models: list[str],
    dataset: LabelledSet,
    part: str = "test",
) -> dict[str, Any]:
    """What each model and the first one's baselines reach on corrupted shapes of a part.

    retrieval: nearest shape right and mAP in the clean part without the shape itself. probe:
    accuracy of logistic_10 and knn fitted to clean train shapes. For every kind, lists over its
    severities. Raises ValueError and ReadError.
    """
    searches = task == "retrieval"
    record: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {
        kind: {
            "levels": list(KINDS[kind].levels) if kind in KINDS else [0],
            "trained": kind not in KINDS or KINDS[kind].trained,
            "results": {},
        }
        for kind in ("clean", *KINDS)
    }
    for encoder, descriptors, shapes in opened(models, dataset, part, whole=True):
        train, clouds, labels = shapes.train, shapes.test, shapes.y_test
        asked = np.arange(len(labels))
        if searches:  # a shape alone in its class has nothing to be found
            asked = asked[np.bincount(labels)[labels] > 1]
        asked = np.sort(np.random.default_rng(0).permutation(asked)[:QUERIES])
        clean = encoder.prepare((clouds if searches else train).points[:])
        scores: dict[str, Score] = {}
        for name, (of, likeness) in descriptors.items():
            scores[name] = (
                searching(likeness, of(clean), labels)
                if searches
                else classifying(of(clean), shapes.y, labels)
            )
        for kind, row in found.items():
            rows = asked[:: 1 if len(row["levels"]) == 1 else 2]
            results: dict[str, dict[str, list[float]]] = {name: {} for name in descriptors}
            for severity in range(len(row["levels"])):
                given = [clouds.points[i] for i in rows]
                if kind in KINDS:
                    pairs = zip(given, rows, strict=True)
                    given = [corrupt(cloud, kind, severity, i) for cloud, i in pairs]
                points = encoder.prepare(given)
                for name, (of, _) in descriptors.items():
                    for figure, values in scores[name](of(points), rows).items():
                        results[name].setdefault(figure, []).append(float(values.mean()))
            row["results"] |= results
        record = data_record(task, shapes, dataset, part)
        record |= ({} if searches else {"train": len(train)}) | {"queries": len(asked)}
    return record | {"corruptions": found} | provenance()


def sheet(result: dict[str, Any]) -> Sheet:
    """The table of a result: a row a kind, a column a vector, means over severities."""
    data, rows = result["data"], result["corruptions"]
    how = "searched among the clean shapes, without their own"
    figures = "nearest right / mAP"
    if result["task"] == "probe":
        figures = "10 labels a class / kNN"
        how = (
            f"classified by logistic_10 and knn fitted to {result['train']:,} clean train shapes "
            f"(last layer, C {QUICK_C})"
        )
    title = (
        f"{data['name']} ({data['labels_key']}), {data['part']} part: {result['queries']:,} "
        f"shapes of {result['classes']} classes, corrupted before the frame and {how}; %, nothing "
        "chosen.\nThe first seven kinds: mean of PointCloud-C's five severities, at each every "
        "second shape.\n* the encoder of the package was never trained with it"
    )
    cells = []
    for kind, row in rows.items():
        line = [kind if row["trained"] else f"{kind} *"]
        for found in row["results"].values():
            line.append(" / ".join(f"{np.mean(values):.1f}" for values in found.values()))
        cells.append(line)
    return Sheet(title, [figures, *rows["clean"]["results"]], cells, [])
