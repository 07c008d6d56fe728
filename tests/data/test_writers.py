"""Two commands that write to one store, and a command that is killed at any moment: no cloud is
lost, and no later command is blocked.
"""

import itertools
import os
import pathlib
import signal
import sys
import zipfile

import numpy as np
import pytest
from processes import Command

from jepa3d import locking, plain
from jepa3d.data import prepare as preparing
from jepa3d.data import store as storing
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import Store
from jepa3d.locking import writing

OPTIONS = Preparation(points=64)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("clouds"), np.random.default_rng(0)
    with zipfile.ZipFile(folder / "clouds.zip", "w") as made:
        for i in range(6):
            np.save(folder / f"{i}.npy", rng.normal(size=(80, 3)))
            made.write(folder / f"{i}.npy", f"{i % 2}/{i}.npy")
    return folder / "clouds.zip"


def content(path) -> dict[str, bytes]:
    store = Store(path)
    store.verify()
    return {store.key(row): store.points(row).tobytes() for row in range(len(store))}


def prepare_and_be_killed(at: int, source, out) -> None:
    """Prepare in a process that commits every cloud and is killed at call number `at` of the code
    that locks and writes.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    storing.SHARD_BYTES = 1
    watched, calls = (
        {module.__file__ for module in (preparing, storing, locking, plain, pathlib)},
        itertools.count(),
    )

    def count(frame, event, _):
        if frame.f_code.co_filename in watched and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        prepare(source, out, OPTIONS, workers=1)
    finally:
        os._exit(0)


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 20), marks=pytest.mark.slow)])
def test_a_killed_prepare_goes_on_from_any_moment(archive, tmp_path, seeds):
    prepare(archive, tmp_path / "whole", OPTIONS, workers=1)
    for seed in seeds:
        out, rng = tmp_path / f"{seed}", np.random.default_rng(seed)
        for at in rng.integers(0, 3000, 2):
            prepare_and_be_killed(int(at), archive, out)
        prepare(archive, out, OPTIONS, workers=1)
        assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*map(str, seeds), "whole"])


def test_a_second_prepare_into_a_store_is_refused(archive, tmp_path):
    with (
        writing(tmp_path / "st"),
        pytest.raises(ValueError, match="st: another command is writing there"),
    ):
        prepare(archive, tmp_path / "st", OPTIONS, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_two_prepares_at_once_leave_a_store_that_is_read(archive, tmp_path):
    words = ("prepare", archive, "--points", 64, "--out", tmp_path / "st")
    both = [Command(*words, log=tmp_path / "logs" / name) for name in "ab"]
    codes = [command.end() for command in both]
    assert 0 in codes
    for command, code in zip(both, codes, strict=True):
        refused = "another command is writing there" in command.printed("err")
        assert code == 0 or (code == 2 and refused)
    assert len(content(tmp_path / "st")) == 6
