"""Compare the packaged encoder with the handcrafted geometry descriptor: mAP, kNN accuracy, and
accuracy with 10 labels per class, with paired intervals.

    python benchmarks/ahead.py modelnet10_1024.npz                # test split, used once
    python benchmarks/ahead.py psb_2048.npz --labels-key labels_coarse --up-axis y

Both get the same clouds. No setting is selected on the data: the vectors are those of the last
layer, and the classifier has C 0.1, as in `jepa3d probe --quick` and `jepa3d retrieval`. The
intervals are over test shapes, as in `jepa3d compare` for a single training run.
"""

import numpy as np
from common import labelled_arguments

import jepa3d
from jepa3d.evaluation.descriptors import baselines, cosine
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.paired import METRICS, Vectors, difference, outcomes
from jepa3d.evaluation.retrieval import vectors_of


def main() -> None:
    arguments = labelled_arguments(__doc__).parse_args()
    encoder = jepa3d.load()
    asked = LabelledSet(arguments.data, arguments.labels_key, arguments.up_axis)
    shapes = asked.read(encoder.num_points, "test")
    train, scored = (encoder.prepare(part.points[:]) for part in (shapes.train, shapes.test))
    of, likeness = baselines(encoder, train)["geometry"]
    made = {
        "default": Vectors(vectors_of(encoder, train), vectors_of(encoder, scored), cosine),
        "geometry": Vectors(of(train), of(scored), likeness),
    }
    found = {
        name: outcomes(vectors, shapes.y, shapes.y_test, seed=0) for name, vectors in made.items()
    }
    print(f"{shapes.name}: {len(shapes.train):,} train, {len(shapes.test):,} test shapes, seed 0\n")
    print(
        "| | default | geometry | default - geometry, 95 % over shapes | |\n|---|---|---|---|---|"
    )
    for metric, meaning in METRICS.items():
        ours, theirs = (found[name][metric][None] for name in made)
        kept = np.isfinite(ours + theirs)[0]
        gain = difference(ours[:, kept], theirs[:, kept])
        means = f"{ours[:, kept].mean():.1f} | {theirs[:, kept].mean():.1f}"
        print(
            f"| {meaning} | {means} | {gain.mean:+.1f} ({gain.low:+.1f} to {gain.high:+.1f}) | {gain.verdict} |"
        )


if __name__ == "__main__":
    main()
