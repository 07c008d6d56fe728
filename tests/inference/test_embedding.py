"""Vectors of arrays and files: new, changed and bad files, and the result of an interruption."""

import base64
import json
import logging
import multiprocessing
import os
from itertools import islice

import numpy as np
import pytest
import torch

from jepa3d import embed, load
from jepa3d.data.cloud import ReadError
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.store import Store
from jepa3d.inference import embed_files as updating
from jepa3d.inference import embedding as module
from jepa3d.inference.clouds import cloud_paths, find_clouds, item_at
from jepa3d.inference.embed_files import embed_files
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import fingerprint
from jepa3d.plain import log

RNG = np.random.default_rng(0)
SIZES = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    PointEncoder(**SIZES, tokenizer_dim=16).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    for i in range(6):
        file = folder / ("cup" if i % 2 else "car") / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, RNG.normal(size=(200 + i, 3)))
    return folder


def rows(out) -> dict[str, np.ndarray]:
    found = Vectors(out)
    paths = found.column("path")
    assert len(paths) == len(set(paths)) == len(found)
    made = np.concatenate([to_numpy(batch.column(0)) for batch in found.batches(["vector"])])
    return dict(zip(paths, made, strict=True))


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        np.allclose(one[key], two[key], atol=1e-5) for key in one
    )


# ---------------------------------------------------------------------------------------- in memory


def test_arrays_lists_and_files_give_the_encoder_s_own_vectors(model, scans):
    encoder = load(model)
    clouds = [np.load(path) for path in cloud_paths(scans)]
    expected = np.concatenate(
        [encoder.embed(torch.from_numpy(c)[None]).detach().numpy() for c in clouds]
    )
    assert np.allclose(embed(clouds, encoder), expected, atol=1e-5)
    assert np.allclose(embed(scans, encoder), expected, atol=1e-5)
    assert np.allclose(embed(clouds[2], encoder), expected[2:3], atol=1e-5)
    assert np.allclose(
        embed(np.stack([clouds[0], clouds[0]]), encoder), expected[[0, 0]], atol=1e-5
    )


def test_the_up_axis_is_turned(model):
    encoder, cloud = load(model), RNG.normal(size=(150, 3))
    y_up = np.stack([cloud[:, 0], cloud[:, 2], -cloud[:, 1]], 1)
    assert np.allclose(embed(y_up, encoder, up_axis="y"), embed(cloud, encoder), atol=1e-4)
    assert not np.allclose(embed(y_up, encoder), embed(cloud, encoder), atol=1e-2)


@pytest.mark.parametrize("up_axis", ["z", "y"])
def test_gltf_is_turned_as_its_standard_says_whatever_else_is_said(model, tmp_path, up_axis):
    encoder, cloud = load(model), RNG.normal(size=(150, 3)).astype(np.float32)
    data = np.stack([cloud[:, 0], cloud[:, 2], -cloud[:, 1]], 1).tobytes()
    scene = {
        "asset": {"version": "2.0"},
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "mode": 0}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 150, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": len(data)}],
        "buffers": [
            {"byteLength": len(data), "uri": "data:;base64," + base64.b64encode(data).decode()}
        ],
    }
    (tmp_path / "a.gltf").write_text(json.dumps(scene))
    assert np.allclose(
        embed(tmp_path / "a.gltf", encoder, up_axis=up_axis), embed(cloud, encoder), atol=1e-4
    )


def test_a_cloud_of_few_points_is_filled_and_one_of_too_few_refused(model):
    encoder = load(model)
    assert embed(RNG.normal(size=(16, 3)), encoder).shape == (1, 64)
    with pytest.raises(ReadError, match="cloud 0: 15 points"):
        embed([RNG.normal(size=(15, 3))], encoder)


