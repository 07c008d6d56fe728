"""Define what the search in Parquet files (search.py) and the search in LanceDB (lance.py) share:
neighbours, their order, and conditions on rows.
"""

import re
from dataclasses import dataclass

import numpy as np

from jepa3d.inference.vectors import pa, pc

# columns of an index on which a condition can be set
COLUMNS = ("path", "label", "num_points")
# Twice the largest rounding error of a cosine in float32, in whichever order its terms are added.
# Two such cosines that differ by less than this may be in the wrong order. So a search computes in
# float64 (`rank`) the cosines of the k best rows and of all rows that are at most this much below.
SLACK = 1e-5
_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<=": pc.less_equal,
    ">=": pc.greater_equal,
    "<": pc.less,
    ">": pc.greater,
    "~": lambda values, pattern: pc.match_substring_regex(values, regex(pattern)),
}


@dataclass(frozen=True)
class Hit:
    """A neighbour: a row of an index (the file or database that was searched), and the cosine of
    its vector with the query.
    """

    cosine: float
    path: str
    label: str | None


def best(hits: list[Hit], k: int) -> list[Hit]:
    """Return the k best hits, best first; hits of equal cosine are ordered by path."""
    return sorted(hits, key=lambda hit: (-hit.cosine, hit.path))[:k]


def rank(
    query: np.ndarray, vectors: np.ndarray, paths: list[str], labels: list, k: int
) -> list[Hit]:
    """Rank vectors [n, E] by their cosine with a query [E] of length 1; returns the k best hits.

    paths and labels: those of the n vectors. The terms of each cosine are summed in float64,
    separately for each vector, and the cosine is rounded to six decimals. So copies of a cloud get
    exactly the same cosine.
    """
    x = vectors.astype(np.float64)
    cosine = np.round((x * query).sum(1) / np.linalg.norm(x, axis=1), 6)
    return best(list(map(Hit, cosine.tolist(), paths, labels)), k)


@dataclass(frozen=True)
class Condition:
    """A condition `COLUMN OP VALUE` on the column path, label or num_points.

    OP is = != < <= > or >=. For path and label, OP can also be ~; VALUE is then a pattern with the
    wildcards * and ?.
    """

    column: str
    compare: str
    value: str | int

    @staticmethod
    def parse(text: str) -> "Condition":
        """Parse a condition. Raises ValueError if the text is not a condition; the message says
        what is allowed.
        """
        shape = r"\s*(\w+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*"
        match = re.fullmatch(shape, text, re.DOTALL)
        if not match or match[1] not in COLUMNS:
            quoted = "write 'COLUMN OP VALUE', quoted since shells interpret < > * ?"
            allowed = f"COLUMN: {', '.join(COLUMNS)}; OP: = != < <= > >= or ~"
            raise ValueError(f"condition {text!r}: {quoted}; {allowed}")
        column, compare, value = match.groups()
        if column != "num_points":
            return Condition(column, compare, value)
        if not re.fullmatch(r"\d+", value) or compare == "~":
            example = "compare with a number, such as 'num_points>=1000'"
            raise ValueError(f"condition {text!r}: {example}")
        # The column has 64-bit numbers; larger ones cannot be compared with it.
        return Condition(column, compare, min(int(value), 2**63 - 1))

    def holds(self, values: list | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Return a mask, True for the values that satisfy the condition. A missing value satisfies
        only `!=`.
        """
        held = _COMPARE[self.compare](values, self.value)
        return np.asarray(pc.fill_null(held, self.compare == "!="))

    def sql(self) -> str:
        """Return the condition as SQL for LanceDB."""
        if isinstance(self.value, int):
            return f"{self.column} {self.compare} {self.value}"
        if self.compare == "~":
            return f"regexp_like({self.column}, {_quoted(regex(self.value))})"
        missing = f" OR {self.column} IS NULL" if self.compare == "!=" else ""
        return f"({self.column} {self.compare} {_quoted(self.value)}{missing})"


def regex(pattern: str) -> str:
    """Turn a pattern with the wildcards * and ? into a regular expression that matches only whole
    texts.
    """
    return f"^(?s:{re.escape(pattern)})$".replace(r"\*", ".*").replace(r"\?", ".")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
