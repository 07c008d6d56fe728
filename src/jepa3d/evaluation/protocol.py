"""Results with their origin: how a number was chosen; command, versions and machine."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa3d.plain import write_bytes


@dataclass(frozen=True)
class Result:
    """A test result with its protocol, data, selection rule and cost. Metrics are in per cent."""

    task: str  # classify, fewshot or segment
    protocol: str  # in words: "fine-tuned, all weights"
    data: dict[str, Any]  # name, fingerprint, and the number of train, validation and test shapes
    init: str  # scratch, or where the encoder came from
    pretraining: dict[str, Any] | None  # settings, data and cost of the pretraining run
    seed: int
    selection: str  # validation, last epoch, best on test, or none
    votes: int
    metrics: dict[str, float]  # on the test part
    validation: dict[str, float] | None  # the same on the validation part
    details: dict[str, Any]  # per class, per category or per fold
    settings: dict[str, Any]  # those that arms of a comparison may differ in
    cost: dict[str, float]

    def record(self) -> dict[str, Any]:
        """As JSON, with the command, the versions and the machine."""
        return asdict(self) | provenance()


def provenance() -> dict:
    """The command, the versions and the machine of this process."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("jepa3d", "torch", "numpy", "scikit-learn")},
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """The source's commit where it runs from a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    write_bytes(path, json.dumps(value, indent=2).encode())


def moments(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Mean and sample std (n - 1); one value has no std."""
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }
