"""From a folder of files to a classifier: clusters, names, the head in the saved network, and
predictions for new files.
"""

import csv
import logging

import numpy as np
import pytest
import torch

from jepa3d.data.cloud import ReadError
from jepa3d.evaluation.classifiers import fit_head
from jepa3d.inference import label as module
from jepa3d.inference.label import FEWEST, cluster, known_clouds, label, read_names
from jepa3d.inference.predicting import predict_files
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import load, load_network

RNG = np.random.default_rng(0)


@pytest.fixture
def scans(tmp_path):
    torch.manual_seed(0)
    PointEncoder(32, 2, 2, 16, 8, 128, tokenizer_dim=16).save_pretrained(tmp_path / "model")
    ball = RNG.normal(size=(150, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    (tmp_path / "scans").mkdir()
    for i in range(24):
        stretch = ([1, 1, 1], [0.05, 0.05, 1], [1, 1, 0.05])[i % 3]
        np.savetxt(
            tmp_path / "scans" / f"{i:02}.xyz",
            ball * stretch + RNG.normal(scale=0.02, size=ball.shape),
        )
    return tmp_path


def table(file) -> list[dict]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_clusters_are_those_of_the_vectors_nearest_first():
    centers = np.eye(8)[:3] * 5
    x = np.concatenate([centers[i] + RNG.normal(scale=0.1, size=(10 + i, 8)) for i in range(3)])
    groups = list(cluster(x, 3))
    assert [len(group) for group in groups] == [12, 11, 10]
    assert [set(group) for group in groups] == [
        set(range(21, 33)),
        set(range(10, 21)),
        set(range(10)),
    ]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for group in groups:
        distance = np.linalg.norm(unit[group] - unit[group].mean(0), axis=1)
        assert (np.diff(distance) >= -1e-9).all()


def test_copies_of_two_clouds_make_two_clusters():
    groups = list(cluster(np.repeat(np.eye(4)[:2], [5, 3], 0), 4))
    assert [group.tolist() for group in groups] == [[0, 1, 2, 3, 4], [5, 6, 7]]


def test_the_head_is_estimated_on_what_it_did_not_see():
    y = np.repeat(np.arange(3), 20)
    assert fit_head(RNG.normal(size=(60, 50)), y)[1] < 0.6
    assert fit_head(np.eye(3)[y] + RNG.normal(scale=0.1, size=(60, 3)), y)[1] > 0.95
    assert fit_head(np.eye(3), np.arange(3))[1] is None


@pytest.mark.parametrize("classes", [2, 3])
def test_from_a_folder_to_predictions_of_new_files(scans, classes, caplog):
    caplog.set_level(logging.INFO)
    out, kinds = scans / "out", ["ball", "stick", "plate"][:classes]
    label([scans / "scans"], out, str(scans / "model"), clusters=4)
    assert (out / "clusters.html").read_text().count("data:image/png") == 4
    rows = table(out / "names.csv")
    assert 8 <= len(rows) <= 24
    assert {row["name"] for row in rows} == {""}
    assert [row["cluster"] for row in rows] == sorted(row["cluster"] for row in rows)
    assert {row["cluster"] for row in rows} == set("1234")
    assert not (out / "labels.csv").exists()
    names = [(f"scans/{i:02}.xyz", kinds[i % 3]) for i in range(12) if i % 3 < classes]
    names_csv = "\n".join(["path,name", *(f"{scans}/{path},{name}" for path, name in names)])
    (out / "names.csv").write_text(names_csv)
    label([scans / "scans"], out, str(scans / "model"))
    assert "cross-validated" in caplog.text
    found = table(out / "labels.csv")
    assert len(found) == 24
    certainty = [float(row["probability"]) for row in found]
    assert certainty == sorted(certainty)
    for row in found:
        if (number := int(row["path"][-6:-4])) % 3 < classes:
            assert row["class"] == kinds[number % 3]
    # The saved network predicts the same classes.
    predict_files(out, [scans / "scans"], scans / "p.csv")
    predicted = {row["file"]: row for row in table(scans / "p.csv")}
    for row in found:
        there = predicted[row["path"]]
        assert there["class"] == row["class"]
        assert float(there["probability"]) == pytest.approx(float(row["probability"]), abs=2e-3)
    saved = load_network(out)
    assert torch.equal(saved.encoder.norm.weight, load(scans / "model").norm.weight)


def test_a_class_of_one_example_is_named_and_clusters_that_come_too_late_are_said(scans, caplog):
    caplog.set_level(logging.INFO)
    out = scans / "out"
    out.mkdir()
    named = [(0, "ball"), (3, "ball"), (1, "stick"), (2, "plate")]
    (out / "names.csv").write_text(
        "path,name\n" + "".join(f"{scans}/scans/{i:02}.xyz,{n}\n" for i, n in named)
    )
    label([scans / "scans"], out, str(scans / "model"), clusters=5)
    said = caplog.text
    assert "a second named cloud of each of these classes: plate, stick" in said
    assert "--clusters 5: ignored" in said
    assert not (out / "clusters.html").exists()


def test_whoever_sits_there_is_asked(scans, monkeypatch):
    answers = iter(["a", "", "b"])
    monkeypatch.setattr(module.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    label([scans / "scans"], scans / "out", str(scans / "model"), clusters=3)
    named = [row["name"] for row in table(scans / "out" / "names.csv")]
    assert named == ["a"] * 6 + [""] * 6 + ["b"] * 6
    assert {row["class"] for row in table(scans / "out" / "labels.csv")} == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,name\na,b\n", "needs columns path and name"),
        ("path,name\nno.xyz,b\n", "no.xyz is not among"),
        ("name,path\nchair\n", "the name 'chair' has no path"),
    ],
)
def test_names_that_cannot_be_used_are_told(tmp_path, text, message):
    (tmp_path / "n.csv").write_text(text)
    with pytest.raises(ReadError, match=message):
        read_names(tmp_path / "n.csv", ["/a"])


def test_names_may_have_paths_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "n.csv").write_text("path,name\n../a.xyz,cup\n./b.xyz,jug\n")
    paths = [str(tmp_path / "a.xyz"), str(tmp_path / "here" / "b.xyz")]
    assert read_names(tmp_path / "n.csv", paths) == dict(zip(paths, ("cup", "jug"), strict=True))


