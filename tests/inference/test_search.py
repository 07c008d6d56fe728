"""Neighbours, filters and deletions agree with brute force, for vector files and for the index."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jepa3d.cli import main
from jepa3d.data.cloud import ReadError
from jepa3d.inference import lance, neighbours
from jepa3d.inference import vectors as parquet
from jepa3d.inference.hits import Condition, Hit
from jepa3d.inference.lance import VectorStore, create_or_update
from jepa3d.inference.neighbours import percentile, random_cosines
from jepa3d.inference.search import query_vectors, search
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.inference.vectors import Vectors, table, with_errors, write
from jepa3d.models.encoder import PointEncoder

RNG = np.random.default_rng(0)
SPEC = EmbeddingSpec("m", "0123", -1, "mean_max", "z", 12)
PATHS = [f"/data/{'it' if i % 3 else 'o'}'s_{i} 100%.ply" for i in range(500)]
LABELS = [(None, "cup", "o'mug")[i % 3] for i in range(500)]
POINTS = RNG.integers(100, 5000, 500).tolist()
X = RNG.normal(size=(500, 12)).astype(np.float32)
WHERES = [
    ["label=cup"],
    ["label!=cup"],
    ["label=o'mug", "num_points>=1000"],
    ["path~/data/it's_*7 100%.ply"],
    ["path~*_1?? *"],
    ["num_points<200"],
    ["label~*u*", "path!=/data/it's_4 100%.ply"],
    ["path=/data/it's_4 100%.ply"],
    ["label=none"],
]


def rows(keep: np.ndarray, spec: EmbeddingSpec = SPEC) -> pa.Table:
    chosen = [i for i in range(500) if keep[i]]
    columns = {
        name: [values[i] for i in chosen] for name, values in (("path", PATHS), ("label", LABELS))
    }
    columns |= {"num_points": [POINTS[i] for i in chosen], "stamp": [2**63 + i for i in chosen]}
    return table(spec, zip(*columns.values(), X[chosen], strict=True))


@pytest.fixture
def index(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 64)  # several batches
    write([rows(np.ones(500, bool))], tmp_path / "v.parquet")
    return tmp_path / "v.parquet"


@pytest.fixture
def store(index):
    create_or_update(Vectors(index), index.with_name("v.lancedb"))
    return index.with_name("v.lancedb")


def by_hand(
    query: np.ndarray, k: int, where: list[str], x: np.ndarray = X
) -> list[tuple[str, float]]:
    keep = np.ones(500, bool)
    for condition in map(Condition.parse, where):
        keep &= condition.holds(
            {"path": PATHS, "label": LABELS, "num_points": POINTS}[condition.column]
        )
    cosine = x.astype(float) @ query / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
    order = [i for i in np.argsort(-cosine, kind="stable") if keep[i]][:k]
    return [(PATHS[i], cosine[i]) for i in order]


def agree(hits, expected) -> None:
    assert [hit.path for hit in hits] == [path for path, _ in expected]
    assert np.allclose([hit.cosine for hit in hits], [value for _, value in expected], atol=1e-5)
    assert [hit.label for hit in hits] == [LABELS[PATHS.index(path)] for path, _ in expected]


@pytest.mark.parametrize("where", [[], *WHERES], ids=str)
def test_files_and_store_find_what_brute_force_finds(index, store, where):
    for query in RNG.normal(size=(3, 12)):
        expected = by_hand(query, 7, where)
        agree(search(index, query, 7, where)[0], expected)
        agree(search(store, query, 7, where)[0], expected)


def test_a_number_of_points_may_be_beyond_64_bits(index, store):
    for where in (index, store):
        assert len(search(where, X[0], 3, [f"num_points<{10**20}"])[0]) == 3
        assert search(where, X[0], 3, [f"num_points>{10**20}"]) == [[]]


def test_many_queries_at_once_and_more_neighbours_than_rows(index, store):
    queries = RNG.normal(size=(4, 12))
    for found, query in zip(search(index, queries, 1000), queries, strict=True):
        agree(found, by_hand(query, 1000, []))
    assert len(search(store, queries[0], 1000)[0]) == 500


def test_conditions_mean_what_they_say():
    assert Condition.parse("label != a=b").holds(["a=b", "b", None]).tolist() == [False, True, True]
    assert Condition.parse("path~*/x?.ply").holds(["a/x1.ply", "a/x12.ply", "x1.ply"]).tolist() == [
        True,
        False,
        False,
    ]
    assert Condition.parse("path~[a]*").holds(["[a]b", "ab"]).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_in_the_order_of_their_paths_in_both(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(parquet, "ROWS", int(rng.integers(3, 90)))
    monkeypatch.setattr(lance, "_SPARE", int(rng.integers(1, 9)))
    few = rng.normal(size=(5, 12)).astype(np.float32)
    which = rng.integers(5, size=200)  # about forty copies of each vector, in random rows
    paths = [f"/{name:03d}.ply" for name in rng.permutation(200)]
    columns = {"path": paths, "label": [None] * 200, "num_points": [9] * 200, "stamp": [0] * 200}
    write([table(SPEC, zip(*columns.values(), few[which], strict=True))], tmp_path / "v.parquet")
    create_or_update(Vectors(tmp_path / "v.parquet"), tmp_path / "v.lancedb")
    for query in (few[0], rng.normal(size=12)):
        cosine = few.astype(float) @ query / np.linalg.norm(few, axis=1) / np.linalg.norm(query)
        expected = [path for _, path in sorted(zip(-cosine[which], paths, strict=True))]
        for k in (1, 7, 60, 200):
            for name in ("v.parquet", "v.lancedb"):
                hits = search(tmp_path / name, query, k)[0]
                assert [hit.path for hit in hits] == expected[:k]
                assert len({hit.cosine for hit in hits}) == len(
                    set(which[[paths.index(hit.path) for hit in hits]])
                )


@pytest.mark.parametrize(
    "text", ["label", "colour=red", "num_points=many", "num_points~1*", "=x", "vector=1"]
)
def test_a_condition_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="condition"):
        Condition.parse(text)


def test_the_query_itself_is_left_out_when_told(index):
    assert search(index, X[5], 1)[0][0].path == PATHS[5]
    assert search(index, X[5], 1, exclude=[PATHS[5]])[0][0].path != PATHS[5]


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (np.ones(11), 1, "a query has 11 numbers, the vectors have 12"),
        (np.zeros(12), 1, "zero or not finite"),
        (np.full(12, np.nan), 1, "zero or not finite"),
        (np.ones(12), 0, "-k 0"),
    ],
)
def test_a_query_that_cannot_be_is_refused_by_both(index, store, query, k, message):
    for where in (index, store):
        with pytest.raises(ValueError, match=message):
            search(where, query, k)


def test_the_store_replaces_adds_deletes_and_stays_exact(index, store, tmp_path):
    old = np.arange(500) < 100
    moved = X.copy()
    moved[:100] = RNG.normal(size=(100, 12))
    columns = {
        "path": PATHS[:100],
        "label": LABELS[:100],
        "num_points": POINTS[:100],
        "stamp": [1] * 100,
    }
    write([table(SPEC, zip(*columns.values(), moved[old], strict=True))], tmp_path / "new.parquet")
    assert create_or_update(Vectors(tmp_path / "new.parquet"), store) == (0, 100)
    query = RNG.normal(size=12)
    agree(search(store, query, 9)[0], by_hand(query, 9, [], moved))
    assert VectorStore(store).delete([Condition.parse("label=o'mug")]) == LABELS.count("o'mug")
    agree(search(store, query, 9)[0], by_hand(query, 9, ["label!=o'mug"], moved))
    assert create_or_update(Vectors(index), store)[0] == LABELS.count("o'mug")
    agree(search(store, query, 9)[0], by_hand(query, 9, []))


def test_an_index_finds_nearly_all_and_filters_after_it_are_exact(store):
    opened = VectorStore(store)
    with pytest.raises(ValueError, match="--probes needs jepa3d index --ann"):
        search(store, X[0], probes=3)
    opened.build()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"--probes {wrong}: must be 1 or more"):
            search(store, X[0], probes=wrong)
    queries = RNG.normal(size=(20, 12))
    # 40 probes search all partitions of the 500 rows.
    for query, hits in zip(queries, search(store, queries, 10, probes=40), strict=True):
        agree(hits, by_hand(query, 10, []))
    for where in WHERES:
        agree(search(store, queries[0], 5, where)[0], by_hand(queries[0], 5, where))


def test_what_is_no_index_is_named(index, store, tmp_path):
    for path, message in (
        (tmp_path / "no.parquet", "make it with jepa3d embed"),
        (tmp_path / "no.lancedb", "make it with jepa3d embed"),
    ):
        with pytest.raises(ReadError, match=message):
            search(path, X[0])
    (tmp_path / "bad.parquet").write_bytes(index.read_bytes()[:-100])
    with pytest.raises(ReadError, match="not a readable Parquet file"):
        search(tmp_path / "bad.parquet", X[0])
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ReadError, match="not a file of jepa3d embed"):
        search(tmp_path / "other.parquet", X[0])
    (tmp_path / "empty.lancedb").mkdir()
    with pytest.raises(ReadError, match="not a store of jepa3d index"):
        search(tmp_path / "empty.lancedb", X[0])
    with pytest.raises(ValueError, match=r"ends in \.lancedb"):
        create_or_update(Vectors(index), tmp_path / "store")
    write(
        [rows(np.ones(500, bool), EmbeddingSpec("n", "4567", -1, "mean_max", "z", 12))],
        tmp_path / "n.parquet",
    )
    with pytest.raises(ValueError, match="another model"):
        create_or_update(Vectors(tmp_path / "n.parquet"), store)


# ----------------------------------------------------------------------------------------- commands


@pytest.fixture
def scans(tmp_path):
    torch.manual_seed(0)
    PointEncoder(32, 2, 2, 16, 8, 128, tokenizer_dim=16).save_pretrained(tmp_path / "model")
    ball = RNG.normal(size=(150, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    for i in range(4):
        for name, stretch in (("ball", 1.0), ("stick", 0.05)):
            (tmp_path / "scans" / name).mkdir(parents=True, exist_ok=True)
            noise = RNG.normal(scale=0.01, size=ball.shape)
            np.savetxt(tmp_path / "scans" / name / f"{i}.xyz", ball * [stretch, stretch, 1] + noise)
    run("embed", tmp_path / "scans", "--model", tmp_path / "model", "--out", tmp_path / "v.parquet")
    return tmp_path


def run(*arguments) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0


def said(capsys, *arguments) -> str:
    capsys.readouterr()
    run(*arguments)
    return capsys.readouterr().out


def test_the_neighbours_of_a_stick_are_sticks_from_files_and_from_the_store(scans, capsys):
    query, store = scans / "scans" / "stick" / "2.xyz", scans / "v.lancedb"
    assert "8 vectors" in said(capsys, "index", scans / "v.parquet", "--out", store)
    for where in (scans / "v.parquet", store):
        (line,) = said(capsys, "search", where, query, "-k", "3", "--json").splitlines()
        hits = json.loads(line)["hits"]
        assert [hit["label"] for hit in hits] == ["stick"] * 3
        assert str(query) not in [hit["path"] for hit in hits]
        assert "[ball]" in said(capsys, "search", where, query, "--where", "label=ball")
    assert "4 deleted" in said(capsys, "index", store, "--out", store, "--delete", "label=stick")
    assert "[stick]" not in said(capsys, "search", store, query)
    link = scans / "link.lancedb"
    link.symlink_to(store)
    assert "4 deleted" in said(capsys, "index", link, "--out", store, "--delete", "label=ball")


def test_a_query_of_the_index_is_left_out_however_it_is_spelled(scans, capsys, monkeypatch):
    folder = scans / "scans" / "ball"
    (folder / "0.xyz").rename(folder / "scan#1.xyz")
    (folder / "1.xyz").rename(folder / "#.xyz")
    np.savez(scans / "scans" / "many.npz", points=RNG.normal(size=(3, 150, 3)))
    np.savetxt(scans / "scans" / "many.npz#1.xyz", RNG.normal(size=(150, 3)))
    run("prepare", scans / "scans", "--points", "128", "--out", scans / "store#2")
    (scans / "link").symlink_to(scans / "scans")
    (scans / "link.npz").symlink_to(scans / "scans" / "many.npz")
    (scans / "link#store").symlink_to(scans / "store#2")
    monkeypatch.chdir(scans)
    run("embed", "scans", "store#2", "--model", scans / "model", "--out", "w.parquet")
    run("index", "w.parquet", "--out", "w.lancedb")
    total = len(Vectors("w.parquet"))
    for query, path in (
        ("scans/ball/scan#1.xyz", "scans/ball/scan#1.xyz"),
        ("./scans/ball/../ball/#.xyz", "scans/ball/#.xyz"),
        ("link/ball/scan#1.xyz", "scans/ball/scan#1.xyz"),
        ("scans/many.npz#1", "scans/many.npz#1"),
        ("link.npz#1", "scans/many.npz#1"),
        ("link#store#many.npz#1", "store#2#many.npz#1"),
        ("scans/many.npz#1.xyz", "scans/many.npz#1.xyz"),
        ("store#2#ball/#.xyz", "store#2#ball/#.xyz"),
        ("store#2#many.npz#1", "store#2#many.npz#1"),
        (scans / "scans" / "stick" / "0.xyz", "scans/stick/0.xyz"),
    ):
        for index in ("w.parquet", "w.lancedb"):
            lines = said(capsys, "search", index, query, "-k", "100").splitlines()
            found = [line.split("  ")[2] for line in lines[1:]]
            assert len(found) == len(set(found)) == total - 1
            assert path not in found
            if not str(query).startswith("link"):
                assert lines[0] == f"{path}:"
            assert (
                len(
                    said(capsys, "search", index, query, "-k", "100", "--include-self").splitlines()
                )
                == total + 1
            )


@pytest.mark.parametrize("rows", [1, 2, 3, 40, 500])
def test_a_cosine_stands_among_random_pairs_of_the_index(tmp_path, rows, monkeypatch):
    """The share is exact for a small index. For a larger one it is estimated from a sample."""
    write([rows_of(rows)], tmp_path / "v.parquet")
    create_or_update(Vectors(tmp_path / "v.parquet"), tmp_path / "v.lancedb")
    unit = X[:rows].astype(float) / np.linalg.norm(X[:rows], axis=1)[:, None]
    every = (unit @ unit.T)[np.triu_indices(rows, 1)]
    for index in (tmp_path / "v.parquet", tmp_path / "v.lancedb"):
        pairs = random_cosines(index)
        assert np.allclose(pairs, np.sort(every))
        assert np.array_equal(pairs, random_cosines(index))
    for cosine in (-1.0, 0.0, 0.2, 0.9, 1.0):
        share = None if rows == 1 else 100 * (every < cosine).mean()
        assert percentile(cosine, pairs) == (
            None if share is None else pytest.approx(share, abs=0.06)
        )
    monkeypatch.setattr(neighbours, "SAMPLE", 150)
    for index in (tmp_path / "v.parquet", tmp_path / "v.lancedb"):
        if rows == 500:
            assert percentile(0.2, random_cosines(index)) == pytest.approx(
                percentile(0.2, pairs), abs=5
            )


def rows_of(count: int) -> pa.Table:
    return rows(np.arange(500) < count)


def test_search_says_how_a_cosine_stands_in_lines_json_and_page(scans, capsys):
    query, index = scans / "scans" / "stick" / "2.xyz", scans / "v.parquet"
    lines = said(capsys, "search", index, query, "-k", "2", "--html", scans / "p.html").splitlines()
    (line,) = said(capsys, "search", index, query, "-k", "2", "--json").splitlines()
    for text, hit in zip(lines[1:], json.loads(line)["hits"], strict=True):
        assert text.endswith(f"(above {hit['percentile']:.1f} % of random pairs)")
        assert f"<td>{hit['percentile']:.1f} %</td>" in (scans / "p.html").read_text()
        assert hit["percentile"] > 50


def test_a_page_is_bounded_and_says_what_it_leaves_out(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "PICTURED", 3)
    clouds = sorted(map(str, (scans / "scans").rglob("*.xyz")))
    hits = [Hit(0.9 - i / 1000, clouds[i % 8], "stick") for i in range(150)]
    pairs = random_cosines(scans / "v.parquet")
    neighbours.write_page([(clouds[0], hits)] * 5, scans / "v.parquet", pairs, tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    assert html.count("data:image/png") == 3
    assert "the first 10 of 150" in html
    assert "50 more are not listed here" in html
    assert "The first 3 of 5 queries have pictures" in html
    assert len(html) < 100_000 * 5


def test_the_page_shows_the_query_and_its_neighbours_and_says_what_is_gone(scans, capsys):
    (scans / "scans" / "stick" / "0.xyz").unlink()
    query, page = scans / "scans" / "stick" / "2.xyz", scans / "page.html"
    said(capsys, "search", scans / "v.parquet", query, "-k", "3", "--html", page)
    html = page.read_text()
    assert html.count("data:image/png") == 1
    assert "0.xyz: no longer there" in html
    assert html.count("<td>stick</td>") == 3


def test_a_query_may_be_vectors_and_the_model_may_have_moved(scans, capsys):
    made = np.concatenate(
        [parquet.to_numpy(b.column(0)) for b in Vectors(scans / "v.parquet").batches(["vector"])]
    )
    np.save(scans / "q.npy", made[:2])
    assert (
        len(
            said(
                capsys, "search", scans / "v.parquet", scans / "q.npy", "-k", "1", "--json"
            ).splitlines()
        )
        == 2
    )
    for wrong in (np.ones((2, 5, 64)), np.full((2, 64), "a")):
        np.save(scans / "wrong.npy", wrong)
        with pytest.raises(ReadError, match=r"wrong\.npy"):
            query_vectors(scans / "v.parquet", scans / "wrong.npy")
    (scans / "model").rename(scans / "moved")
    query = scans / "scans" / "ball" / "0.xyz"
    with pytest.raises(ValueError, match="neither a folder nor"):
        query_vectors(scans / "v.parquet", str(query))
    assert "[ball]" in said(
        capsys, "search", scans / "v.parquet", query, "--model", scans / "moved"
    )
    PointEncoder(32, 2, 2, 16, 8, 128, tokenizer_dim=16).save_pretrained(scans / "other")
    with pytest.raises(ValueError, match="another encoder"):
        query_vectors(scans / "v.parquet", str(query), str(scans / "other"))


def test_a_damaged_row_group_is_named_by_its_file(tmp_path):
    file = tmp_path / "v.parquet"
    write([rows(np.ones(500, bool))], file)
    content = bytearray(file.read_bytes())
    for at in range(40, len(content) // 2):
        content[at] ^= 0x5A
    file.write_bytes(content)
    with pytest.raises(ReadError, match=r"v\.parquet: damaged"):
        search(file, X[0])
    for _ in range(2):
        with pytest.raises(ReadError, match=r"v\.parquet: damaged"):
            create_or_update(Vectors(file), tmp_path / "v.lancedb")
        assert not (tmp_path / "v.lancedb").exists()
    write([rows(np.ones(500, bool))], tmp_path / "good.parquet")
    create_or_update(Vectors(tmp_path / "good.parquet"), tmp_path / "v.lancedb")
    with pytest.raises(ReadError, match=r"v\.parquet: damaged"):
        create_or_update(Vectors(file), tmp_path / "v.lancedb")
    assert len(VectorStore(tmp_path / "v.lancedb")) == 500


def test_a_damaged_column_of_errors_is_named_by_its_file(tmp_path):
    file = tmp_path / "v.parquet"
    write([with_errors(rows(np.ones(500, bool)), [("x.ply", "damaged")])], file)
    group = pq.ParquetFile(file).metadata.row_group(0)
    column = group.column(group.num_columns - 1)
    assert column.path_in_schema == "error"
    content, begin = bytearray(file.read_bytes()), column.data_page_offset
    content[begin : begin + 8] = bytes(8)
    file.write_bytes(content)
    with pytest.raises(ReadError, match=r"v\.parquet: damaged"):
        Vectors(file)


def test_vectors_of_zero_length_are_never_found(tmp_path):
    file, zero = tmp_path / "v.parquet", np.zeros((50, SPEC.embed_dim), np.float32)
    zero[:2] = X[:2]
    names = [f"{i}" for i in range(50)]
    columns = {"path": names, "label": names, "num_points": [9] * 50, "stamp": [1] * 50}
    write([table(SPEC, zip(*columns.values(), zero, strict=True))], file)
    assert sorted(hit.path for hit in search(file, X[0], k=10)[0]) == ["0", "1"]
