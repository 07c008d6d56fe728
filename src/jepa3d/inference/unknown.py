"""Which clouds are like none of the named ones: the cosine to the nearest class mean, and the
threshold it must reach.

Chosen among five such measures by leaving out whole classes: docs/experiments.md,
benchmarks/unknown.py.
"""

from typing import NamedTuple

import numpy as np

from jepa3d.evaluation.descriptors import unit_length

FALSE_ALARMS = 0.05  # share of clouds of the named classes that are called unknown
# named clouds from which on so small a share can be measured: the lowest of 19 is one case of 20
FEWEST = 19


class Known(NamedTuple):
    """What the named clouds look like: vectors are standardised by shift and spread, then compared
    by cosine.
    """

    shift: np.ndarray  # E, the mean of all vectors
    spread: np.ndarray  # E, their standard deviation
    means: np.ndarray  # classes E, of length 1: the direction of each class
    least: float  # cosine to the nearest of them below which a cloud is unknown


def known_clouds(x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> Known:
    """Class means of the named rows of vectors n E, with classes y (rows), and the threshold
    measured on them.

    Every named cloud is compared with its class without it; the threshold is what 95 % of them
    reach. A class of one named cloud takes no part in that. Raises ValueError for fewer than
    `FEWEST` others.
    """
    shift, spread = x.mean(0), np.maximum(x.std(0), 1e-12)
    named = unit_length((x[rows] - shift) / spread)
    sums = np.stack([named[y == number].sum(0) for number in range(y.max() + 1)])
    inside = np.flatnonzero(np.bincount(y)[y] > 1)
    if len(inside) < FEWEST:
        raise ValueError(
            f"--unknown: its threshold needs {FEWEST} named clouds at least, of classes that have two or more, "
            f"and there are {len(inside)}; name more"
        )
    cosines, alone = named @ unit_length(sums).T, np.arange(len(y))
    cosines[alone, y] = (named * unit_length(sums[y] - named)).sum(1)
    least = np.sort(cosines[inside].max(1))[int(FALSE_ALARMS * (len(inside) + 1)) - 1]
    return Known(shift, spread, unit_length(sums), float(least))
