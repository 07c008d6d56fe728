"""Fit the classifiers of the protocols in probe.py, and compute accuracies per class. Each fit uses
one thread. Fits run in parallel on all cores if there is enough work for them.
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

# For mlp3 (the class `MLP3`): its head and weight decay are those of Point-MAE. The learning rate
# (it falls to 0 along half a cosine), the batch size and the number of steps are our choice. Almost
# six times as much work (2,000 steps with batches of 128) raised the accuracy on a held-out fifth
# of ModelNet10's train split by only 0.2 to 1.0 percentage points.
_WIDTH, _DROPOUT = 256, 0.5
_LR, _WEIGHT_DECAY, _BATCH, _STEPS = 2e-3, 0.05, 64, 700
# values of scikit-learn's C (inverse regularisation strength) that `fit_head` tries
_CS = (0.001, 0.01, 0.1, 1.0)
# Fits run in several processes only if together they read more numbers than this. Logistic
# regression on this many numbers takes about 4 seconds. For less work, starting the processes takes
# longer than it saves.
_WORTH_PROCESSES = 2**22


class MLP3(ClassifierMixin, BaseEstimator):
    """Classifier of frozen features with the head of Point-MAE. This is the protocol "MLP-3" of ACT
    (Dong et al., ICLR 2023), but without data augmentation.

    The head is trained on the CPU, on batches sampled with replacement. The same data and seed
    give the same head, and torch's global random state is not changed.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def fit(self, x: np.ndarray, y: np.ndarray) -> "MLP3":
        """Train the head on standardised features x [n, E] with labels y [n]."""
        self.classes_, target = np.unique(y, return_inverse=True)
        features, labels = torch.from_numpy(x).float(), torch.from_numpy(target)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            # not torch.manual_seed, which would also seed the accelerators
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
        """Predict the labels [n] of features x [n, E]."""
        return self.classes_[self.head_(torch.from_numpy(x).float()).argmax(1).numpy()]