def test_a_number_of_clusters_that_cannot_be(scans):
    for count in (0, 25):
        with pytest.raises(ValueError, match=f"--clusters {count}: give 2 to 24"):
            label([scans / "scans"], scans / "out", str(scans / "model"), clusters=count)
    with pytest.raises(ValueError, match="only one cloud: label needs at least two"):
        label([scans / "scans" / "00.xyz"], scans / "one", str(scans / "model"))


def test_a_list_without_names_costs_no_names_given_before(scans):
    out, model = scans / "labels", str(scans / "model")
    label([scans / "scans"], out, model, clusters=2)
    text = (out / "names.csv").read_text().replace(",,", ",cup,", 1)
    (out / "names.csv").write_text(text)
    (scans / "blank.csv").write_text("path,name\n")
    with pytest.raises(ReadError, match="has no name for any of the clouds"):
        label([scans / "scans"], out, model, names=scans / "blank.csv")
    assert (out / "names.csv").read_text() == text


def test_the_threshold_is_what_the_lowest_of_twenty_reaches_without_itself():
    y, rng = np.repeat([0, 1, 2], [12, 9, 1]), np.random.default_rng(1)
    x = np.concatenate([3 * np.eye(6)[y] + rng.normal(size=(22, 6)), rng.normal(size=(40, 6))])
    (threshold, _), z = known_clouds(x, np.arange(22), y), (x - x.mean(0)) / x.std(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    best = []
    for i in range(21):  # the last one is left out: it is alone in its class
        others = [np.flatnonzero((y == c) & (np.arange(22) != i)) for c in range(3)]
        means = [z[rows].mean(0) for rows in others]
        best.append(max(z[i] @ mean / np.linalg.norm(mean) for mean in means))
    assert threshold == pytest.approx(min(best))
    with pytest.raises(
        ValueError, match=f"needs at least {FEWEST} named clouds .* there are 18; name more"
    ):
        known_clouds(x, np.arange(3, 22), y[3:])


@pytest.fixture
def named(scans):
    """Write 24 more scans, and a CSV that names all balls and sticks. The 16 plates have no name
    and look different. Returns the folder.
    """
    for i in range(24):
        points = np.loadtxt(scans / "scans" / f"{i:02}.xyz")
        np.savetxt(
            scans / "scans" / f"{24 + i:02}.xyz", points + RNG.normal(scale=0.02, size=points.shape)
        )
    rows = [f"{scans}/scans/{i:02}.xyz,{('ball', 'stick')[i % 3]}" for i in range(48) if i % 3 < 2]
    (scans / "names.csv").write_text("path,name\n" + "\n".join(rows))
    return scans


def test_clouds_unlike_every_named_one_are_called_unknown(named, caplog):
    caplog.set_level(logging.INFO)
    out, model = named / "out", str(named / "model")
    label([named / "scans"], out, model, names=named / "names.csv", unknown=True)
    rows = table(out / "labels.csv")
    plates = {row["path"] for row in rows if int(row["path"][-6:-4]) % 3 == 2}
    unknown = {row["path"] for row in rows if row["class"] == "unknown"}
    assert len(plates & unknown) > 12
    assert len(unknown - plates) <= 2  # about one in 20 of the 32 named
    assert f"{len(unknown)} clouds are called unknown" in caplog.text
    for row in rows:
        assert (row["probability"] == "") == (row["class"] == "unknown")
        assert row["second"] in ("ball", "stick")
    assert [row["class"] == "unknown" for row in rows] == [True] * len(unknown) + [False] * (
        48 - len(unknown)
    )
    predict_files(out, [named / "scans"], named / "p.csv")
    assert {row["file"] for row in table(named / "p.csv") if row["class"] == "unknown"} == unknown
    label([named / "scans"], out, model, names=named / "names.csv")
    assert {row["class"] for row in table(out / "labels.csv")} == {"ball", "stick"}


def test_unknown_is_no_name_of_a_class_then_and_needs_enough_named_clouds(named):
    text = (named / "names.csv").read_text()
    (named / "names.csv").write_text(text.replace(",stick", ",unknown"))
    with pytest.raises(ValueError, match=r"names\.csv has a class named unknown"):
        label(
            [named / "scans"],
            named / "out",
            str(named / "model"),
            names=named / "names.csv",
            unknown=True,
        )
    (named / "names.csv").write_text("\n".join(text.splitlines()[:10]))
    with pytest.raises(ValueError, match="there are 9; name more"):
        label(
            [named / "scans"],
            named / "out",
            str(named / "model"),
            names=named / "names.csv",
            unknown=True,
        )
    assert not (named / "out" / "labels.csv").exists()
