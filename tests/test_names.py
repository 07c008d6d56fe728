"""Unusual file names: with bytes that are not UTF-8, with control characters, or of archives. Every
message still prints a name on one clean line.
"""

import csv
import io
import os
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
import torch

from jepa3d.cli import main
from jepa3d.data import sources
from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import because, printable
from jepa3d.inference.embedding import embed
from jepa3d.inference.predicting import predict
from jepa3d.inference.vectors import Vectors
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier

RNG = np.random.default_rng(0)
NAMES = [
    b"b\xe9ton/caf\xe9.npy",
    b"b\xe9ton/b.npy",
    b"x/\x1b[31mred.npy",
    b"x/a\nline.npy",
    b"x/plain.npy",
]
BAD = b"x/bad\x1b[31m\xff.ply"


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Write clouds with such names, one file that is no cloud, an encoder, and a classifier with
    the same sizes. Returns the folder.
    """
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, BAD):
        path = os.fsdecode(name)
        os.makedirs(f"scans/{os.path.dirname(path)}", exist_ok=True)
        np.save(f"scans/{path}", RNG.normal(size=(200, 3))) if name != BAD else open(
            f"scans/{path}", "w"
        ).close()
    torch.manual_seed(0)
    sizes = dict(
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_groups=16,
        group_size=8,
        num_points=128,
        tokenizer_dim=16,
    )
    PointEncoder(**sizes).save_pretrained(tmp_path / "model")
    Classifier(sizes, ["b\\udce9ton", "x"]).save_pretrained(tmp_path / "run" / "model")
    return tmp_path


def said(capfd, command: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    out, err = capfd.readouterr()
    assert (stop.value.code or 0) == code, err
    text = out + err
    assert not any(unicodedata.category(c) == "Cc" and c != "\n" for c in text), text
    return text


def test_every_command_takes_such_names_and_prints_them_clean(scans, capfd):
    text = said(capfd, "embed scans --model model --out v.parquet")
    assert "bad?[31m" in text
    assert text.count("left out: ") == 1
    assert "5 new, 0 changed, 0 unchanged; left out 1" in text
    paths = Vectors("v.parquet").column("path")
    assert len(paths) == 5
    os.remove(os.fsdecode(b"scans/" + BAD))
    assert "caf" in said(capfd, "search v.parquet scans -k 2 --html page.html")
    page = (scans / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 5
    assert "not drawn" not in page
    said(capfd, "label scans --model model --out lab --clusters 2")
    assert "not drawn" not in (scans / "lab" / "clusters.html").read_text()
    said(capfd, "prepare scans --out store --points 64")
    assert r"b\udce9ton" in said(capfd, "info store --picture sheet.png")
    assert "5 new" in said(capfd, "embed store --model model --out s.parquet")
    said(capfd, "predict run scans --out p.csv")
    with open("p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {
            f"scans/{os.fsdecode(name)}" for name in NAMES
        }
    listed = next(path for path in paths if path.endswith("/b.npy"))
    assert [found.path for found in predict("run", listed)] == [listed]
    assert embed("scans", PointEncoder.from_pretrained(scans / "model")).shape == (5, 64)


def test_predict_names_each_left_out_file_once_and_counts_it_once(scans, capfd):
    (scans / "scans" / "README.txt").write_text("about these files\n")
    np.save(scans / "scans" / "two.npy", np.eye(3)[:2])
    text = said(capfd, "predict run scans --out p.csv")
    assert text.count("left out: ") == 3
    assert "left out 3\n" in text
    assert text.count("README.txt") == text.count("two.npy") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/a/s/b.ply", "s/b.ply: no points"),
        ("s/b.ply", "s/b.ply: no points"),
        ("b.ply", "no points"),
        ("/a/s/b.npz#3", "s/b.npz: no points"),
        ("/a/s/b.npz#3", "/a/s/b.npz#3: no points"),
        ("/a/x: y.ply", "x: y.ply: no points"),
        ("/a/s/b.ply", "/a/s/b.ply: no points"),
    ],
)
def test_a_left_out_file_is_named_once(name, reason):
    assert because(name, reason) == f"{name}: no points"


def test_every_character_is_printed_on_one_line():
    text = "".join(
        map(chr, [*range(0x250), 0x2028, 0x202E, *range(0xDC80, 0xDD00), 0x9262, 0x1F600])
    )
    made = printable(text)
    assert not any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in made)
    made.encode()
    assert printable("scan é 鉢.ply") == "scan é 鉢.ply"


def packed(path, members: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["a.zip", "A.ZIP", "a.tar.gz", "a.tgz"])
def test_commands_that_read_files_in_place_say_what_to_do_with_an_archive(scans, name, capfd):
    content = io.BytesIO()
    np.save(content, RNG.normal(size=(200, 3)))
    packed(scans / name, {"set/x/1.npy": content.getvalue()})
    for command in (
        f"embed {name} --model model --out a.parquet",
        f"label {name} --model model --out lab",
        f"predict run {name} --out a.csv",
        f"info {name}",
        f"view {name} --model model --port 0",
    ):
        text = said(capfd, command, code=2)
        assert text.startswith("jepa3d: error: ")
        assert text.endswith(f"{name}: {sources.REFUSAL}\n")
    (scans / name).rename(scans / "scans" / name)
    assert f"left out: scans/{name}: is an archive; unpack it" in said(
        capfd, "embed scans --model model --out v.parquet"
    )


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_an_archive_out_of_proportion_is_refused_before_it_is_written(tmp_path, name, monkeypatch):
    packed(tmp_path / name, {f"{i}.xyz": b"0" * 2_000_000 for i in range(3)})
    monkeypatch.setattr(sources, "_MOST", (100, 4_000_000))
    with (
        pytest.raises(ReadError, match="too many for its size"),
        sources.unpacked(tmp_path / name, tmp_path / "out"),
    ):
        pass
    monkeypatch.setattr(sources, "_MOST", (10_000, 1 << 30))
    monkeypatch.setattr(
        sources.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000})
    )
    with (
        pytest.raises(ReadError, match="5,000,000 are free"),
        sources.unpacked(tmp_path / name, tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
