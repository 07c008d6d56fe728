"""Measure the accuracy of `jepa3d label` with 5 named shapes per class, on the 21 coarse classes of
PSB (Princeton Shape Benchmark). Shapes of the train split are named; the test split is scored.

    python benchmarks/label.py $JEPA3D_DATA/psb/psb_2048.npz

The script prints the mean and sample standard deviation over random choices of the named shapes. No
setting is selected on the test split.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

from jepa3d.inference.label import label


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    bundle = np.load(options.bundle)
    classes, split, names = bundle["labels_coarse"], bundle["split"], bundle["coarse_names"]
    both = np.intersect1d(classes[split == 0], classes[split == 1])
    test = np.flatnonzero((split == 1) & np.isin(classes, both))
    paths = [f"{options.bundle.absolute()}#{i}" for i in range(len(classes))]
    overall, by_class = [], []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for seed in range(options.draws):
            rng = np.random.default_rng(seed)
            halves = [np.flatnonzero((classes == c) & (split == 0)) for c in both]
            rows = [
                (paths[i], names[classes[i]])
                for half in halves
                for i in rng.permutation(half)[: options.shots]
            ]
            with (out / "names.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("path", "name"), *rows])
            label([options.bundle], out / "labels", options.model, "y", names=out / "names.csv")
            with (out / "labels" / "labels.csv").open(newline="") as file:
                found = {row["path"]: row["class"] for row in csv.DictReader(file)}
            right = np.array([found[paths[i]] == names[classes[i]] for i in test])
            overall.append(100 * right.mean())
            by_class.append(100 * np.mean([right[classes[test] == c].mean() for c in both]))
    for name, values in (("overall accuracy", overall), ("mean class accuracy", by_class)):
        mean, std = np.mean(values), np.std(values, ddof=1)
        print(f"{name}: {mean:.1f} ± {std:.1f}, {len(test)} test shapes, {len(both)} classes")


if __name__ == "__main__":
    main()
