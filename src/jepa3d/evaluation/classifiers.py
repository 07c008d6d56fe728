"""The classifiers of the probe's protocols, each fitted on one thread, many of them side by side on all
cores, and accuracy class by class.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import ThreadpoolController
from torch import nn

from jepa3d.data.parallel import mapped
from jepa3d.models.heads import LinearClassifier

# The head of mlp3, and its schedule: the learning rate falls to 0 along half a cosine. The head and
# the decay are Point-MAE's; rate, batch and steps are ours: on a held-out fifth of ModelNet10's
# train part, six times the work (2,000 steps of 128) gained 0.2 to 1.0 points.
_WIDTH, _DROPOUT = 256, 0.5
_LR, _WEIGHT_DECAY, _BATCH, _STEPS = 2e-3, 0.05, 64, 700
# inverse strengths of a linear head's regularisation that are tried
_CS = (0.001, 0.01, 0.1, 1.0)
# Numbers that the fits read in all, from which on starting processes pays: about 4 seconds of
# logistic regression.
_WORTH_PROCESSES = 2**22


class MLP3(ClassifierMixin, BaseEstimator):
    """Point-MAE's classification head on given features: ACT's "MLP-3" protocol without its
    augmentation.

    Trained on the CPU, on batches drawn with replacement. The same seed gives the same head, and
    torch's global random state stays as it was.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def fit(self, x: np.ndarray, y: np.ndarray) -> "MLP3":
        """Train on features x [n, E], already standardised, and labels y [n]."""
        self.classes_, target = np.unique(y, return_inverse=True)
        features, labels = torch.from_numpy(x).float(), torch.from_numpy(target)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            # torch.manual_seed would seed accelerators too
            torch.default_generator.manual_seed(self.seed)
            self.head_ = _head(x.shape[1], len(self.classes_))
            optimizer = torch.optim.AdamW(
                self.head_.parameters(), _LR, weight_decay=_WEIGHT_DECAY, fused=True
            )
            for step in range(_STEPS):
                rate = _LR * (1 + math.cos(math.pi * step / _STEPS)) / 2
                optimizer.param_groups[0]["lr"] = rate
                batch = torch.randint(len(features), (_BATCH,))
                optimizer.zero_grad()
                logits = self.head_(features[batch])
                nn.functional.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
        self.head_.eval()
        return self

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels [n] of features x [n, E]."""
        return self.classes_[self.head_(torch.from_numpy(x).float()).argmax(1).numpy()]


def _head(width: int, classes: int) -> nn.Sequential:
    """E -> 256 -> 256 -> classes."""
    layers: list[nn.Module] = []
    for inputs in (width, _WIDTH):
        layers += [nn.Linear(inputs, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.ReLU()]
        layers.append(nn.Dropout(_DROPOUT))
    return nn.Sequential(*layers, nn.Linear(_WIDTH, classes))


def _classifier(protocol: str, c: float, count: int, seed: int):
    if protocol == "svc_linear":
        return SVC(kernel="linear", C=0.012)
    if protocol == "linear_svc":
        # Its default `dual` is "auto" (scikit-learn 1.5); Point-BERT and Point-MAE had the older
        # one, True.
        return LinearSVC(random_state=0)
    made = LogisticRegression(C=c, max_iter=1000)
    if protocol == "knn":
        made = KNeighborsClassifier(min(10, count), metric="cosine")
    if protocol == "mlp3":
        made = MLP3(seed)
    return make_pipeline(StandardScaler(), made)


def fitted(protocol: str, c: float, x: np.ndarray, y: np.ndarray, seed: int = 0):
    """A protocol's classifier, of scikit-learn, fitted on features x [m, E] and labels y [m].

    `c` matters to logistic regression only, `seed` to mlp3 only.
    """
    with one_thread(), warnings.catch_warnings():
        # LinearSVC on raw features stops at its 1,000 iterations where it needs more, as in its
        # protocol.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _classifier(protocol, c, len(y), seed).fit(x, y)


def predict(
    protocol: str, c: float, train: np.ndarray, y: np.ndarray, test: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Labels [n] of features test [n, E] by the classifier of `fitted` on train [m, E] and y [m]."""
    with one_thread():
        return np.asarray(fitted(protocol, c, train, y, seed).predict(test))