def test_a_bad_cloud_does_not_end_a_list(model, scans, tmp_path, capfd):
    """The row of the bad cloud is NaN, and a warning names it; nothing is printed."""
    encoder, good = load(model), RNG.normal(size=(200, 3))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    clouds = [good, tmp_path / "bad.npy", tmp_path / "none.ply", scans / "cup", good[:3], good]
    with pytest.warns(UserWarning, match="its vector is NaN") as said:
        vectors = embed(clouds, encoder)
    assert np.isnan(vectors).all(1).tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert np.allclose(vectors[[0, 7]], embed(good, encoder), atol=1e-5)
    for text, message in zip(
        ("bad.npy: damaged", "none.ply: no such", "cloud 4: 3 points"), said, strict=True
    ):
        assert text in str(message.message)
        assert message.filename == __file__
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up_axis": "w"}, "up axis 'w'"),
        ({"layer": 3}, "layer 3: use 0"),
        ({"pooling": "sum"}, "pooling 'sum'"),
    ],
)
def test_settings_that_do_not_exist_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        embed(RNG.normal(size=(200, 3)), load(model), **arguments)


def test_load_says_what_is_no_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a PointEncoder: it lacks embed_dim"):
        load(tmp_path)


def test_fingerprints_differ_with_one_weight(model):
    one, two = load(model), load(model)
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.norm.weight[0] += 1e-3
    assert fingerprint(one) != fingerprint(two)


# --------------------------------------------------------------------------------- files to Parquet


def test_a_second_run_embeds_what_is_new_or_changed_and_nothing_else(
    model, scans, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    out, read = tmp_path / "v.parquet", []
    work = module.embed_items
    monkeypatch.setattr(
        module, "embed_items", lambda *args: read.extend(i.path for i in args[-1]) or work(*args)
    )
    embed_files([scans], out, model, workers=1)
    assert len(rows(out)) == len(read) == 6
    np.save(scans / "cup" / "1.npy", RNG.normal(size=(300, 3)))
    np.save(scans / "cup" / "new.npy", RNG.normal(size=(300, 3)))
    (scans / "car" / "0.npy").unlink()
    read.clear()
    embed_files([scans], out, model, workers=1)
    assert sorted(os.path.basename(path) for path in read) == ["1.npy", "new.npy"]
    assert "1 new, 1 changed, 4 unchanged" in caplog.text
    assert len(rows(out)) == 7
    embed_files([scans], out, model, workers=1, prune=True)
    embed_files([scans], tmp_path / "fresh.parquet", model, workers=1)
    assert same(rows(out), rows(tmp_path / "fresh.parquet"))


def test_prune_keeps_a_sibling_whose_name_begins_alike_and_drops_what_a_file_held(model, tmp_path):
    out, file, other = tmp_path / "v.parquet", tmp_path / "s" / "a.npy", tmp_path / "s#2" / "a.npy"
    for path in (file, other):
        path.parent.mkdir()
        np.save(path, RNG.normal(size=(150, 3)))
    embed_files([file.parent, other.parent], out, model, workers=1)
    np.save(file, RNG.normal(size=(2, 150, 3)))
    embed_files([file], out, model, workers=1, prune=True)
    assert rows(out).keys() == {f"{file}#0", f"{file}#1", str(other)}
    embed_files([file.parent], out, model, workers=1, prune=True)
    assert str(other) in rows(out)


def test_an_encoder_that_was_trained_again_is_loaded_again(scans, tmp_path):
    for name in ("old", "new"):
        PointEncoder(**SIZES, tokenizer_dim=16).save_pretrained(tmp_path / "model")
        embed_files([scans], tmp_path / f"{name}.parquet", str(tmp_path / "model"), workers=1)
    assert not same(rows(tmp_path / "old.parquet"), rows(tmp_path / "new.parquet"))


def test_an_embedder_finds_its_encoder_from_another_folder(model, scans, monkeypatch):
    monkeypatch.chdir(model)
    embedder = module.Embedder(".")
    monkeypatch.chdir(scans)
    made = embedder({"path": ["cup/1.npy"]})
    assert made["path"].to_pylist() == [str(scans / "cup" / "1.npy")]
    assert made["error"].to_pylist() == [None]


def test_a_folder_called_default_is_not_taken_for_the_encoder_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)
    assert EmbeddingSpec.of("default", load(), "z", -1, "mean").model == "default"


