"""`--up-axis none`: such vectors do not change when a cloud is rotated, and are not mixed with
other vectors.
"""

import numpy as np
import pytest
import torch

from jepa3d import frame
from jepa3d.cli import main
from jepa3d.data.datasets import PointClouds
from jepa3d.data.synthetic import make_shapes
from jepa3d.evaluation.descriptors import baselines
from jepa3d.evaluation.features import layer_features, untrained_like
from jepa3d.inference.embedding import embed
from jepa3d.inference.search import query_vectors, search
from jepa3d.models.encoder import PointEncoder

pytest.importorskip("pyarrow")
RNG = np.random.default_rng(0)


def turn() -> np.ndarray:
    """Sample a rotation [3, 3] uniformly."""
    q, upper = np.linalg.qr(RNG.normal(size=(3, 3)))
    q = q * np.sign(np.diag(upper))
    return q * np.linalg.det(q)


@pytest.fixture
def encoder() -> PointEncoder:
    torch.manual_seed(0)
    return PointEncoder(32, 2, 2, 16, 8, 128, tokenizer_dim=16).eval()


@pytest.fixture
def clouds() -> list[np.ndarray]:
    return list(make_shapes(12, 512, seed=0)["points"].astype(np.float64) * [1, 1.3, 1.7])


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_a_turn_changes_no_vector_and_without_none_it_does(encoder, clouds):
    turned = [7 * cloud @ turn() + [5, 0, 1] for cloud in clouds]
    found = cosine(embed(clouds, encoder, "none"), embed(turned, encoder, "none"))
    # All clouds but three keep their vector; axes are ambiguous if two are nearly equal.
    assert np.sort(found)[3:].min() > 0.99999
    assert found.min() > 0.9
    assert np.median(cosine(embed(clouds, encoder), embed(turned, encoder))) < 0.999
    assert encoder.upright


def test_the_twelve_turns_are_a_group_of_rotations():
    products = {(a @ b).astype(int).tobytes() for a in frame.TURNS for b in frame.TURNS}
    assert products == {turn.astype(int).tobytes() for turn in frame.TURNS}
    assert len(products) == 12
    np.testing.assert_allclose(np.linalg.det(frame.TURNS), 1)
    up = (frame.TURNS @ np.eye(3))[:, 2].astype(int).tolist()  # each axis points up in two of them
    assert sorted(up) == sorted(
        [*np.eye(3, dtype=int).tolist(), *(-np.eye(3, dtype=int)).tolist()] * 2
    )


def test_own_axes_are_found_beside_strays_and_a_place_is_where_the_encoder_sees_it(clouds):
    for cloud in clouds:
        away = turn()
        found = frame.frame(cloud @ away, 128, upright=False)
        alone = frame.frame(cloud, 128, upright=False)
        assert np.linalg.det(found.turn) == pytest.approx(1)
        assert found.radius == pytest.approx(alone.radius, rel=0.02)
        placed = found.place(cloud @ away)
        gap = np.linalg.norm(placed[:, None] - found.points[None], axis=-1).min(0)
        assert gap.max() < 1e-5  # every point that the encoder sees is a point of the cloud
    box = np.concatenate([RNG.uniform(-1, 1, (500, 3)) * [1, 2, 4], [[40, 0, 0]]])
    axes = np.abs(frame.own_axes(box))
    np.testing.assert_allclose(axes, np.eye(3), atol=0.15)


def test_vectors_of_any_pose_are_found_by_a_turned_query_and_not_mixed(
    encoder, clouds, tmp_path, capsys
):
    encoder.save_pretrained(tmp_path / "one")
    (tmp_path / "scans").mkdir()
    for i, cloud in enumerate(clouds):
        np.save(tmp_path / "scans" / f"{i}.npy", cloud)
    flags = ["--model", str(tmp_path / "one"), "--out", str(tmp_path / "v.parquet")]
    with pytest.raises(SystemExit) as ended:
        main(["embed", str(tmp_path / "scans"), *flags, "--up-axis", "none"])
    assert not ended.value.code
    np.save(tmp_path / "query.npy", clouds[5] @ turn())
    _, vectors = query_vectors(tmp_path / "v.parquet", str(tmp_path / "query.npy"))
    (hits,) = search(tmp_path / "v.parquet", vectors, 1)
    assert hits[0].path.endswith("5.npy")
    assert hits[0].cosine > 0.9999
    with pytest.raises(SystemExit) as ended:
        main(["embed", str(tmp_path / "scans"), *flags])
    assert ended.value.code
    assert "up-axis none (not z)" in " ".join(capsys.readouterr().err.split())


def test_nothing_beside_the_encoder_changes_with_a_turn(encoder, clouds):
    encoder.upright = False
    given, turned = (
        encoder.prepare(some) for some in (clouds[:3], [cloud @ turn() for cloud in clouds[:3]])
    )
    for name, (of, _) in baselines(encoder, given).items():
        np.testing.assert_allclose(of(turned), of(given), atol=0.05, err_msg=name)


def test_an_untrained_encoder_and_its_probed_layers_take_the_same_poses(encoder, clouds):
    shapes = [
        PointClouds("s", "f", np.stack(c).astype(np.float32))
        for c in (clouds[:3], [c @ turn() for c in clouds[:3]])
    ]
    encoder.upright = False
    model = untrained_like(encoder, shapes[0])
    found = [layer_features(model, some) for some in shapes]
    np.testing.assert_allclose(*found, atol=0.02)
    np.testing.assert_allclose(found[0][-1], model.embed(shapes[0].points).detach(), atol=1e-5)
