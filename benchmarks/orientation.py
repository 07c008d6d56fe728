"""Measure how much accuracy `--up-axis none` costs in a search, on 250 random shapes of a train
split.

    python benchmarks/orientation.py modelnet10_1024.npz
    python benchmarks/orientation.py psb_2048.npz --labels-key labels_coarse --up-axis y

Each shape is a query among the other shapes, which are upright: once it is upright too, and once it
is rotated by a random rotation. The script prints mAP, the percentage of queries whose nearest
shape has the same class, and the lowest cosine between the vectors of a shape and of its rotated
copy.
"""

import numpy as np
from common import labelled_arguments

import jepa3d
from jepa3d.data.corruptions import corrupt
from jepa3d.data.datasets import load
from jepa3d.evaluation.descriptors import cosine
from jepa3d.evaluation.retrieval import search


def main() -> None:
    arguments = labelled_arguments(__doc__).parse_args()
    axes, key = [arguments.up_axis], arguments.labels_key
    shapes = load([arguments.data], jepa3d.load().num_points, "train", axes, key)
    chosen = np.random.default_rng(0).permutation(len(shapes))[:250]
    upright, labels = shapes.points[chosen], shapes.labels[chosen]
    turned = np.stack([corrupt(upright[row], "turned any way", 0, row) for row in range(250)])
    print("| mAP / nearest correct, in % | upright queries | rotated queries | lowest cosine |")
    print("|---|---|---|---|")
    for up_axis in ("z", "none"):
        gallery, queries = (jepa3d.embed(c, up_axis=up_axis) for c in (upright, turned))
        scores = []
        for asked_with in (gallery, queries):
            found = search(cosine, asked_with, gallery, labels, np.arange(250))
            nearest, average = 100 * np.nanmean(found, axis=1)
            scores.append(f"{average:.1f} / {nearest:.1f}")
        lowest = cosine(queries, gallery).diagonal().min()
        print(f"| `--up-axis {up_axis}` | {' | '.join(scores)} | {lowest:.7f} |", flush=True)


if __name__ == "__main__":
    main()