def test_a_folder_of_shares_has_each_path_once_whoever_brings_it_up_to_date(model, scans, tmp_path):
    out, one = tmp_path / "vectors", tmp_path / "one.parquet"

    def change_and_compare(*shares: str) -> None:
        np.save(scans / "cup" / "1.npy", RNG.normal(size=(300, 3)))
        np.save(
            scans / "car" / f"{'-'.join(shares).replace('/', 'of')}.npy", RNG.normal(size=(300, 3))
        )
        for share in shares:
            embed_files([scans], out, model, workers=1, share=share)
        embed_files([scans], one, model, workers=1)
        assert same(rows(out), rows(one))

    change_and_compare("1/2", "2/2")
    change_and_compare("2/2", "1/2")
    change_and_compare("1/1")  # both parts
    assert sorted(file.name for file in out.iterdir()) == ["part-1of2.parquet", "part-2of2.parquet"]
    with pytest.raises(ValueError, match="has 2 shares"):
        embed_files([scans], out, model, workers=1, share="1/3")
    (out / "copy.parquet").write_bytes((out / "part-1of2.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"copy\.parquet: not written"):
        embed_files([scans], out, model, workers=1)


@pytest.mark.parametrize("method", sorted({*multiprocessing.get_all_start_methods()} - {"fork"}))
def test_two_processes_give_what_one_gives(model, scans, tmp_path, monkeypatch, method):
    """This holds for every way to start processes; Windows has only `spawn`."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: [method])
    for workers in (1, 2):
        embed_files([scans], tmp_path / f"{workers}.parquet", model, workers=workers)
    assert same(rows(tmp_path / "1.parquet"), rows(tmp_path / "2.parquet"))


def test_an_accelerator_gives_what_the_workers_give(model, scans, tmp_path, monkeypatch):
    (scans / "cup" / "bad.npy").write_bytes(b"no array")
    embed_files([scans], tmp_path / "cpu.parquet", model, workers=1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(module, "BATCH", 2)
    embed_files([scans], tmp_path / "device.parquet", model, workers=1)
    assert len(rows(tmp_path / "cpu.parquet")) == 6
    assert same(rows(tmp_path / "cpu.parquet"), rows(tmp_path / "device.parquet"))


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_an_interrupted_run_keeps_its_vectors_and_goes_on(
    model, scans, tmp_path, monkeypatch, stop
):
    out, whole, mapped = tmp_path / "v.parquet", tmp_path / "whole.parquet", updating.mapped
    embed_files([scans], whole, model, workers=1)

    def stopping(*arguments):
        yield from islice(mapped(*arguments), stop)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(updating, "mapped", stopping)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after {stop} new"):
            embed_files([scans], out, model, workers=1)
    assert out.exists() == (stop > 0)
    embed_files([scans], out, model, workers=1)
    assert same(rows(out), rows(whole))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scans", "v.parquet", "whole.parquet"]


def test_a_full_disk_is_named_and_leaves_the_old_file(model, scans, tmp_path, monkeypatch):
    out = tmp_path / "v.parquet"
    embed_files([scans / "cup"], out, model, workers=1)
    before = rows(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match=r"v\.parquet: cannot be written \(disk full\)"):
            embed_files([scans], out, model, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scans", "v.parquet"]
    assert same(rows(out), before)
    embed_files([scans], out, model, workers=1)
    assert len(rows(out)) == 6


def test_a_store_is_embedded_z_up_whatever_is_said_of_files(model, scans, tmp_path):
    prepare(scans, tmp_path / "store", Preparation(points=128, up_axis="y"), workers=1)
    embed_files([tmp_path / "store"], tmp_path / "v.parquet", model, up_axis="y", workers=1)
    made = rows(tmp_path / "v.parquet")
    assert len(made) == 6
    store = Store(tmp_path / "store")
    for row in range(6):
        expected = load(model).embed(torch.tensor(store.points(row)).float()[None]).detach()
        assert np.allclose(made[f"{tmp_path / 'store'}#{store.key(row)}"], expected, atol=1e-4)


@pytest.mark.parametrize("change", [{"up_axis": "y"}, {"points": 100}, {"keep_strays": True}])
def test_clouds_of_a_store_made_again_with_another_setting_are_changed(tmp_path, scans, change):
    stamps = []
    for settings in ({"points": 128}, {"points": 128} | change):
        store = tmp_path / f"{len(stamps)}" / "store"
        prepare(scans, store, Preparation(**settings), workers=1)
        stamps.append([item.stamp for item in find_clouds(store)[0]])
        assert item_at(find_clouds(store)[0][0].path).stamp == stamps[-1][0]
    assert not set(stamps[0]) & set(stamps[1])


def test_a_path_leads_back_to_its_cloud(scans, tmp_path):
    np.savez(
        tmp_path / "many.npz", points=RNG.normal(size=(3, 140, 3)), names=np.array(["a", "b", "c"])
    )
    prepare(scans, tmp_path / "store", Preparation(points=128), workers=1)
    for path in (scans, tmp_path / "many.npz", tmp_path / "store"):
        for item in find_clouds(path)[0]:
            found = item_at(item.path)
            assert np.array_equal(found.read().points, item.read().points)
    assert [item.label for item in find_clouds(tmp_path / "many.npz")[0]] == ["a", "b", "c"]
    with pytest.raises(ReadError, match="no longer there"):
        item_at(f"{tmp_path / 'store'}#nothing")


def test_bad_files_are_named_and_left_out(model, scans, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(log, "handlers", [])  # removes the printer of the tests
    (scans / "cup" / "bad.npy").write_bytes(b"no array")
    (scans / "cup" / os.fsdecode(b"\xff.npy")).write_bytes((scans / "cup" / "1.npy").read_bytes())
    embed_files([scans], tmp_path / "v.parquet", model, workers=1)
    assert "bad.npy: damaged" in caplog.text
    assert len(rows(tmp_path / "v.parquet")) == 7
    embed_files([scans], tmp_path / "v.parquet", model, workers=1)
    assert "0 new, 0 changed, 7 unchanged; left out 1" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_where_no_cloud_can_be_used_nothing_is_left(model, tmp_path):
    (tmp_path / "bad.xyz").write_text("1 2 nan\n" * 200)
    with pytest.raises(ReadError, match="none of the clouds"):
        embed_files([tmp_path / "bad.xyz"], tmp_path / "v.parquet", model, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.xyz"]


def test_vectors_of_another_model_or_setting_are_not_mixed(model, scans, tmp_path):
    out, other = tmp_path / "v.parquet", tmp_path / "other"
    embed_files([scans], out, model, workers=1)
    PointEncoder(**SIZES, tokenizer_dim=16).save_pretrained(other)
    with pytest.raises(ValueError, match="another model"):
        embed_files([scans], out, str(other), workers=1)
    with pytest.raises(ValueError, match="pooling mean_max"):
        embed_files([scans], out, model, pooling="max", workers=1)
    embed_files([scans], tmp_path / "folder" / "a.parquet", model, workers=1)
    embed_files([scans], tmp_path / "folder" / "b.parquet", str(other), workers=1)
    with pytest.raises(ValueError, match=r"b\.parquet: .*another model"):
        Vectors(tmp_path / "folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": "3/2"}, "--share 3/2"),
        ({"share": "1/2"}, "needs a folder"),
        ({"workers": -1}, "--workers -1"),
        ({"model": "/nowhere/at/all"}, "neither a folder nor"),
    ],
)
def test_mistakes_are_one_line(model, scans, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        embed_files([scans], tmp_path / "v.parquet", **({"model": model} | arguments))
    assert not (tmp_path / "v.parquet").exists()
