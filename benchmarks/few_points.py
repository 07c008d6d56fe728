"""Compare rules that fill up clouds with few points.

    python benchmarks/few_points.py PSB.npz    # y up, with the arrays split and labels_coarse

The script uses those shapes of the train split whose class has at least 8 shapes. Each of them is
reduced to a few random points and is then a query among all other shapes, which keep their points.
For `frame.fill` and for other rules, the script prints the percentage of queries whose nearest
shape has the same class.
"""

import sys

import numpy as np

from jepa3d import embed, frame, load


def as_they_are(points: np.ndarray, num_points: int) -> tuple[np.ndarray, None]:
    """Repeat points only up to a multiple of 64, so that a batch is still one tensor."""
    return points[np.arange(-(-len(points) // 64) * 64) % len(points)], None


def moved_by_noise(share: float = 0.0, spacings: float = 0.0):
    """Return a rule that repeats points and adds normal noise to the copies.

    The standard deviation of the noise is the sum of two terms: `share` times the largest distance
    from the mean, and `spacings` times the median distance between neighbours.
    """

    def fill(points: np.ndarray, num_points: int) -> tuple[np.ndarray, None]:
        noise = np.random.RandomState(0).standard_normal((num_points, 3)).astype(np.float32)
        noise[: len(points)] = 0
        distance = np.linalg.norm(points[:, None] - points, axis=2)
        spacing = np.median(np.partition(distance, 1, axis=1)[:, 1])
        reach = share * np.linalg.norm(points - points.mean(0), axis=1).max() + spacings * spacing
        return points[np.arange(num_points) % len(points)] + reach * noise, None

    return fill


# name of a rule -> function with the arguments and results of `frame.fill`
RULES = {
    "as they are": as_they_are,
    "exact copies": moved_by_noise(),
    "noise 0.5 %": moved_by_noise(0.005),
    "noise 2 %": moved_by_noise(0.02),
    "noise 0.6 spacings": moved_by_noise(0, 0.6),
    "frame.fill": frame.fill,
}


def main(path: str) -> None:
    data, encoder = np.load(path), load()
    train = data["split"] == 0
    labels, clouds = (
        data["labels_coarse"][train].astype(int),
        data["points"][train].astype(np.float32),
    )
    some = np.isin(labels, np.flatnonzero(np.bincount(labels) >= 8))
    labels, clouds = labels[some], clouds[some]

    def vectors(chosen) -> np.ndarray:
        made = embed(chosen, encoder, up_axis="y")
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    whole = vectors(clouds)
    print(
        f"{len(clouds)} shapes, {len(set(labels))} classes; whole {nearest_correct(whole, whole, labels):.1f}"
    )
    for count in (512, 256, 64):
        rng = np.random.default_rng(count)
        cut = [cloud[rng.choice(len(cloud), count, replace=False)] for cloud in clouds]
        for name, rule in RULES.items():
            frame.fill = rule
            print(
                f"{count:4d} points, {name:20s} {nearest_correct(vectors(cut), whole, labels):.1f}",
                flush=True,
            )


def nearest_correct(queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray) -> float:
    """Return the percentage of queries whose nearest other shape has the same class."""
    cosine = queries @ gallery.T
    np.fill_diagonal(cosine, -1)
    return 100 * float((labels[cosine.argmax(1)] == labels).mean())


if __name__ == "__main__":
    main(sys.argv[1])
