"""Files from untrusted sources: they cannot open other files, fill the memory or run code, and
their names are only text.
"""

import io
import re
import struct
import zipfile

import numpy as np
import pytest

from jepa3d.cli import main
from jepa3d.data.arrays import clouds_in
from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import load
from jepa3d.data.io import read
from jepa3d.plain import printable

h5py = pytest.importorskip("h5py")
POINTS = np.random.default_rng(0).normal(size=(80, 3))


def refusal(path) -> str:
    with pytest.raises(ReadError) as caught:
        read(path) if clouds_in(path) is None else None
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def external_link(file, other):
    file["data"] = h5py.ExternalLink(other.name, "/data")


def soft_link_through_an_external_group(file, other):
    file["far"] = h5py.ExternalLink(other.name, "/")
    file["data"] = h5py.SoftLink("/far/data")


def soft_link_in_a_circle(file, other):
    file["data"], file["points"] = h5py.SoftLink("/points"), h5py.SoftLink("data")


def external_storage(file, other):
    file.create_dataset("data", (80, 3), np.uint8, external=[(str(other), 0, 240)])


def virtual(file, other):
    layout = h5py.VirtualLayout((80, 3), np.float64)
    layout[:] = h5py.VirtualSource(str(other), "data", (80, 3))
    file.create_virtual_dataset("data", layout)


OTHERS = [
    external_link,
    soft_link_through_an_external_group,
    soft_link_in_a_circle,
    external_storage,
    virtual,
]


@pytest.mark.parametrize("way", OTHERS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("also", ["points", "label", "normals"])
def test_hdf5_reads_no_other_file(tmp_path, way, also):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = POINTS
    with h5py.File(tmp_path / "a.h5", "w") as file:
        way(file, tmp_path / "other.h5")
        if also != "points":  # the link is in another array than the points
            file.move("data", also)
            file["data"] = POINTS
            file.pop("points", None)
    assert re.search("(another|other) files?", refusal(tmp_path / "a.h5"))


def test_links_within_an_hdf5_file_are_followed(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/er/x"] = POINTS
        file["deep/er/y"] = h5py.SoftLink("x")
        file["data"] = h5py.SoftLink("/deep/./er/y")
        file["strange"] = h5py.ExternalLink("nothing.h5", "/")  # this link is never read
    assert np.allclose(read(tmp_path / "a.h5").file_coordinates(), POINTS, atol=1e-6)


def test_groups_and_texts_in_place_of_numbers_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data/x"] = POINTS
    assert "data is a group" in refusal(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset(
            "data", data=np.array([["a"] * 3] * 80, object), dtype=h5py.string_dtype()
        )
    assert "expected an array of points" in refusal(tmp_path / "b.h5")


def zeros(path, count: int) -> None:
    """Write an NPZ file whose points are `count` compressed zero bytes, piece by piece."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (count // 24, 3)}
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("points.npy", "w") as file,
    ):
        file.write(header.getvalue())
        for _ in range(count // (1 << 20)):
            file.write(bytes(1 << 20))


def test_a_compressed_archive_that_would_fill_the_memory_is_refused(tmp_path):
    zeros(tmp_path / "a.npz", 300 << 20)
    assert (tmp_path / "a.npz").stat().st_size < 1 << 20
    assert "too many for its size" in refusal(tmp_path / "a.npz")
    with pytest.raises(ReadError, match="too many for its size"):
        load([str(tmp_path / "a.npz")], 16)


def test_compressed_hdf5_is_bounded_too(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset(
            "data", (12 << 20, 3), np.float64, chunks=(1 << 20, 3), compression="gzip"
        )
        data[: 1 << 20] = 0
    assert "claim" in refusal(tmp_path / "a.h5")


@pytest.mark.parametrize("claim", [81, 10**6, 10**12, 2**63])
def test_a_member_that_claims_more_than_it_holds_is_refused(tmp_path, claim):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (claim, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points.npy", header.getvalue() + POINTS.tobytes())
    assert "claims" in refusal(tmp_path / "a.npz")


def test_an_archive_whose_directory_understates_a_member_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, points=np.zeros((80, 3)))
    content = bytearray(path.read_bytes())
    # Position of the uncompressed size in the archive's directory.
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 300)
    path.write_bytes(content)
    refusal(path)


def test_objects_are_refused_only_where_they_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", points=np.array([{}] * 80))
    assert "Python objects" in refusal(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", points=POINTS, meta=np.array([{"scanner": "x"}]))
    assert len(read(tmp_path / "b.npz")) == 80
    np.savez(tmp_path / "c.npz", points=POINTS[None], meta=np.array([{"scanner": "x"}]))
    assert len(load([str(tmp_path / "c.npz")], 16)) == 1


# -------------------------------------------------------------------------------------------- names

EVIL = "a\x1b[31m\x1b]0;title\x07\rb\u202e.xyz"


@pytest.mark.parametrize("text", [EVIL, "\x00", "\x9b31m", "\u2028", "\u2029", "\x7f", "\ue000"])
def test_nothing_in_a_name_speaks_to_the_terminal(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
    assert "?" in shown


def test_other_names_are_shown_as_they_are():
    for name in ("Gr\u00f6\u00dfe.xyz", "\u70b9\u7fa4.ply", "a\u202fb c.xyz", "[red]"):
        assert printable(name) == name
    assert printable("\udcff.xyz") == r"\udcff.xyz"


@pytest.mark.parametrize("command", ["prepare", "embed", "info"])
def test_no_command_prints_control_characters_of_names(tmp_path, capsys, command):
    root = tmp_path / "scans"
    (root / "class\x1b[2J").mkdir(parents=True)
    np.savetxt(root / "class\x1b[2J" / EVIL, POINTS)
    np.savetxt(root / "class\x1b[2J" / f"again{EVIL}", POINTS)
    (root / "class\x1b[2J" / f"bad{EVIL}").write_text("x\x1b[1m,y,z\n1,2,3\n")
    (root / f"note\x1b[5m{EVIL}.md").write_text("no cloud")
    store = tmp_path / "store"
    prepared = ["prepare", root, "--out", store, "--points", "64", "--workers", "1"]
    told = {"prepare": [prepared], "embed": [["embed", root, "--out", tmp_path / "v.parquet"]]}
    told["info"] = [prepared, ["info", store]]
    for words in told[command]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert not ended.value.code
    printed = capsys.readouterr()
    assert "a?[31m" in printed.out
    assert all(c.isprintable() or c == "\n" for c in printed.out + printed.err)
