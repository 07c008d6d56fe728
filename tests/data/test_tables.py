"""One cloud, written as a table or PCD in hundreds of ways, and read at once and in chunks."""

import io as streams
import logging
import random
import struct
import sys

import numpy as np
import pytest

from jepa3d.data.cloud import to_parts
from jepa3d.data.io import ReadError, chunks, read
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import Store
from jepa3d.inference.embed_files import embed_files
from jepa3d.inference.embedding import embed

RNG = np.random.default_rng(0)
POINTS = RNG.uniform(-40, 400, (30, 3)).round(4)
COLORS = RNG.integers(2, 256, (30, 3))
LABELS = RNG.integers(0, 9, 30)


def number(value: float, rng: random.Random, comma: bool) -> str:
    """Write a coordinate in a random format, as different programs do."""
    text = rng.choice(
        [f"{value:.4f}", f"{value:.4f}", f"{value:.6e}", f"{value:+.5f}", repr(float(value))]
    )
    return text.replace(".", ",") if comma else text


def table(rng: random.Random) -> tuple[bytes, str, bool, bool]:
    """Write POINTS as a random table. Returns the file's content, its suffix, and whether a header
    names colours and labels.
    """
    suffix = rng.choice([".xyz", ".txt", ".csv", ".pts", ".asc"])
    mark = rng.choice([" ", "  ", "\t", ",", ", ", ";", "; ", "|", " \t "])
    comma = mark.strip() not in (",", "|") and rng.random() < 0.3
    extra = {
        "gps_time": [f"{1e5 + i:.2f}" for i in range(30)],
        "Scalar_field": [str(i % 7) for i in range(30)],
    }
    columns = {axis: [number(v, rng, comma) for v in POINTS[:, i]] for i, axis in enumerate("xyz")}
    if rng.random() < 0.5:
        names = rng.choice([("r", "g", "b"), ("red", "green", "blue")])
        columns |= {name: [str(v) for v in COLORS[:, i]] for i, name in enumerate(names)}
    if rng.random() < 0.5:
        columns[rng.choice(["label", "classification", "class"])] = [str(v) for v in LABELS]
    columns |= {name: extra[name] for name in extra if rng.random() < 0.4}
    header = rng.choice(["none", "line", "line", "comment", "quoted"])
    order = list(columns)
    if header == "none":
        columns = {axis: columns[axis] for axis in "xyz"} | {
            name: columns[name] for name in order[3:] if name in extra
        }
        order = list(columns)
    else:
        rng.shuffle(order)
    spelled = {name: rng.choice([name, name.upper(), name.capitalize()]) for name in order}
    if mark.strip() and rng.random() < 0.3:
        spelled |= {axis: f"{spelled[axis]} {rng.choice(['[m]', '(mm)'])}" for axis in "xyz"}
    quoted = mark.strip() in (",", ";") and rng.random() < 0.3
    cell = (lambda text: f'"{text}"') if quoted else (lambda text: text)
    tail = mark.strip() if mark.strip() and rng.random() < 0.2 else ""
    lines = [f"# comment {i}, of 3 words" for i in range(rng.choice([0, 0, 1, 60, 200]))]
    lines += ["// Größe: 3 m"] if rng.random() < 0.3 else []
    lines += [""] if rng.random() < 0.2 else []
    names = mark.join(spelled[name] for name in order)
    counted = rng.random() < 0.3
    above = {
        "none": [],
        "line": [names + tail],
        "comment": [rng.choice(["#", "# ", "//", "// "]) + names],
        "quoted": [mark.join(f'"{spelled[name]}"' for name in order)],
    }[header]
    above += ["30"] if counted else []
    lines += reversed(above) if rng.random() < 0.5 else above
    rows = [mark.join(cell(columns[name][i]) for name in order) + tail for i in range(30)]
    if counted and rng.random() < 0.3:  # blocks, each with its count
        lines[lines.index("30")] = "12"
        rows.insert(12, "18")
    if rng.random() < 0.2:
        rows.insert(rng.randrange(len(rows)), rng.choice(["", "# in between", "   ", "// more"]))
    if header == "line" and rng.random() < 0.1:
        rows.insert(7, names + tail)  # two exports in one file repeat the header
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    text = end.join([*lines, *rows]) + rng.choice(["", end, end + end])
    coding = rng.choice(
        ["utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-16-be"]
    )
    named = header != "none"
    parts = named and bool({"label", "classification", "class"} & set(order))
    return text.encode(coding), suffix, named and bool({"r", "red"} & set(order)), parts


@pytest.mark.parametrize("seed", range(40))
def test_a_table_is_read_however_it_is_spelled(tmp_path, seed):
    for i in range(10):
        content, suffix, colors, parts = table(random.Random(f"{seed} {i}"))
        path = tmp_path / f"{i}{suffix}"
        path.write_bytes(content)
        cloud = read(path)
        said = content[:300]
        assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-4), said
        assert np.allclose(np.concatenate(list(chunks(path))), POINTS, atol=1e-4), said
        assert (cloud.colors is not None, cloud.parts is not None) == (colors, parts), said
        assert not colors or np.array_equal(cloud.colors, COLORS), said
        assert not parts or np.array_equal(to_parts(cloud.parts), LABELS), said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x,y,z\n1,2,3\n4,five,6\n", "line 3 is not a row of numbers, but has 'five'"),
        ("1 2 3\n\n# note\n4 5\n", "line 4 is not a row of at least 3 columns: '4 5'"),
        ("a,b,c\n1,2,3\n4,5,6\n", "no columns x, y, z, but a, b, c; choose with --columns"),
        ("x y\n1 2\n3 4\n", "line 2 has 2 columns, but needs 3"),
        ("5\n1 2 3\n4 5 6\n", "truncated: 2 points, but its count says 5"),
        ("1\n1 2 3\n4 5 6\n", "damaged: 2 points, but its count says 1"),
        ("2\n1 2 3\n4 5 6\n2\n7 8 9\n", "truncated: 3 points, but its count says 4"),
        ("2\n3\n1 2 3\n", "name it .ptx"),
        ("ncols 4\nnrows 4\n1 2 3 4\n", "grid of heights"),
        ("Dear all,\nthese are no numbers.\n", "no rows of numbers: the first line is 'Dear all,'"),
        ("1 2 3 " * 30_000, "line 1 has 100,000 characters or more"),
        ("1_0 2 3\n4 5_0 6\n", "no rows of numbers"),
    ],
)
@pytest.mark.parametrize("suffix", [".xyz", ".pts"])
def test_an_error_names_the_cause(tmp_path, content, said, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(content)
    for reader in (read, lambda path: list(chunks(path))):
        with pytest.raises(ReadError) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert said in str(caught.value)
        assert ("--columns" in str(caught.value)) == ("--columns" in said)


def test_columns_name_those_of_a_table_without_header(tmp_path):
    np.savetxt(tmp_path / "a.txt", np.c_[LABELS, POINTS], "%.4f")
    cloud = read(tmp_path / "a.txt", columns=("label", "x", "y", "z"))
    assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-4)
    assert np.array_equal(to_parts(cloud.parts), LABELS)
    np.savetxt(tmp_path / "b.txt", POINTS, "%.4f")  # another file, without the label column
    for columns in (("label", "x", "y", "z"), ("e", "n", "h")):
        cloud = read(tmp_path / "b.txt", columns=columns)
        assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-4)
    cloud = read(tmp_path / "b.txt", columns=("z", "y", "x"))
    assert np.allclose(cloud.file_coordinates(), POINTS[:, ::-1], atol=1e-4)
    for columns in (("x", "y", "z"), ("x", "y", "z", "r", "g")):
        with pytest.raises(ReadError, match=f"has 4 columns and no header.*names {len(columns)}"):
            read(tmp_path / "a.txt", columns=columns)


def test_an_empty_cell_between_tabs_shifts_no_column(tmp_path):
    head, rows = "x\ty\tz\tlabel\tconf\n", "1\t2\t3\t\t9\n4\t\t6\t7\t8\n7\t8\t9\t5\t8\n"
    (tmp_path / "a.txt").write_text(head + rows)
    found = read(tmp_path / "a.txt")
    assert np.allclose(found.file_coordinates(), [[1, 2, 3], [7, 8, 9]])
    assert np.array_equal(found.parts, [np.nan, 5], equal_nan=True)


def test_binary_data_is_no_table(tmp_path):
    (tmp_path / "a.xyz").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ReadError, match="binary"):
        read(tmp_path / "a.xyz")


def test_a_molecule_and_rows_without_a_place_are_told_apart(tmp_path):
    """A row with an empty or NaN cell in x, y or z is a point that the scanner did not see; a word
    in such a cell is an error.
    """
    rows = "1,2,3,4\n,,,7\n4,5,6,\nnan,5,6,1\n7,8,NA,3\n-1.#IND,1,2,2\n7,8,8,1\n,,,\n"
    for first, more in (("", 0), (",,,1\n", 1), ("nan,nan,nan,\n", 1), ("1,,,1\n", 1)):
        (tmp_path / "a.csv").write_text("x,y,z,i\n" + first + rows)
        cloud = read(tmp_path / "a.csv")
        assert np.allclose(cloud.file_coordinates(), [[1, 2, 3], [4, 5, 6], [7, 8, 8]])
        assert cloud.unseen == 4 + more
    (tmp_path / "b.xyz").write_text("2\nwater\nH 0 0 0\nO 0 0 1\n")
    with pytest.raises(ReadError, match="no rows of numbers"):
        read(tmp_path / "b.xyz")


@pytest.mark.parametrize("cell", ["", "x", "nan", "1e400", "-1"])
def test_no_cell_of_a_colour_or_label_costs_the_cloud(tmp_path, cell):
    rows = [f"{x},{y},{z},1,2,3,4" for x, y, z in POINTS]
    rows[5] = rows[5].rpartition(",1,2,3,4")[0] + f",{cell},{cell},{cell},{cell}"
    (tmp_path / "a.csv").write_text("\n".join(["x,y,z,red,green,blue,label", *rows]))
    cloud = read(tmp_path / "a.csv")
    assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-4)
    assert np.array_equal(cloud.colors[0], [1, 2, 3])


# ---------------------------------------------------------------------------------------------- PCD

LETTERS = {"f": "F", "i": "I", "u": "U"}


def lzf(data: bytes) -> bytes:
    """Encode data as LZF without compression: as literal runs."""
    return b"".join(
        bytes([len(data[at : at + 32]) - 1]) + data[at : at + 32] for at in range(0, len(data), 32)
    )


def pcd(rng: random.Random, points: np.ndarray = POINTS) -> tuple[bytes, bool]:
    """Write points as a random PCD file. Returns its content and whether it has labels."""
    width = rng.choice([4, 8])
    fields = [(name, f"<f{width}", 1, points[:, i]) for i, name in enumerate("xyz")]
    labelled = rng.random() < 0.5
    if labelled:
        fields.append(("label", rng.choice(["<u1", "<i4", "<u4", "<f4"]), 1, LABELS))
    for name, kind, count in (
        ("intensity", "<f4", 1),
        ("ring", "<u2", 1),
        ("fpfh", "<f4", 33),
        ("noise", "<i2", 0),
    ):
        if rng.random() < 0.4:
            fields.append((name, kind, count, np.arange(30)))
    if rng.random() < 0.3:
        rng.shuffle(fields)
    padded = []
    for field in fields:
        padded += [field] + (
            [("_", "<u1", rng.randrange(4), np.zeros(30))] if rng.random() < 0.3 else []
        )
    row = np.dtype([(f"f{i}", kind, (count,)) for i, (_, kind, count, _) in enumerate(padded)])
    data = np.zeros(30, row)
    for i, (_, kind, count, values) in enumerate(padded):
        data[f"f{i}"] = np.repeat(values[:, None], count, 1).astype(kind)
    case = rng.choice([str.lower, str.upper])
    header = {
        "VERSION": rng.choice([".7", "0.7", ".6", ".5"]),
        "FIELDS": " ".join(case(name) for name, *_ in padded),
        "SIZE": " ".join(kind[2] for _, kind, *_ in padded),
        "TYPE": " ".join(LETTERS[kind[1]] for _, kind, *_ in padded),
        "COUNT": " ".join(str(count) for _, _, count, _ in padded),
        "WIDTH": "10",
        "HEIGHT": "3",
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": "30",
    }
    if rng.random() < 0.3 and all(count == 1 for _, _, count, _ in padded):
        del header["COUNT"]
    for key in (["VIEWPOINT"], ["VERSION"], rng.choice([["POINTS"], ["WIDTH", "HEIGHT"], []])):
        for name in key if rng.random() < 0.3 else []:
            del header[name]
    way = rng.choice(["ascii", "binary", "binary_compressed"])
    lines = ["# .PCD v.7"] if rng.random() < 0.7 else []
    lines += [f"{key} {value}" for key, value in header.items()] + [f"DATA {way}"]
    end = rng.choice(["\n", "\n", "\r\n"])
    head = (end.join(lines) + end).encode()
    if way == "ascii":
        rows = (
            " ".join(repr(v.item()) for field in row.names for v in data[field][i])
            for i in range(30)
        )
        return head + end.join(rows).encode(), labelled
    if way == "binary":
        return head + data.tobytes(), labelled
    content = b"".join(np.ascontiguousarray(data[name]).tobytes() for name in row.names)
    packed = lzf(content)
    return head + struct.pack("<II", len(packed), len(content)) + packed, labelled


