"""The processes of a pool end when the command that started them ends, for whatever reason."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORK = """
import os, time
from pathlib import Path

def slow(entries):
    for entry in entries:
        Path(os.environ["SEEN"], str(os.getpid())).touch()
        time.sleep(30)
    return entries
"""
MAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from jepa3d.cli import main
import jepa3d.cli
from slow_work import slow
from jepa3d.data.parallel import mapped

def command(tokens):
    for _ in mapped(slow, list(range(8)), 1, 2, "waiting", "slow_work"):
        pass

if __name__ == "__main__":
    jepa3d.cli.app = command
    main(["x"])
"""


def is_there(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_the_workers_of_a_stopped_command_are_gone_within_seconds(tmp_path, name):
    number = signal.Signals[name]
    (tmp_path / "slow_work.py").write_text(WORK)
    (tmp_path / "main.py").write_text(MAIN)
    seen = tmp_path / "seen"
    seen.mkdir()
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"SEEN": str(seen), "PYTHONPATH": paths},
        # Background jobs of a shell ignore SIGINT, so its default is restored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while len(list(seen.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    workers = [int(path.name) for path in seen.iterdir()]
    assert len(workers) == 2
    assert all(map(is_there, workers))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal also sends it to every process
    else:
        process.send_signal(number)
    stopped = time.monotonic()
    errors = process.communicate(timeout=20)[1]
    while any(map(is_there, workers)) and time.monotonic() < stopped + 5:
        time.sleep(0.05)
    assert not any(map(is_there, workers))
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
