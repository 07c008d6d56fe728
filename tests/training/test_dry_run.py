"""What a dry run reports about the whole run: shapes, time, memory and disk space."""

import re
from pathlib import Path

import numpy as np
import pytest

from jepa3d.data.datasets import load
from jepa3d.training import pretrain as training


@pytest.mark.parametrize(
    "kind", ["synthetic", "bundle", "bundle with split", "folder", "folder with split", "store"]
)
@pytest.mark.parametrize("split", ["train", "all"])
def test_a_limited_source_knows_how_many_shapes_it_has(kind, split, tmp_path, capsys):
    from jepa3d.cli import main

    source, points = tmp_path / "source", np.random.default_rng(0).normal(size=(40, 64, 3))
    if kind == "synthetic":
        source = "synthetic:80"
    elif kind.startswith("bundle"):
        source = tmp_path / "source.npz"
        np.savez(source, points=points, **({"split": np.arange(40) % 2} if "split" in kind else {}))
    else:
        for i, cloud in enumerate(points):
            file = source / ("" if kind == "folder" else ("train", "test")[i % 2]) / f"{i}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, cloud)
    if kind == "store":
        with pytest.raises(SystemExit):
            main(
                [
                    "prepare",
                    str(source),
                    "--out",
                    str(tmp_path / "store"),
                    "--points",
                    "64",
                    "--workers",
                    "1",
                ]
            )
        source = tmp_path / "store"
    whole, some = load([str(source)], 32, split), load([str(source)], 32, split, limit=6)
    assert len(some) == 6
    assert some.available == len(whole)
    both = load([str(source), str(source)], 32, split, limit=6)
    assert (len(both), both.available) == (12, 2 * len(whole))


@pytest.mark.parametrize("teacher", [("ema",), ("dvae",), ("untrained",)])
def test_the_cost_of_the_whole_run_is_that_of_its_steps(teacher, tiny, monkeypatch, capsys):
    """Each stage takes 3 s per step; the time of caching is estimated separately."""
    monkeypatch.setattr(
        training,
        "fit",
        lambda *_: {"wall_seconds": 1.0, "peak_memory": 2**30, "step_seconds": 3.0, "metrics": {}},
    )
    cached = {"cache": True} if teacher == ("untrained",) else {}
    config = tiny(teacher=teacher, data=["synthetic:4000"], max_steps=None, epochs=8, target=cached)
    training.dry_run(config)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    steps = 8 * 3000 // 8
    assert first.startswith("the whole run on 3,000 shapes takes about 2 h 3")
    assert f"jepa ({steps:,} steps with batches of 8) 2 h 30 min" in first
    assert ("dvae (4 steps with batches of 8) 12 s" in first) == (teacher == ("dvae",))
    assert ("caching targets" in first) == bool(cached)
    found = re.fullmatch(r"it needs about (\S+) GiB of memory and at most (\S+) GB of disk", second)
    assert found
    unread = (3000 - 16) * 64 * 12
    assert float(found[1]) == pytest.approx(1 + unread / 2**30, abs=0.01)
    arrays = 3000 * 16 * (2 + 8 * 2 + 24 * 2) if cached else 0
    assert float(found[2]) == pytest.approx(arrays / 1e9, abs=0.01)
    assert list(Path().glob("run*")) == []


def test_every_stage_is_tried_with_its_own_objective(tiny, monkeypatch):
    """The objective decides whether a GPU replays a step as a graph (training/graphs.py)."""
    seen = []
    monkeypatch.setattr(training, "fit", lambda task, clouds, config, _: seen.append(config))
    for _ in training.try_stages(tiny(teacher="dvae"), 2):
        pass
    assert [config.objective for config in seen] == ["dvae", "jepa"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3540, "59 min"),
        (3599, "1 h 0 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert training.duration(seconds) == said
