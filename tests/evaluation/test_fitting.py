"""Fits with one thread each in several processes: results do not depend on their number."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from jepa3d.data import parallel
from jepa3d.evaluation import classifiers
from jepa3d.evaluation.classifiers import one_thread, predict, side_by_side
from jepa3d.evaluation.probe import run_protocol


def most_threads() -> int:
    return max(library["num_threads"] for library in threadpool_info())


def look(scale: int) -> tuple[int, int]:
    return scale * most_threads(), os.getpid()


def leave_a_process(scale: int) -> int:
    """End the process if it is a child, as the kernel does when memory runs out."""
    return scale if multiprocessing.parent_process() is None else os._exit(9)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(classifiers, "_WORTH_PROCESSES", 0)


def test_every_library_has_one_thread_within_and_what_it_had_after():
    with threadpool_limits(limits=2):
        before = most_threads(), torch.get_num_threads()
        with one_thread():
            assert (most_threads(), torch.get_num_threads()) == (1, 1)
        assert (most_threads(), torch.get_num_threads()) == before == (2, 2)


@pytest.mark.parametrize("protocol", ["logistic", "knn", "svc_linear", "linear_svc", "mlp3"])
def test_a_classifier_is_fitted_on_one_thread(protocol, monkeypatch):
    seen, made = [], classifiers._classifier
    monkeypatch.setattr(classifiers, "_STEPS", 2)
    monkeypatch.setattr(
        classifiers, "_classifier", lambda *choice: seen.append(most_threads()) or made(*choice)
    )
    rng = np.random.default_rng(0)
    with threadpool_limits(limits=2):
        predict(protocol, 0.1, rng.normal(size=(20, 4)), np.arange(20) % 2, rng.normal(size=(5, 4)))
    assert seen == [1]


def test_small_fits_stay_in_this_process_and_large_ones_are_shared_in_order(two_cores):
    assert [pid for _, pid in side_by_side(look, [(1,), (2,)], 0)] == [os.getpid()] * 2
    found = side_by_side(look, [(scale,) for scale in range(8)], 1)
    assert [value for value, _ in found] == list(range(8))  # one thread each
    assert os.getpid() not in {pid for _, pid in found}


def test_a_fit_whose_process_dies_is_done_here(two_cores, monkeypatch):
    # The second try, with a separate process per job, crashes too.
    monkeypatch.setattr(parallel, "_alone", lambda *_: parallel.CRASHED)
    assert side_by_side(leave_a_process, [(3,), (4,)], 1) == [3, 4]


@pytest.mark.parametrize("protocol", ["logistic", "logistic_10", "knn"])
def test_a_probe_chooses_the_same_side_by_side(protocol, monkeypatch):
    rng = np.random.default_rng(0)
    y, y_test = np.arange(90) % 3, np.arange(60) % 3
    means = rng.normal(size=(3, 6))
    x, x_test = (
        np.stack([gap * means[half] + rng.normal(size=(len(half), 6)) for gap in (0.3, 0.8, 0.6)])
        for half in (y, y_test)
    )
    found = []
    for worth in (10**9, 0):
        monkeypatch.setattr(classifiers, "_WORTH_PROCESSES", worth)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        found.append(run_protocol(protocol, x, y, x_test, y_test, [0, 1, 2]))
    assert found[0] == found[1]
