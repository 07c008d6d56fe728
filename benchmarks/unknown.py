"""Compare five measures that tell clouds of unknown classes from clouds of named classes; some
classes are left out to serve as unknown ones.

    python benchmarks/unknown.py $JEPA3D_DATA/modelnet10/modelnet10_1024.npz
    python benchmarks/unknown.py $JEPA3D_DATA/psb/psb_2048.npz --labels-key labels_coarse --up-axis y

Only the train split is used. Each random draw leaves out three tenths of the classes, and names
some clouds of each other class. The threshold of a measure is chosen such that 95 % of the named
clouds reach it when they are held out. Clouds below the threshold are called unknown. The script
prints means and sample standard deviations over draws of three numbers: the area under the ROC
curve (AUROC); the percentage of clouds of named classes that are called unknown (false alarms); and
the percentage of clouds of the classes left out that are called unknown (found).
"""

from collections.abc import Callable

import numpy as np
from common import labelled_arguments
from scipy.special import softmax
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jepa3d.data.datasets import load
from jepa3d.evaluation.classifiers import one_thread
from jepa3d.evaluation.descriptors import unit_length
from jepa3d.evaluation.features import layer_features
from jepa3d.inference.label import FALSE_ALARMS, known_clouds
from jepa3d.models.ready import load as load_encoder

LEFT_OUT, MOST = (
    0.3,
    600,
)  # share of classes left out; largest number of clouds that are scored, of each of the two kinds
Measured = tuple[float, np.ndarray]  # a threshold, and the similarity of every cloud


def by_class_mean(x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> Measured:
    """Measure the cosine to the nearest class mean, as `jepa3d label --unknown` does.

    x: vectors n E. rows: indices of the named clouds. y: their classes.
    """
    least, looks = known_clouds(x, rows, y)
    standard = unit_length((x - looks["shift"]) / looks["spread"])
    return least, (standard @ looks["means"].T).max(1)


def by_nearest(x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> Measured:
    """Measure the cosine to the nearest named cloud."""
    cosines = unit_length(x) @ unit_length(x[rows]).T
    held = cosines[rows]
    np.fill_diagonal(held, -1)
    return threshold(held.max(1)), cosines.max(1)


def by_logits(how: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Measured]:
    """Return a measure from the logits of a linear classifier.

    how: logits n C -> similarities n.
    """

    def measure(x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> Measured:
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        held = np.empty(len(rows))
        for fit, out in KFold(20, shuffle=True, random_state=0).split(rows):
            held[out] = how(clone(head).fit(x[rows[fit]], y[fit]).decision_function(x[rows[out]]))
        return threshold(held), how(head.fit(x[rows], y).decision_function(x))

    return measure


def threshold(held: np.ndarray) -> float:
    """Return the similarity that 95 % of the held-out named clouds reach."""
    return float(np.sort(held)[int(FALSE_ALARMS * (len(held) + 1)) - 1])


def standardised(measure: Callable[..., Measured]) -> Callable[..., Measured]:
    """Return a measure that first standardises the vectors."""
    return lambda x, rows, y: measure((x - x.mean(0)) / x.std(0), rows, y)


MEASURES = {
    # jepa3d label --unknown uses this measure
    "cosine to the nearest class mean, standardised": by_class_mean,
    "cosine to the nearest named cloud, standardised": standardised(by_nearest),
    "cosine to the nearest named cloud": by_nearest,
    "largest logit": by_logits(lambda z: z.max(1)),
    "largest probability": by_logits(lambda z: softmax(z, 1).max(1)),
}


def draw(
    x: np.ndarray, labels: np.ndarray, shots: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Leave out some classes, and score every measure.

    Returns for each measure the AUROC, the false alarms and the clouds found, in per cent.
    """
    rng = np.random.default_rng(seed)
    classes = rng.permutation([c for c in np.unique(labels) if (labels == c).sum() >= shots + 3])
    inside = np.sort(classes[round(LEFT_OUT * len(classes)) :])
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in inside])
    y = np.searchsorted(inside, labels[rows])
    others = np.setdiff1d(np.arange(len(labels)), rows)
    parts = [others[np.isin(labels[others], inside, invert=out)] for out in (False, True)]
    ours, strange = (rng.permutation(part)[:MOST] for part in parts)
    truth, scored, found = np.repeat([1, 0], [len(ours), len(strange)]), np.r_[ours, strange], {}
    for name, measure in MEASURES.items():
        least, likeness = measure(x, rows, y)
        called = [100 * float((likeness[part] < least).mean()) for part in (ours, strange)]
        found[name] = (100 * roc_auc_score(truth, likeness[scored]), *called)
    return found


def main() -> None:
    parser = labelled_arguments(__doc__)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    encoder = load_encoder()
    clouds = load(
        [options.data], encoder.num_points, "train", [options.up_axis], options.labels_key
    )
    assert clouds.labels is not None
    x = layer_features(encoder, clouds)[-1]
    for shots in options.shots:
        with one_thread():
            draws = [draw(x, clouds.labels, shots, seed) for seed in range(options.draws)]
        print(
            f"\n| {shots} named clouds per class | AUROC | false alarms | found |\n|---|---|---|---|"
        )
        for name in MEASURES:
            figures = np.array([found[name] for found in draws])
            cells = [
                f"{m:.1f} ± {s:.1f}"
                for m, s in zip(figures.mean(0), figures.std(0, ddof=1), strict=True)
            ]
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
