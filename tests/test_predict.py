"""A fine-tuned network on files: every point gets a part label, at the file's coordinates."""

import csv

import numpy as np
import pytest
import torch
import trimesh

from jepa3d.cli import main
from jepa3d.models.heads import Classifier, Segmenter
from jepa3d.models.ready import load_network

ENCODER = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "drop_path": 0.0,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Save the run folders of a classifier and of a segmenter. Returns the folder of both."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    Classifier(ENCODER, ["cup", "bowl", "jug"]).save_pretrained(root / "classify" / "model")
    names = ["body", "handle", "lid", "spout"]
    Segmenter(ENCODER, ["cup", "pot"], names, [[0, 1], [2, 3]], [1, 2]).save_pretrained(
        root / "segment" / "model"
    )
    return root


def command(*words) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0


def test_files_and_folders_are_classified_into_a_csv(runs, tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "a.npy", np.random.default_rng(0).normal(size=(500, 3)))
    np.save(tmp_path / "scans" / "small.npy", np.random.default_rng(0).normal(size=(15, 3)))
    trimesh.creation.box().export(tmp_path / "box.ply")
    command(
        "predict",
        runs / "classify",
        tmp_path / "scans",
        tmp_path / "box.ply",
        "--out",
        tmp_path / "classes.csv",
    )
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["file"] for row in rows] == [
        str(tmp_path / "scans" / "a.npy"),
        str(tmp_path / "box.ply"),
    ]
    for row in rows:
        assert {row["class"], row["second"]} < {"cup", "bowl", "jug"}
        assert float(row["probability"]) >= float(row["second_probability"]) >= 0
    assert "small.npy: 15 points, at least 16 are needed" in capsys.readouterr().out


def test_parts_come_back_for_every_point_in_the_file_s_coordinates(runs, tmp_path):
    # Map coordinates in metres.
    points = np.random.default_rng(0).normal(size=(700, 3)) + np.array([5e5, 6e6, 100.0])
    np.savetxt(tmp_path / "scan.xyz", points, fmt="%.4f")
    command(
        "predict",
        runs / "segment",
        tmp_path / "scan.xyz",
        "--category",
        "pot",
        "--out",
        tmp_path / "parts",
    )
    written = trimesh.load(tmp_path / "parts" / "scan.xyz.ply")
    np.testing.assert_allclose(written.vertices, points, atol=1e-3)
    raw = (tmp_path / "parts" / "scan.xyz.ply").read_bytes()
    header, _, body = raw.partition(b"end_header\n")
    assert b"comment part 3 spout" in header
    rows = np.frombuffer(body, [("xyz", "<f8", 3), ("rgb", "u1", 3), ("part", "<i2")])
    assert len(rows) == 700
    assert set(rows["part"]) <= {2, 3}
    assert (
        len({(part, *rgb) for part, rgb in zip(rows["part"], map(tuple, rows["rgb"]), strict=True)})
        <= 2
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["segment", "a.npy", "--out", "new"], "--category is missing: give one of cup, pot"),
        (
            ["segment", "a.npy", "--out", "new", "--category", "jug"],
            "--category jug is unknown: use cup, pot",
        ),
        (["classify", "missing.npy", "--out", "new"], "missing.npy: no such file"),
        (
            ["nothing", "a.npy", "--out", "new"],
            "not a finished run of jepa3d classify, segment or label",
        ),
        (["classify", "a.npy", "--out", "a.npy"], "a.npy: exists already"),
        (["classify", "short.npy", "--out", "new"], "none of the clouds can be used"),
    ],
)
def test_what_cannot_work_is_one_line(runs, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.random.default_rng(0).normal(size=(500, 3)))
    np.save("short.npy", np.random.default_rng(0).normal(size=(5, 3)))
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(runs / words[0]), *words[1:]])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_network_is_of_the_kind_that_was_trained(runs):
    assert isinstance(load_network(runs / "classify"), Classifier)
    assert isinstance(load_network(runs / "segment" / "model"), Segmenter)


def test_what_is_left_out_is_said_once_and_counted_once(runs, tmp_path, monkeypatch, capsys):
    """predict and embed get some files twice, by relative and absolute paths. They print one line
    per left-out file, with its path once, and the number of these files.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        np.save(f"scans/{i}.npy", rng.normal(size=(300, 3)))
    np.save("scans/short.npy", rng.normal(size=(3, 3)))
    (tmp_path / "scans" / "broken.ply").write_text("ply\nnonsense")
    (tmp_path / "scans" / "empty.xyz").write_text("")
    given = ["scans", "scans/short.npy", "scans/broken.ply", "scans/0.npy", str(tmp_path / "scans")]
    for command, rows in (("predict", "3 rows"), ("embed", "3 new")):
        words = [
            command,
            *([str(runs / "classify")] if command == "predict" else []),
            *given,
            "--out",
            "v.csv",
        ]
        words = [
            word if command == "predict" else word.replace("v.csv", "v.parquet") for word in words
        ]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        said = capsys.readouterr().out
        lines = [line for line in said.splitlines() if line.startswith("left out: ")]
        assert len(lines) == 3
        for name in ("short.npy", "broken.ply", "empty.xyz"):
            assert sum(line.count(name) for line in lines) == 1
        assert rows in said
        assert "left out 3" in said