@pytest.mark.parametrize("seed", range(30))
def test_a_pcd_is_read_however_it_is_spelled(tmp_path, seed):
    pytest.importorskip("lzf")
    for i in range(10):
        content, labelled = pcd(random.Random(f"{seed} {i}"))
        (tmp_path / f"{i}.pcd").write_bytes(content)
        cloud = read(tmp_path / f"{i}.pcd")
        assert np.allclose(cloud.file_coordinates(), POINTS, atol=1e-4), content[:400]
        assert np.allclose(np.concatenate(list(chunks(tmp_path / f"{i}.pcd"))), POINTS, atol=1e-4)
        assert (cloud.parts is not None) == labelled
        assert not labelled or np.array_equal(to_parts(cloud.parts), LABELS)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("POINTS 30", "POINTS 31", "has 31 POINTS, but WIDTH x HEIGHT 30 x 1"),
        ("WIDTH 30\nHEIGHT 1\nPOINTS 30", "POINTS 29", "29"),
        ("WIDTH 30\nHEIGHT 1\nPOINTS 30", "POINTS 40", "truncated|claims"),
        ("WIDTH 30\nHEIGHT 1\nPOINTS 30", "", "no points"),
        ("TYPE F F F", "TYPE F F Q", "field z has the unknown TYPE Q"),
        ("FIELDS x y z", "FIELDS a y z", "has no field x; it has a, y, z"),
        ("SIZE 4 4 4", "SIZE 4 4", "its header has 3 FIELDS, 2 SIZE"),
        ("DATA", "DATUM", "found none"),
        ("DATA ", "DATA un", "ascii, binary or"),
    ],
)
@pytest.mark.parametrize("way", ["ascii", "binary"])
def test_a_pcd_that_cannot_be_read_says_why(tmp_path, old, new, said, way):
    head = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 30\nHEIGHT 1\nPOINTS 30\nDATA " + way + "\n"
    buffer = streams.StringIO()
    np.savetxt(buffer, POINTS)
    body = POINTS.astype("<f4").tobytes() if way == "binary" else buffer.getvalue().encode()
    (tmp_path / "a.pcd").write_bytes(head.encode() + body)
    assert len(read(tmp_path / "a.pcd")) == 30
    assert old in head
    (tmp_path / "a.pcd").write_bytes(head.replace(old, new).encode() + body)
    with pytest.raises(ReadError, match=said):
        read(tmp_path / "a.pcd")


# ---------------------------------------------------------------------------------- points not seen


def organised(path, way: str) -> None:
    """Write a PCD file as from a depth camera: 20 of its 80 points are NaN."""
    points = np.random.default_rng(1).normal(size=(80, 3)).astype("<f4")
    points[::4] = np.nan
    head = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 10\nHEIGHT 8\nPOINTS 80\nDATA {way}\n".encode()
    rows = "\n".join(" ".join(map(str, row)) for row in points.tolist()).encode()
    path.write_bytes(head + (points.tobytes() if way == "binary" else rows))


@pytest.mark.parametrize("way", ["ascii", "binary"])
def test_points_that_were_not_seen_are_left_out_and_counted_aloud(tmp_path, capsys, way):
    root = tmp_path / "scans"
    root.mkdir()
    organised(root / "a.pcd", way)
    organised(root / "b.pcd", way)
    cloud = read(root / "a.pcd")
    assert (len(cloud), cloud.unseen) == (60, 20)
    assert cloud.remarks() == ["left out 20 NaN points (nothing was measured there)"]
    told = []
    assert sum(map(len, chunks(root / "a.pcd", told.append))) == 60
    assert told == [20]
    store = Store(prepare(root, tmp_path / "store", Preparation(points=60), workers=1)[0])
    assert len(store) == 2
    assert (
        "left out 40 NaN points (nothing was measured there) in 2 clouds" in capsys.readouterr().out
    )


