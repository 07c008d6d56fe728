"""Only one process writes to a folder at a time, however its path is written. A killed process
blocks nobody and leaves no files behind.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jepa3d import locking
from jepa3d.locking import writing
from jepa3d.plain import write_bytes

HERE = f"import sys, time; sys.path.insert(0, {str(Path(locking.__file__).parent)!r}); from locking import writing\n"
HOLD = HERE + "with writing(sys.argv[1]): print('held', flush=True); time.sleep(60)"
ADD = """
for _ in range(20):
    while True:
        try:
            with writing(sys.argv[1]):
                value = int(open(sys.argv[1]).read())
                time.sleep(0.001)
                open(sys.argv[1], 'w').write(str(value + 1))
            break
        except ValueError:
            time.sleep(0.001)
"""


def test_a_second_writer_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    out = tmp_path / "deep" / "run"
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for spelling in (out, tmp_path / "link" / "run", out / ".." / "run"):
            with (
                pytest.raises(ValueError, match="run: another command is writing there"),
                writing(spelling),
            ):
                pass
        with writing(tmp_path / "deep" / "run2"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with writing(out):
        pass
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_lock_is_free_after_an_error_and_refused_within_a_process(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path / "a"):
        raise KeyError
    with (
        writing(tmp_path / "a"),
        pytest.raises(ValueError, match="another command"),
        writing(tmp_path / "a"),
    ):
        pass
    refused = []

    def try_it():
        try:
            with writing(tmp_path / "a"):
                pass
        except ValueError as error:
            refused.append(error)

    with writing(tmp_path / "a"):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert os.listdir(tmp_path) == []


def test_many_writers_lose_nothing(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    adding = [subprocess.Popen([sys.executable, "-c", HERE + ADD, str(counter)]) for _ in range(4)]
    assert [process.wait(60) for process in adding] == [0] * 4
    assert counter.read_text() == "80"


def test_a_file_is_whole_at_every_moment_however_many_write_it(tmp_path):
    target, refused = tmp_path / "new" / "file", []

    def write(letter: bytes) -> None:
        for _ in range(50):
            try:
                write_bytes(target, letter * 100_000)
            except ValueError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    [thread.start() for thread in threads]
    while any(thread.is_alive() for thread in threads):
        if target.exists():
            assert target.read_bytes() in (b"a" * 100_000, b"b" * 100_000, b"c" * 100_000)
    assert all("another command is writing there" in line for line in refused)
    assert os.listdir(target.parent) == ["file"]