def fit_head(x: np.ndarray, y: np.ndarray) -> tuple[Pipeline, float | None]:
    """Logistic regression on standardised vectors n E of classes n, and its cross-validated
    accuracy, or None.

    The strength of regularisation is chosen by the same folds, so the estimate is a little too
    good. None where a class has one vector only: then nothing can be chosen either.
    """
    folds = min(5, int(np.unique(y, return_counts=True)[1].min()))
    c, accuracy = _CS[2], None
    with one_thread():
        if folds > 1:
            jobs = [(x, y, c, folds) for c in _CS]
            scores = side_by_side(_cross_validated, jobs, len(jobs) * folds * x.size)
            accuracy, c = max(zip(scores, _CS, strict=True), key=lambda pair: pair[0])
        return _linear(c).fit(x, y), accuracy


def _linear(c: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))


def _cross_validated(x: np.ndarray, y: np.ndarray, c: float, folds: int) -> float:
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(cross_val_score(_linear(c), x, y, cv=split).mean())


@torch.no_grad()
def set_head(network: LinearClassifier, head: Pipeline) -> None:
    """Give the network the weights of a fitted head; the standardisation becomes part of them,
    exactly.
    """
    scale, linear = head[0], head[1]
    weight, bias = linear.coef_ / scale.scale_, linear.intercept_
    if len(linear.classes_) == 2:  # scikit-learn has one row: the second class against the first
        weight, bias = (np.concatenate([-found / 2, found / 2]) for found in (weight, bias))
    network.out.weight.copy_(torch.from_numpy(weight))
    network.out.bias.copy_(torch.from_numpy(bias - weight @ scale.mean_))


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Accuracy in per cent of each class of a confusion matrix (rows true, columns predicted); nan
    of a class without shapes.
    """
    counts = confusion.sum(1)
    share = np.diag(confusion) / np.maximum(counts, 1)
    return 100 * np.where(counts > 0, share, np.nan)


def by_class(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> dict[str, dict]:
    """Accuracy in per cent and number of shapes of each class, by name."""
    table = np.array(confusion)
    figures = class_accuracy(table).tolist(), table.sum(1).tolist()
    rows = zip(class_names, *figures, strict=True)
    return {name: {"accuracy": share, "count": count} for name, share, count in rows}


def one_thread() -> AbstractContextManager:
    """A context in which BLAS, OpenMP and torch use one thread each. Import scikit-learn first.

    A solver multiplies small matrices thousands of times. A BLAS library that shares each product
    among all cores makes them wait for one another, actively: on two cores the same fits took 2 to
    16 times the processor time, and far more beside a busy core.
    """
    return _libraries().limit(limits=1)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # finding them takes milliseconds, as long as a small fit


def side_by_side(fit: Callable, jobs: Sequence[tuple], numbers: int) -> list[Any]:
    """Return `fit(*job)` of every job, in order; in one process per core if many numbers are read.

    fit: a function of a module that never returns a text. numbers: how many all fits read.
    """
    workers = min(os.cpu_count() or 1, len(jobs)) if numbers > _WORTH_PROCESSES else 1
    found = mapped(partial(_fits, fit), list(jobs), 1, workers, "fitting", fit.__module__)
    # A text says that a process died, perhaps for lack of memory: fit alone, in this process.
    return [fit(*job) if isinstance(result, str) else result for job, result in found]


def _fits(fit: Callable, jobs: list[tuple]) -> list[Any]:
    with one_thread():
        return [fit(*job) for job in jobs]