def test_embedding_leaves_them_out_of_files_and_refuses_them_in_arrays(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pytest.importorskip("pyarrow")
    points = np.random.default_rng(1).normal(size=(300, 3))
    np.save(tmp_path / "whole.npy", points)
    points = np.insert(points, [5, 9, 200], np.nan, 0)
    np.save(tmp_path / "holes.npy", points)
    assert np.array_equal(*(embed(tmp_path / f"{name}.npy") for name in ("whole", "holes")))
    said = "3 points that are NaN"
    assert "holes.npy: left out 3 NaN points" in caplog.text
    embed_files([tmp_path], tmp_path / "v.parquet", workers=1)
    counted = f"2 new, 0 changed, 0 unchanged; left out 0; {said} were left out"
    assert counted in caplog.text
    with pytest.raises(ValueError, match="cloud 0: has NaN"):
        embed(points)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.xyz", "a.csv", "a.pts"])
def test_nan_in_any_kind_of_cloud_is_left_out(tmp_path, name):
    points = POINTS.copy()
    points[3], points[9, 1] = np.nan, np.nan
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, points)
    elif name == "a.npz":
        np.savez(path, points=points, seg=LABELS)
        assert np.array_equal(read(path).parts, np.delete(LABELS, [3, 9]))
    else:
        np.savetxt(path, points, "%.4f", delimiter="," if name == "a.csv" else " ")
    cloud = read(path)
    assert np.allclose(cloud.file_coordinates(), np.delete(points, [3, 9], 0), atol=1e-4)
    assert cloud.unseen == 2
    told = []
    assert sum(map(len, chunks(path, told.append))) == 28
    assert told == [2]


def test_a_cloud_of_nothing_else_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full((9, 3), np.nan))
    with pytest.raises(ReadError, match="no points: all 9 are NaN"):
        read(tmp_path / "a.npy")


def test_a_float16_store_says_what_an_outlier_does_to_a_cloud(tmp_path, capsys):
    root = tmp_path / "scans"
    root.mkdir()
    points = np.random.default_rng(3).normal(size=(500, 3))
    np.save(root / "good.npy", points)
    np.save(root / "far.npy", np.concatenate([points, [[1e5, 0, 0]]]))
    store = Store(
        prepare(root, tmp_path / "half", Preparation(points=None, precision="float16"), workers=1)[
            0
        ]
    )
    printed = capsys.readouterr().out
    assert len(store) == 1
    assert "far.npy: float16 moves its points by " in printed
    assert "--precision float32" in printed
    assert (
        len(Store(prepare(root, tmp_path / "single", Preparation(points=None), workers=1)[0])) == 2
    )


# ------------------------------------------------------------------------------- PTX, BIN, LAS, E57


