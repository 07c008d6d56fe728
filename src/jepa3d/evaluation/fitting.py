"""Fitting classifiers: each on one thread, many of them side by side on all cores."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

from threadpoolctl import ThreadpoolController

from jepa3d.data.parallel import mapped

# Numbers that the fits read in all, from which on starting processes pays: about 4 seconds of
# logistic regression.
_WORTH_PROCESSES = 2**22


def one_thread() -> AbstractContextManager:
    """Within it BLAS, OpenMP and torch use one thread each; call it after scikit-learn is imported.

    A solver multiplies small matrices thousands of times. A BLAS library that shares each product
    among all cores makes them wait for one another, actively: on two cores the same fits took 2 to
    16 times the processor time, and far more beside a busy core.
    """
    return _libraries().limit(limits=1)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # finding them takes milliseconds, as long as a small fit


def side_by_side(fit: Callable, jobs: Sequence[tuple], numbers: int) -> list[Any]:
    """`fit(*job)` of every job, in order; in processes, one a core, if many numbers are read.

    fit: a function of a module that never returns a text. numbers: how many all fits read.
    """
    workers = min(os.cpu_count() or 1, len(jobs)) if numbers > _WORTH_PROCESSES else 1
    found = mapped(partial(_fits, fit), list(jobs), 1, workers, "fitting", fit.__module__)
    # A text says that a process died, perhaps for lack of memory: fit alone, in this process.
    return [fit(*job) if isinstance(result, str) else result for job, result in found]


def _fits(fit: Callable, jobs: list[tuple]) -> list[Any]:
    with one_thread():
        return [fit(*job) for job in jobs]
