"""`jepa3d prepare` from the command line: what it prints and writes, and how other commands use the
result.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from test_cli import TINY, call, flags, refusal

from jepa3d.data.store import Store


@pytest.fixture
def scans(tmp_path) -> Path:
    """Write twelve boxes and cylinders in class folders, a cloud of too few points, a README and a
    damaged mesh. Returns the folder.
    """
    root = tmp_path / "scans"
    rng = np.random.default_rng(0)
    for i in range(6):
        for name, mesh in (
            ("box", trimesh.creation.box(rng.uniform(1, 3, 3))),
            ("tube", trimesh.creation.cylinder(rng.uniform(0.2, 1), rng.uniform(1, 3))),
        ):
            (root / name).mkdir(parents=True, exist_ok=True)
            mesh.export(root / name / f"{i}.off")
    np.savetxt(root / "box" / "few.xyz", rng.normal(size=(5, 3)))
    (root / "README.txt").write_text("scans of mine\n")
    (root / "tube" / "damaged.stl").write_bytes(b"solid nothing")
    return root


def test_a_folder_becomes_a_store_that_every_command_takes(scans, tmp_path, capsys):
    store = tmp_path / "store"
    assert (
        call("prepare", scans, "--out", store, "--points", 96, "--split", 0.34, "--workers", 1) == 0
    )
    printed = capsys.readouterr().out
    assert "took 12 clouds (12 .off); left out 3" in printed
    assert "box/few.xyz: 5 points, at least 64 are needed" in printed
    assert "README.txt: has no rows of numbers" in printed
    assert "tube/damaged.stl: " in printed
    assert "read as z-up" in printed
    skipped = {line["file"] for line in json.loads((store / "report.json").read_text())["skipped"]}
    assert skipped == {"box/few.xyz", "README.txt", "tube/damaged.stl"}
    assert call("pretrain", *flags(TINY, {"data": store}), "--out", tmp_path / "run") == 0
    assert call("probe", tmp_path / "run", "--data", store, "--protocols", "knn") == 0
    assert "2 classes, 8 train, 4 test" in capsys.readouterr().out


def test_info_describes_a_store_and_draws_it(scans, tmp_path, capsys):
    store = tmp_path / "store"
    (scans / "box" / "again.off").write_bytes((scans / "box" / "0.off").read_bytes())
    assert (
        call("prepare", scans, "--out", store, "--points", 64, "--workers", 1, "--unit", "mm") == 0
    )
    capsys.readouterr()
    assert call("info", store, "--verify", "--picture", tmp_path / "sheet.png") == 0
    printed = capsys.readouterr().out
    assert "13 clouds of 64 points" in printed
    assert "mm" in printed
    assert "1 clouds are copies of others, for example of box/0.off" in printed
    assert "every file has the stored checksum" in printed
    rows = [line.split("│")[1:3] for line in printed.splitlines() if line.startswith("│")]
    assert {name.strip(): count.strip() for name, count in rows} == {
        "box": "7",
        "tube": "6",
        "all": "13",
    }
    assert (tmp_path / "sheet.png").stat().st_size > 5_000


def test_a_file_of_too_many_points_is_thinned_and_that_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jepa3d.data.cloud.Reservoir.__init__.__defaults__", (200, 0))
    np.savetxt(tmp_path / "scan.xyz", np.random.default_rng(0).normal(size=(900, 3)))
    assert (
        call(
            "prepare",
            tmp_path / "scan.xyz",
            "--out",
            tmp_path / "store",
            "--points",
            64,
            "--workers",
            1,
        )
        == 0
    )
    assert "scan.xyz: a random 1,000,000 of its 900 points were read" in capsys.readouterr().out


def test_a_single_file_serves_as_data(scans, tmp_path, capsys):
    assert call("info", scans / "box" / "0.off") == 0
    assert "1 shapes of 2,048 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--points", 0], "--points 0"),
        (["--split", 1.5], "between 0 and 1"),
        (["--split", "nowhere.txt"], "nowhere.txt"),
        (["--columns", "x"], "names of the x, y and z"),
        (["--keep", "colors"], "none of its"),
    ],
    ids=str,
)
def test_a_wrong_preparation_is_one_line_and_leaves_nothing(scans, tmp_path, capsys, words, said):
    assert said in refusal(
        capsys, "prepare", scans, "--out", tmp_path / "store", "--workers", 1, *words
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scans"]


def test_strict_stops_at_the_first_bad_file_and_keeps_what_was_taken(scans, tmp_path, capsys):
    store = tmp_path / "store"
    printed = refusal(capsys, "prepare", scans, "--out", store, "--workers", 1, "--strict")
    assert f"{scans / 'box' / 'few.xyz'}: 5 points" in printed
    assert "unfinished" in refusal(capsys, "pretrain", "--data", store, "--dry-run")
    (scans / "box" / "few.xyz").unlink()
    (scans / "tube" / "damaged.stl").unlink()
    assert call("prepare", scans, "--out", store, "--workers", 1, "--strict") == 0
    assert "took 6 clouds (6 .off), 6 were there already" in capsys.readouterr().out


def test_the_real_files_are_taken_or_left_with_a_reason(real_data, tmp_path, capsys):
    files, store = real_data / "files", tmp_path / "store"
    assert call("prepare", files, "--out", store, "--points", 1024) == 0
    printed = capsys.readouterr().out
    assert (
        "took 79 clouds (51 .h5, 16 .pts, 4 .pcd, 2 .ply, 2 .off, 2 .xyz, 1 .obj, 1 .stl)"
        in printed
    )
    assert (
        "1 clouds of fewer than 1,024 points were filled up (--short skip leaves them out)"
        in printed
    )
    assert (
        "pedestrian43.csv: has no columns x, y, z, but 2 triples: origin_x,origin_y,origin_z; relative_x"
        in printed
    )
    made = Store(store)
    assert made.class_names[-16:] == tuple(sorted(made.class_names[-16:]))
    assert set(made.class_names) >= {"Airplane", "Table", "0", "9"}
    words = ["--columns", "relative_x", "relative_y", "relative_z", "--points", 64]
    assert (
        call(
            "prepare", files / "pedestrian43.csv", "--out", tmp_path / "one", *words, "--workers", 1
        )
        == 0
    )
    rows = np.loadtxt(files / "pedestrian43.csv", delimiter=",", skiprows=1, usecols=(3, 4, 5))
    one = Store(tmp_path / "one")
    back = one.cloud(0).file_coordinates()
    assert np.abs(back[:, None] - rows).max(2).min(1).max() < 1e-5
    assert call("pretrain", *flags(TINY, {"data": store}), "--out", tmp_path / "run") == 0
