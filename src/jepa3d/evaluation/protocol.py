"""The origin of results: the command, versions and machine that produced them."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa3d.plain import write_bytes

_PACKAGES = ("jepa3d", "torch", "numpy", "scikit-learn")


def provenance() -> dict:
    """Return the command, versions, commit and machine of this process."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """Return the git commit of the package's source, with "-dirty" if files were changed. Returns
    None if the package does not run from a git checkout, or if git is missing or fails.
    """
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees either the old file or the new one."""
    write_bytes(path, json.dumps(value, indent=2).encode())


def moments(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Return "mean" and "std" of n values. The std is the sample standard deviation, with divisor
    n - 1; it is None for a single value.
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}
