"""A short run of benchmarks/rough.py: random kills, two writers at once, and damaged files."""

import subprocess
import sys
from pathlib import Path

import pytest

ROUGH = Path(__file__).parent.parent / "benchmarks" / "rough.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "words",
    [
        ("--part", "kills", "two-writers", "--commands", "pretrain", "embed", "--count", "3"),
        ("--part", "damage", "--commands", "pretrain", "classify", "--count", "8"),
    ],
    ids=["kills", "damage"],
)
def test_nothing_is_lost_and_nothing_blocks(words):
    done = subprocess.run(
        [sys.executable, str(ROUGH), "--seed", "1", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
