"""Operators are compared with simple loops."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from jepa3d import ops
from jepa3d.ops import (
    BatchGenerator,
    farthest_point_sample,
    knn,
    squared_distance,
    uniform,
    uniform_scalar,
)


def clouds(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))


def square(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def fps_by_loop(cloud: torch.Tensor, num_samples: int, first: int) -> list[int]:
    rows, picked = cloud.double().tolist(), [first]
    while len(picked) < num_samples:
        gaps = [min(square(p, rows[i]) for i in picked) for p in rows]
        picked.append(gaps.index(max(gaps)))
    return picked


# ------------------------------------------------------------------------------------------ draws


def test_same_seed_step_and_stream_draw_the_same():
    one, two = (BatchGenerator(3, 5).stream("group") for _ in range(2))
    assert torch.equal(uniform(one, (4, 2), "cpu"), uniform(two, (4, 2), "cpu"))
    assert uniform_scalar(one) == uniform_scalar(two)


@pytest.mark.parametrize(
    ("seed", "step", "stream"), [(4, 5, "group"), (3, 6, "group"), (3, 5, "sampler")]
)
def test_another_seed_step_or_stream_draws_otherwise(seed, step, stream):
    reference = uniform(BatchGenerator(3, 5).stream("group"), (8,), "cpu")
    assert not torch.isin(
        uniform(BatchGenerator(seed, step).stream(stream), (8,), "cpu"), reference
    ).any()


def test_one_stream_does_not_shift_another():
    base = BatchGenerator(0)
    uniform(base.stream("a"), (100,), "cpu")
    assert torch.equal(
        uniform(base.stream("b"), (4,), "cpu"), uniform(BatchGenerator(0).stream("b"), (4,), "cpu")
    )


def test_a_generator_moves_on():
    generator = BatchGenerator(0)
    assert not torch.equal(uniform(generator, (8,), "cpu"), uniform(generator, (8,), "cpu"))


def test_rows_of_two_halves_are_the_whole_batch_draw_after_draw():
    whole, *halves = (
        BatchGenerator(1, 2, first, total) for first, total in [(0, None), (0, 6), (3, 6)]
    )
    for shape in [(3,), (3, 5)]:
        rows = torch.cat([uniform(half, shape, "cpu") for half in halves])
        assert torch.equal(rows, uniform(whole, (6, *shape[1:]), "cpu"))
    assert len({uniform_scalar(generator) for generator in (whole, *halves)}) == 1


def test_repeated_rows_of_two_halves_are_those_of_the_whole_batch():
    whole, *halves = (
        BatchGenerator(1, 2, first, total).repeated(2)
        for first, total in [(0, None), (0, 6), (3, 6)]
    )
    rows = torch.cat([uniform(half, (6, 5), "cpu") for half in halves])
    assert torch.equal(rows, uniform(whole, (12, 5), "cpu"))
    assert len(rows.unique(dim=0)) == 12


def test_a_plain_generator_draws_from_its_own_state():
    shape = (2, 3)
    expected = torch.rand(shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(uniform(torch.Generator().manual_seed(7), shape, "cpu"), expected)
    scalar = torch.rand((), generator=torch.Generator().manual_seed(7)).item()
    assert uniform_scalar(torch.Generator().manual_seed(7)) == scalar
    start = (torch.rand(2, generator=torch.Generator().manual_seed(7)) * 40).long()
    assert torch.equal(
        farthest_point_sample(clouds(2, 40), 5, torch.Generator().manual_seed(7))[:, 0], start
    )


# --------------------------------------------------------------------------------- farthest points


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), num_points=st.integers(1, 40), share=st.floats(0.01, 1))
def test_each_point_is_the_farthest_from_those_before_it_and_the_first_from_the_centroid(
    seed, num_points, share
):
    points, num_samples = clouds(3, num_points, seed=seed).double(), math.ceil(share * num_points)
    for cloud, index in zip(
        points, farthest_point_sample(points.float(), num_samples).tolist(), strict=True
    ):
        assert len(set(index)) == len(index) == num_samples
        before = cloud.mean(0, keepdim=True)
        for count, pick in enumerate(index, 1):
            gaps = torch.cdist(cloud, before).amin(1)
            assert gaps[pick] > gaps.max() - 1e-5
            before = cloud[index[:count]]


def test_farthest_points_are_those_of_a_loop():
    points = clouds(5, 30)
    for cloud, index in zip(points, farthest_point_sample(points, 30).tolist(), strict=True):
        assert index == fps_by_loop(cloud, 30, (cloud - cloud.mean(0)).norm(dim=1).argmax().item())


def test_farthest_points_from_a_random_start_are_those_of_a_loop():
    points = clouds(5, 30)
    index = farthest_point_sample(points, 12, BatchGenerator(1))
    assert index.tolist() == [
        fps_by_loop(c, 12, first) for c, first in zip(points, index[:, 0].tolist(), strict=True)
    ]
    assert len(set(index[:, 0].tolist())) > 1


def test_random_starts_reach_every_point():
    points = clouds(1, 4).expand(200, -1, -1)
    assert set(farthest_point_sample(points, 1, BatchGenerator(0)).flatten().tolist()) == {
        0,
        1,
        2,
        3,
    }


def test_of_equally_far_points_the_lowest_index_wins():
    lattice = torch.cartesian_prod(*[torch.arange(4.0)] * 3)[None]
    assert farthest_point_sample(lattice, 30).tolist() == [fps_by_loop(lattice[0], 30, 0)]


def test_a_batch_is_its_clouds_one_by_one():
    points = clouds(4, 50)
    alone = torch.cat([farthest_point_sample(cloud[None], 20) for cloud in points])
    assert torch.equal(farthest_point_sample(points, 20), alone)


def test_the_order_of_the_points_does_not_change_what_is_picked():
    points, order = clouds(3, 60), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    picked = ops.gather_points(points, farthest_point_sample(points, 15))
    shuffled = points[:, order]
    again = ops.gather_points(shuffled, farthest_point_sample(shuffled, 15))
    for one, other in zip(picked.tolist(), again.tolist(), strict=True):
        assert set(map(tuple, one)) == set(map(tuple, other))


@pytest.mark.parametrize("num_samples", [0, 11])
def test_more_samples_than_points_or_none_is_an_error(num_samples):
    with pytest.raises(ValueError, match=rf"{num_samples} samples of 10 points"):
        farthest_point_sample(clouds(1, 10), num_samples)


def compiled_and_reference(points, num_samples, monkeypatch, generator=None):
    pytest.importorskip("torch_quickfps")
    calls, fast = [], ops._quickfps()

    class Counted:
        @staticmethod
        def sample_idx(*args, **kwargs):
            calls.append(1)
            return fast.sample_idx(*args, **kwargs)

    monkeypatch.setattr(ops, "_quickfps", lambda: Counted)
    compiled = farthest_point_sample(points, num_samples, generator and BatchGenerator(generator))
    assert len(calls) == 1, "the compiled back end takes the whole batch"
    monkeypatch.setattr(ops, "_quickfps", lambda: None)
    return compiled, farthest_point_sample(
        points, num_samples, generator and BatchGenerator(generator)
    )


@pytest.mark.parametrize(
    ("num_points", "num_samples"), [(1024, 64), (1024, 1024), (2048, 128), (1500, 700)]
)
@pytest.mark.parametrize("generator", [None, 3])
def test_the_compiled_back_end_gives_the_reference_indices(
    num_points, num_samples, generator, monkeypatch
):
    points = clouds(2, num_points)
    compiled, reference = compiled_and_reference(points, num_samples, monkeypatch, generator)
    assert torch.equal(compiled, reference)
    assert compiled.dtype == reference.dtype


def test_the_compiled_back_end_reads_a_transposed_cloud(monkeypatch):
    points = torch.randn(2, 3, 1024, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    assert torch.equal(*compiled_and_reference(points, 50, monkeypatch))


def test_the_compiled_back_end_takes_the_same_coordinates_where_points_repeat(monkeypatch):
    points = clouds(1, 300).repeat(1, 4, 1)
    compiled, reference = compiled_and_reference(points, 64, monkeypatch)
    assert torch.equal(points[0, compiled[0]], points[0, reference[0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_goes_to_the_compiled_back_end(dtype, monkeypatch):
    monkeypatch.setattr(
        ops, "_quickfps", lambda: pytest.fail("the compiled back end rounds to float32")
    )
    assert len(set(farthest_point_sample(clouds(1, 1024).to(dtype), 64)[0].tolist())) == 64


# ------------------------------------------------------------------------------------- neighbours


def test_squared_distance_is_that_of_a_loop():
    a, b = clouds(2, 3), clouds(2, 4, seed=1)
    expected = [
        [[square(p, q) for q in y] for p in x] for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert_close(squared_distance(a, b), torch.tensor(expected))


def test_squared_distance_survives_a_far_origin():
    """The form |a|^2 + |b|^2 - 2ab, computed with a matrix product, would lose these digits."""
    a = torch.tensor([[1000.0, 0, 0]])
    assert squared_distance(a, a + torch.tensor([0.0, 0.0, 2**-7])).item() == 2**-14


@pytest.mark.parametrize("k", [1, 7, 30])
def test_neighbours_are_those_of_a_full_sort(k):
    points, query = clouds(3, 30), clouds(3, 11, seed=1)
    expected = (
        (query[:, :, None].double() - points[:, None].double())
        .square()
        .sum(-1)
        .argsort(-1)[..., :k]
    )
    assert torch.equal(knn(query, points, k), expected)


@pytest.mark.parametrize("max_pairs", [1, 3 * 30 * 4, 3 * 30 * 11])
def test_neighbours_in_chunks_are_the_neighbours(max_pairs, monkeypatch):
    points, query = clouds(3, 30), clouds(3, 11, seed=1)
    whole, calls = knn(query, points, 5), []
    monkeypatch.setattr(ops, "_MAX_PAIRS", max_pairs)
    monkeypatch.setattr(
        ops, "squared_distance", lambda a, b: calls.append(a.shape[1]) or squared_distance(a, b)
    )
    assert torch.equal(knn(query, points, 5), whole)
    assert max(calls) == max(1, max_pairs // 90)


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_points_or_none_is_an_error(k):
    with pytest.raises(ValueError, match=f"{k} nearest neighbours in a cloud of 5 points"):
        knn(clouds(1, 2), clouds(1, 5), k)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 1, 2, 2)])
def test_gather_takes_the_rows_of_the_same_cloud(shape):
    values = torch.arange(2 * 5 * 2.0).view(2, 5, 2)
    index = torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([values[b][index[b]] for b in range(2)])
    assert torch.equal(ops.gather_points(values, index), expected)


# ---------------------------------------------------------------------------------- interpolation


def test_interpolation_gives_back_the_features_at_the_centres():
    centers, features = (
        clouds(2, 9),
        torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1)),
    )
    assert_close(ops.three_nn_interpolate(centers, centers, features), features, atol=1e-4, rtol=0)


def test_interpolation_from_fewer_than_three_centres_uses_all():
    query, centers = clouds(2, 5, seed=1), clouds(2, 1)
    features = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1))
    out = ops.three_nn_interpolate(query, centers, features)
    assert_close(out, features.expand(2, 5, 4))


def test_interpolation_is_that_of_a_loop():
    query, centers = clouds(2, 5, seed=1), clouds(2, 9)
    features = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    out = ops.three_nn_interpolate(query, centers, features)
    for b in range(2):
        for q in range(5):
            gaps = [square(query[b, q].tolist(), c) for c in centers[b].tolist()]
            nearest = sorted(range(9), key=gaps.__getitem__)[:3]
            weights = [1 / (gaps[i] + 1e-8) for i in nearest]
            expected = sum(
                w / sum(weights) * features[b, i] for w, i in zip(weights, nearest, strict=True)
            )
            assert_close(out[b, q], expected)


# --------------------------------------------------------------------------------- sphere, chamfer


def test_unit_sphere_centres_and_scales_each_cloud():
    points = clouds(3, 40) * torch.tensor([0.01, 1.0, 500.0])[:, None, None] + 30
    out = ops.unit_sphere(points)
    assert_close(out.mean(1), torch.zeros(3, 3), atol=1e-4, rtol=0)
    assert_close(out.norm(dim=-1).amax(1), torch.ones(3))
    assert_close(out, ops.unit_sphere(7 * points - 2), atol=2e-3, rtol=0)


def test_unit_sphere_of_one_repeated_point_is_its_centre():
    assert torch.equal(ops.unit_sphere(torch.full((1, 4, 3), 2.0)), torch.zeros(1, 4, 3))


def test_chamfer_is_that_of_a_loop():
    a, b = clouds(2, 3, 5), clouds(2, 3, 7, seed=1)
    there, back = [], []
    for x, y in zip(a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), strict=True):
        there += [min(math.dist(p, q) for q in y) for p in x]
        back += [min(math.dist(p, q) for q in x) for p in y]
    expected = (sum(there) / len(there) + sum(back) / len(back)) / 2
    assert_close(ops.chamfer_l1(a, b).item(), expected, atol=1e-5, rtol=0)
    assert_close(ops.chamfer_l1(b, a), ops.chamfer_l1(a, b))
    assert ops.chamfer_l1(a, a.flip(-2)) == 0


def test_the_gradient_of_chamfer_is_its_finite_difference():
    a, b = (clouds(2, n, seed=n).double().requires_grad_() for n in (4, 6))
    assert torch.autograd.gradcheck(ops.chamfer_l1, (a, b))


# ------------------------------------------------------------------------------------------ shapes


def test_a_shape_that_a_signature_does_not_have_is_an_error_here():
    jaxtyping = pytest.importorskip("jaxtyping")
    points, wide = torch.zeros(2, 5, 3), torch.zeros(2, 4, 2)
    for arguments in (
        (wide, points, 1),
        (torch.zeros(3, 4, 3), points, 1),
        (points.long(), points, 1),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            knn(*arguments)


def test_elsewhere_shapes_are_neither_checked_nor_imported():
    code = "import sys, jepa3d.models.heads, jepa3d.ops; assert 'jaxtyping' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