def ptx(path, scans: int, color: bool, cut: int = 0) -> np.ndarray:
    """Write scans of 4 x 5 points, each rotated and shifted; 3 points of each were not seen.
    Returns the coordinates of the others.
    """
    rng, lines, places = np.random.default_rng(scans), [], []
    for _ in range(scans):
        points = rng.normal(size=(20, 3)).round(4)
        points[[2, 7, 11]] = 0
        angle, move = rng.random(), rng.normal(size=3) * 50
        turn = np.array(
            [[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
        )
        matrix = np.block([[turn, np.zeros((3, 1))], [move, np.ones((1, 1))]])
        lines += ["4", "5", *[" ".join(map(str, row)) for row in np.vstack([move, np.eye(3)])]]
        lines += [" ".join(map(repr, row.tolist())) for row in matrix]
        lines += [
            " ".join(map(str, row)) + " 0.5" + (" 10 20 30" if color else "")
            for row in points.tolist()
        ]
        places.append(np.delete(points, [2, 7, 11], 0) @ turn + move)
    path.write_text("\n".join(lines[: len(lines) - cut]) + "\n")
    return np.concatenate(places)


@pytest.mark.parametrize("scans", [1, 3])
@pytest.mark.parametrize("color", [False, True])
def test_ptx_scans_are_placed_and_what_was_not_seen_is_left_out(tmp_path, scans, color):
    places = ptx(tmp_path / "a.ptx", scans, color)
    cloud = read(tmp_path / "a.ptx")
    assert np.allclose(cloud.file_coordinates(), places, atol=1e-4)
    assert cloud.unseen == 3 * scans
    assert (cloud.colors is not None) == color
    assert np.allclose(np.concatenate(list(chunks(tmp_path / "a.ptx"))), places)


@pytest.mark.parametrize(
    ("cut", "said"),
    [(1, "truncated: 19 of 20"), (25, "no PTX scan begins"), (20, "truncated: 0 of 20")],
)
def test_a_ptx_that_is_cut_off_says_where(tmp_path, cut, said):
    ptx(tmp_path / "a.ptx", 2, False, cut)
    with pytest.raises(ReadError, match=said):
        read(tmp_path / "a.ptx")


@pytest.mark.parametrize(
    "names", [("x", "y", "z"), ("X", "Y", "Z", "intensity"), ("x", "y", "z", "intensity", "ring")]
)
def test_a_bin_is_read_by_the_names_of_its_columns(tmp_path, names):
    rows = np.zeros((30, len(names)), "<f4")
    rows[:, :3] = POINTS
    root = tmp_path / "velodyne"
    root.mkdir()
    (root / "000000.bin").write_bytes(rows.tobytes())
    assert np.allclose(
        read(root / "000000.bin", columns=names).file_coordinates(), POINTS, atol=1e-4
    )
    store = Store(
        prepare(root, tmp_path / "store", Preparation(points=None, columns=names), workers=1)[0]
    )
    assert len(store) == 1
    with pytest.raises(
        ReadError,
        match="does not say what its columns are: give jepa3d prepare --columns x y z intensity",
    ):
        read(root / "000000.bin")
    with pytest.raises(ReadError, match="are not whole rows of 7 float32"):
        read(root / "000000.bin", columns=(*"xyzabcd",))


def test_a_las_header_that_says_too_few_points_is_refused(tmp_path):
    laspy = pytest.importorskip("laspy")
    for version, kind in (("1.2", 3), ("1.4", 7)):
        path = tmp_path / f"{version}.las"
        made = laspy.create(file_version=version, point_format=kind)
        made.x, made.y, made.z = POINTS.T
        made.write(str(path))
        assert len(read(path)) == 30
        content, at = bytearray(path.read_bytes()), 107 if version == "1.2" else 247
        content[at : at + 4] = struct.pack("<I", 20)
        path.write_bytes(content)
        with pytest.raises(ReadError, match="its header says 20 points, but 30 follow"):
            read(path)


def test_a_compressed_pcd_without_its_decompressor_says_how_to_get_it(tmp_path, monkeypatch):
    content = lzf(POINTS.astype("<f4").T.tobytes())
    head = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 30\nDATA binary_compressed\n"
    (tmp_path / "a.pcd").write_bytes(
        head.encode() + struct.pack("<II", len(content), 360) + content
    )
    assert np.allclose(read(tmp_path / "a.pcd").file_coordinates(), POINTS, atol=1e-4)
    monkeypatch.setitem(sys.modules, "lzf", None)
    with pytest.raises(ReadError, match=r"needs lzf: pip install 'jepa3d\[io\]'"):
        read(tmp_path / "a.pcd")


def test_laz_without_its_decompressor_says_how_to_get_it(tmp_path, monkeypatch):
    laspy = pytest.importorskip("laspy")
    made = laspy.create(point_format=3)
    made.x, made.y, made.z = POINTS.T
    made.write(str(tmp_path / "a.laz"))
    monkeypatch.setitem(sys.modules, "lazrs", None)
    with pytest.raises(ReadError, match=r"needs lazrs: pip install 'jepa3d\[io\]'"):
        read(tmp_path / "a.laz")


def test_e57_without_scans_or_valid_points(tmp_path):
    pye57 = pytest.importorskip("pye57")
    with pye57.E57(str(tmp_path / "none.e57"), "w"):
        pass
    with pytest.raises(ReadError, match=r"none\.e57: has no scans"):
        read(tmp_path / "none.e57")
    columns = {f"cartesian{axis}": POINTS[:, i].copy() for i, axis in enumerate("XYZ")}
    columns["cartesianInvalidState"] = (np.arange(30) % 3 == 0).astype(np.int8)
    with pye57.E57(str(tmp_path / "some.e57"), "w") as file:
        file.write_scan_raw(columns)
    cloud = read(tmp_path / "some.e57")
    assert np.allclose(cloud.file_coordinates(), POINTS[np.arange(30) % 3 > 0], atol=1e-3)
    assert cloud.unseen == 10


@pytest.mark.parametrize(
    "below", ["m,m,m,-", "float,float,float,int", "m,m,m,-\nsurveyed,surveyed,surveyed,"]
)
def test_units_and_types_may_stand_below_the_names(tmp_path, below):
    points = np.random.default_rng(0).normal(size=(80, 3))
    lines = [f"{z:.6f},{x:.6f},{y:.6f},1" for x, y, z in points]
    (tmp_path / "a.csv").write_text("\n".join(["z,x,y,intensity", below, *lines]))
    assert np.allclose(read(tmp_path / "a.csv").file_coordinates(), points, atol=1e-5)
