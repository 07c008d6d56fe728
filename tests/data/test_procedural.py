"""The endless procedural set: shapes differ, are equal on every machine, and are of many kinds."""

from pathlib import Path

import numpy as np
import pytest

from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import load
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.data.procedural import make_procedural
from jepa3d.data.store import Store

KNOWN = [
    [0.060930, 0.426725, -0.453050],
    [-0.013864, 0.024049, 0.327101],
    [0.625026, 0.207015, -0.553307],
]


@pytest.fixture(scope="module")
def shapes() -> np.ndarray:
    return np.stack([make_procedural(i, 1024) for i in range(200)])


def test_shapes_fill_the_unit_sphere(shapes):
    assert np.isfinite(shapes).all()
    assert np.allclose(shapes.mean(1), 0, atol=1e-5)
    assert np.allclose(np.linalg.norm(shapes, axis=2).max(1), 1, atol=1e-5)


def test_a_shape_depends_on_its_number_and_the_seed_alone(shapes):
    assert np.array_equal(make_procedural(7, 1024), shapes[7])
    assert not np.allclose(make_procedural(7, 1024, seed=1), shapes[7], atol=0.01)
    ordered = np.sort(shapes, axis=1)
    distances = np.linalg.norm(ordered[:, None] - ordered[None, :40], axis=(2, 3))
    assert distances[~np.eye(200, 40, dtype=bool)].min() > 0.5


def test_shapes_are_the_same_on_any_machine():
    """KNOWN has coordinates that were computed once."""
    found = [make_procedural(i, 512)[100] for i in (0, 1, 123456)]
    assert np.allclose(found, KNOWN, atol=1e-5)


def test_there_are_solids_plates_and_rods(shapes):
    spread = np.stack([np.linalg.svd(cloud, compute_uv=False) for cloud in shapes])
    flat, thin = spread[:, 2] / spread[:, 0], spread[:, 1] / spread[:, 0]
    assert 0.03 < (flat < 0.15).mean() < 0.5
    assert 0.03 < (thin < 0.25).mean() < 0.5
    assert (flat > 0.6).mean() > 0.03


def test_a_store_of_them_is_the_same_with_any_number_of_processes(tmp_path):
    stores = [tmp_path / "one", tmp_path / "two"]
    for workers, store in enumerate(stores, 1):
        prepare(Path("procedural:9"), store, Preparation(points=256), workers=workers)
    one, two = (Store(store) for store in stores)
    assert len(one) == 9
    assert all(np.array_equal(one.points(i), two.points(i)) for i in range(9))
    read = load(["procedural:9"], 256)
    assert read.points.shape == (9, 256, 3)
    # The store keeps half precision.
    assert np.allclose(np.sort(read.points[3], 0), np.sort(one.points(3), 0), atol=2e-3)


@pytest.mark.parametrize(
    "source", ["procedural:", "procedural:0", "procedural:many", "procedural:-3"]
)
def test_a_wrong_count_is_refused_in_one_line(source):
    with pytest.raises(
        ReadError, match=f"^{source}: give procedural:COUNT with a COUNT of 1 or more$"
    ):
        load([source], 64)


def test_a_folder_may_be_called_procedural(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("procedural").mkdir()
    np.save("procedural/a.npy", make_procedural(0, 64))
    assert len(load(["procedural"], 64)) == 1


def test_the_source_needs_its_count():
    with pytest.raises(ReadError, match="procedural:COUNT"):
        load(["procedural"], 64)