def _head(width: int, classes: int) -> nn.Sequential:
    """Create the head, an MLP with two hidden layers: width -> 256 -> 256 -> classes."""
    layers: list[nn.Module] = []
    for inputs in (width, _WIDTH):
        layers += [nn.Linear(inputs, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.ReLU()]
        layers.append(nn.Dropout(_DROPOUT))
    return nn.Sequential(*layers, nn.Linear(_WIDTH, classes))


def _classifier(protocol: str, c: float, count: int, seed: int):
    """Create a protocol's classifier. c, seed: as for `fitted`. count: number of shapes to which it
    will be fitted.
    """
    if protocol == "svc_linear":
        # this C is that of Point-M2AE
        return SVC(kernel="linear", C=0.012)
    if protocol == "linear_svc":
        # Here `dual` is "auto", the default since scikit-learn 1.5; Point-BERT and Point-MAE used
        # the older default, True.
        return LinearSVC(random_state=0)
    classifier = LogisticRegression(C=c, max_iter=1000)
    if protocol == "knn":
        classifier = KNeighborsClassifier(min(10, count), metric="cosine")
    if protocol == "mlp3":
        classifier = MLP3(seed)
    return make_pipeline(StandardScaler(), classifier)


def fitted(protocol: str, c: float, x: np.ndarray, y: np.ndarray, seed: int = 0):
    """Fit a protocol's scikit-learn classifier on features x [m, E] and labels y [m].

    c: C of logistic regression; ignored by the other classifiers. seed: seed of mlp3; ignored by
    the other classifiers.
    """
    with one_thread(), warnings.catch_warnings():
        # LinearSVC stops after 1,000 iterations. On unscaled features, that is often before it has
        # converged. The published protocol has the same limit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _classifier(protocol, c, len(y), seed).fit(x, y)


def predict(
    protocol: str, c: float, train: np.ndarray, y: np.ndarray, test: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Fit a protocol's classifier to the features `train` [m, E] with the labels `y` [m], as
    `fitted` does. Returns the labels [n] that it predicts for the features `test` [n, E].
    """
    with one_thread():
        return np.asarray(fitted(protocol, c, train, y, seed).predict(test))


def fit_head(x: np.ndarray, y: np.ndarray) -> tuple[Pipeline, float | None]:
    """Fit logistic regression on standardised vectors x [n, E] with classes y [n].

    C is chosen from `_CS` by cross-validation with five folds, or as many folds as the smallest
    class has vectors, if that is less. Returns the classifier and its cross-validated accuracy. C
    is chosen on the same folds, so this accuracy is a little too high. If a class has only one
    vector, there is no cross-validation: C is 0.1, and None is returned for the accuracy.
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
    """Create the classifier of `fit_head`."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))


def _cross_validated(x: np.ndarray, y: np.ndarray, c: float, folds: int) -> float:
    """Return the accuracy of `_linear(c)`, averaged over folds."""
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(cross_val_score(_linear(c), x, y, cv=split).mean())


@torch.no_grad()
def set_head(network: LinearClassifier, head: Pipeline) -> None:
    """Copy the weights of a head from `fit_head` into the network. The standardisation of the
    features is folded into the weights, so the predicted probabilities stay the same.
    """
    scale, linear = head[0], head[1]
    weight, bias = linear.coef_ / scale.scale_, linear.intercept_
    if len(linear.classes_) == 2:  # scikit-learn has one row of weights for two classes
        weight, bias = (np.concatenate([-value / 2, value / 2]) for value in (weight, bias))
    network.out.weight.copy_(torch.from_numpy(weight))
    network.out.bias.copy_(torch.from_numpy(bias - weight @ scale.mean_))


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class in per cent; NaN for a class without shapes.

    confusion: number of shapes by true class (rows) and predicted class (columns).
    """
    counts = confusion.sum(1)
    share = np.diag(confusion) / np.maximum(counts, 1)
    return 100 * np.where(counts > 0, share, np.nan)


def by_class(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> dict[str, dict]:
    """Return class name -> accuracy in per cent and number of shapes, from a confusion matrix."""
    table = np.array(confusion)
    columns = class_accuracy(table).tolist(), table.sum(1).tolist()
    rows = zip(class_names, *columns, strict=True)
    return {name: {"accuracy": share, "count": count} for name, share, count in rows}


# cached, since the search for the loaded libraries takes as much time as a small fit: milliseconds
_libraries = cache(ThreadpoolController)


def one_thread() -> AbstractContextManager:
    """Return a context manager within which BLAS, OpenMP and torch use one thread each. The
    first call finds the libraries that are already loaded. Later calls limit the same libraries,
    and none that was loaded since. So import scikit-learn before the first call.

    A solver multiplies small matrices thousands of times. If BLAS splits each product among all
    cores, the cores mostly wait for one another, which also takes CPU time. On two cores, the same
    fits took 2 to 16 times as much CPU time with two threads as with one, and much more if another
    program used one of the cores.
    """
    return _libraries().limit(limits=1)


def side_by_side(fit: Callable, jobs: Sequence[tuple], numbers: int) -> list[Any]:
    """Return `fit(*job)` for every job, in order. If all jobs together are large, they run in
    parallel, in at most one process per core.

    fit: a module-level function that never returns a string. numbers: count of all array elements
    that the fits read. This count decides whether the jobs are large enough to run in parallel.
    """
    workers = min(os.cpu_count() or 1, len(jobs)) if numbers > _WORTH_PROCESSES else 1
    results = mapped(partial(_fits, fit), list(jobs), 1, workers, "fitting", fit.__module__)
    # If a process died while it ran a job, perhaps for lack of memory, the job's result is an error
    # text. Such a job is repeated here, in the main process.
    return [fit(*job) if isinstance(result, str) else result for job, result in results]


def _fits(fit: Callable, jobs: list[tuple]) -> list[Any]:
    with one_thread():
        return [fit(*job) for job in jobs]
