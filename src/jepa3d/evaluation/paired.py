"""Paired differences between rows of a comparison: the interval over seeds and shapes, the verdict,
the tables.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import t as student

from jepa3d.evaluation.outcomes import METRICS
from jepa3d.evaluation.protocol import moments
from jepa3d.evaluation.tables import Sheet, mean_std

Outcomes = dict[str, np.ndarray]  # metric -> per cent of every shape in every run, seeds shapes


class Difference(NamedTuple):
    """A mean difference in points and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """Decided only where the whole interval lies on one side of 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Mean of ours - theirs and its 95 % interval, both seeds x shapes: the same seeds and shapes
    on both sides.

    Seeds and shapes are both drawn at random, and a shape that is hard for one run is hard for the
    others. With d[s, i] = ours - theirs of S seeds and N shapes, and sample variances,

        variance = A + B,  A = var_s(mean_i d) / S,  B = var_i(mean_s d) / N

    is that of the mean of a table whose rows and columns are both random (Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1, 2007). It counts what is particular to one cell
    twice, so the interval is rather too wide than too narrow. The quantile is that of Student's t
    with (A + B)^2 / (A^2 / (S - 1) + B^2 / (N - 1)) degrees of freedom (Satterthwaite, Biometrics
    Bulletin 2, 1946). One seed leaves B alone, and says nothing about other training runs.
    """
    gain = ours - theirs
    parts = []  # variance, degrees of freedom
    for axis in (0, 1):
        count = gain.shape[axis]
        if count > 1:
            parts.append((gain.mean(1 - axis).var(ddof=1) / count, count - 1))
    variance = sum(part for part, _ in parts)
    mean = float(gain.mean())
    if variance == 0:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    reach = float(student.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - reach, mean + reach)


def stacked(outcomes: list[dict[str, np.ndarray]]) -> Outcomes:
    """Outcomes of each seed as one table a metric, seeds x shapes."""
    return {metric: np.stack([found[metric] for found in outcomes]) for metric in METRICS}


class Row(NamedTuple):
    """One arm or baseline under one metric on one set."""

    data: str
    metric: str
    name: str
    values: list[float]  # of each seed, per cent
    difference: Difference | None  # from the reference; None of itself, or where that failed

    def record(self) -> dict[str, Any]:
        """As JSON."""
        found = self._asdict() | moments(self.values)
        if self.difference:
            found |= {"difference": self.difference._asdict(), "verdict": self.difference.verdict}
        return found


def rows_of(data: str, found: dict[str, Outcomes], reference: str) -> list[Row]:
    """Rows of one set, metric by metric; shapes without a figure (alone in their class) are left
    out of all.
    """
    rows = []
    for metric in METRICS:
        values = {name: outcomes[metric] for name, outcomes in found.items()}
        kept = np.all([np.isfinite(table).all(0) for table in values.values()], 0)
        base = values.get(reference)
        for name, table in values.items():
            pair = (
                None
                if base is None or name == reference
                else difference(table[:, kept], base[:, kept])
            )
            rows.append(Row(data, metric, name, table[:, kept].mean(1).tolist(), pair))
    return rows


def sheets_of(
    rows: list[Row], minutes: dict[str, float], failed: dict[str, str], about: dict[str, str]
) -> list[Sheet]:
    """A table for every set and metric.

    minutes: CPU-minutes of an arm. about: what each set is, in words.
    """
    tables: dict[tuple[str, str], list[list[str]]] = {}
    for row in rows:
        spent, compared = "-", ["-", "-", "-"]
        if row.name in minutes:
            spent, compared[2] = f"{minutes[row.name]:.1f}", "reference"
        if gain := row.difference:
            interval = f"{gain.low:+.1f} to {gain.high:+.1f}"
            compared = [f"{gain.mean:+.1f}", interval, gain.verdict]
        line = [row.name, mean_std(moments(row.values)), *compared, spent]
        tables.setdefault((row.data, row.metric), []).append(line)
    columns = ["", "%", "difference", "95 % interval", "verdict", "CPU-min"]
    return [
        Sheet(
            f"{data}, {METRICS[metric]}: {about[data]}",
            columns,
            lines + [[name, "-", "-", "-", "failed", "-"] for name in failed],
            [],
        )
        for (data, metric), lines in tables.items()
    ]
