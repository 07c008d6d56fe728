"""The encoder's public methods: embed, save, load, and errors."""

import pytest
import torch
from torch.testing import assert_close

from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm, pool, standardise_vectors
from jepa3d.models.layout import Ragged
from jepa3d.models.ready import fingerprint
from jepa3d.models.tokenizer import group
from jepa3d.models.transformer import Attention, drop_path_scales
from jepa3d.ops import BatchGenerator

SIZES = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
}


def clouds(batch: int = 3, num_points: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, num_points, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder():
    """Return a calibrated encoder with weights so large that every part affects the result."""
    torch.manual_seed(0)
    encoder = PointEncoder(**SIZES).eval()
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    calibrate_batchnorm(encoder, encoder.prepare(clouds(8, seed=9)))
    return encoder


@pytest.mark.parametrize(("pooling", "width"), [("mean_max", 48), ("mean", 24), ("max", 24)])
def test_a_cloud_becomes_one_vector(encoder, pooling, width):
    assert encoder.embed(clouds(), pooling=pooling).shape == (3, width)


def test_poolings_are_what_they_are_called():
    tokens = torch.randn(2, 5, 3)
    assert_close(pool(tokens, "mean"), tokens.sum(1) / 5)
    assert torch.equal(pool(tokens, "max"), tokens.max(1).values)
    assert torch.equal(pool(tokens), torch.cat([pool(tokens, "mean"), pool(tokens, "max")], -1))
    with pytest.raises(ValueError, match=r"'sum'.*mean_max, mean, max"):
        pool(tokens, "sum")


def test_layers_run_from_the_tokenizer_to_the_normalised_output(encoder):
    states, centers = encoder.layer_tokens(clouds())
    assert [state.shape for state in states] == [(3, 8, 24)] * 3
    grouped = group(encoder.prepare(clouds()), 8, 8)
    assert torch.equal(states[0], encoder.tokenizer(grouped.patches))
    assert torch.equal(centers, grouped.centers)
    assert_close(states[-1].mean(-1), torch.zeros(3, 8), atol=1e-5, rtol=0)
    for layer in (0, 1, -1):
        assert torch.equal(encoder.tokens(clouds(), layer)[0], states[layer])


def test_positions_are_added_at_every_block(encoder):
    states, centers = encoder.layer_tokens(clouds())
    x, position = states[0], encoder.position(centers)
    for block in encoder.blocks:
        x = block(x + position)
    assert_close(states[-1], encoder.norm(x))


@pytest.mark.parametrize("num_points", [64, 100])
def test_the_order_of_the_points_does_not_change_the_embedding(encoder, num_points):
    points = clouds(num_points=num_points)
    shuffled = points[:, torch.randperm(num_points, generator=torch.Generator().manual_seed(1))]
    assert_close(encoder.embed(shuffled), encoder.embed(points), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_points", [64, 100])
@pytest.mark.parametrize(
    ("scale", "shift"), [(0.001, 0.0), (250.0, 0.0), (1.0, 20.0), (30.0, -400.0)]
)
def test_unit_and_origin_do_not_change_the_embedding(encoder, num_points, scale, shift):
    points = clouds(num_points=num_points)
    assert_close(encoder.embed(points * scale + shift), encoder.embed(points), atol=1e-2, rtol=1e-2)


def test_another_cloud_has_another_embedding(encoder):
    """Without this, a constant vector would pass the invariance tests above."""
    one, other = encoder.embed(clouds(1)), encoder.embed(clouds(1, seed=5))
    assert (one - other).abs().max() > 0.1


def test_a_cloud_is_embedded_alike_alone_and_in_a_batch(encoder):
    assert_close(encoder.embed(clouds())[1:2], encoder.embed(clouds()[1:2]), atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_what_is_loaded(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = PointEncoder.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded.embed(clouds()), encoder.embed(clouds()))
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    assert all(
        torch.equal(value, encoder.state_dict()[name])
        for name, value in loaded.state_dict().items()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_coordinate_that_is_no_number_is_an_error(encoder, bad):
    points = clouds()
    points[1, 7, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        encoder.embed(points)


@pytest.mark.parametrize("shape", [(64,), (2, 64, 4), (1, 2, 64, 3)])
def test_an_array_that_is_no_batch_of_clouds_is_an_error(encoder, shape):
    with pytest.raises(ValueError, match="N x 3"):
        encoder.embed(torch.zeros(shape))


def test_too_few_points_is_an_error(encoder):
    with pytest.raises(ValueError, match="7 points, at least 8 are needed"):
        encoder.embed(clouds(num_points=7))


def test_impossible_sizes_are_errors():
    with pytest.raises(ValueError, match="num_groups 65"):
        PointEncoder(**SIZES | {"num_groups": 65})
    with pytest.raises(ValueError, match="embed_dim 24 is not a multiple of num_heads 5"):
        PointEncoder(**SIZES | {"num_heads": 5})


def test_the_default_has_the_parents_parameters():
    """The encoders of Point-MAE and ACT have no biases of queries, keys and values. With these
    biases there would be 12 x 3 x 384 more parameters.
    """
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in PointEncoder(qkv_bias=bias).parameters())
            for bias in (False, True)
        ]
        without = [
            name for name, _ in PointEncoder(depth=1).named_parameters() if "attention" in name
        ]
    assert counts == [21_825_024, 21_838_848]
    parts = ("query.weight", "key_value.weight", "out.weight", "out.bias")
    assert without == [f"blocks.0.attention.{part}" for part in parts]


# ----------------------------------------------------------------------------- standardised vectors


def test_standardised_vectors_have_mean_0_and_deviation_1_over_the_clouds_given(encoder):
    points, others = clouds(40, seed=1), clouds(5, seed=2)
    before = {layer: encoder.embed(others, layer) for layer in (0, 1, 2, -1)}
    known = encoder.embed(points)
    standardise_vectors(encoder, points, batch_size=16)
    vectors = encoder.embed(points)
    assert_close(vectors.mean(0), torch.zeros(48), atol=1e-5, rtol=0)
    assert_close(vectors.std(0, correction=0), torch.ones(48), atol=1e-5, rtol=0)
    expected = (before[-1] - known.mean(0)) / known.std(0, correction=0)
    assert_close(encoder.embed(others), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(encoder.embed(others, 2), encoder.embed(others))
    for name, part in (("mean", slice(24)), ("max", slice(24, None))):
        assert torch.equal(encoder.embed(others, pooling=name), encoder.embed(others)[:, part])
    for layer in (0, 1):
        assert torch.equal(encoder.embed(others, layer), before[layer])


def test_standardising_again_does_not_add_up(encoder):
    standardise_vectors(encoder, clouds(40, seed=1))
    once = encoder.embed(clouds())
    standardise_vectors(encoder, clouds(40, seed=1))
    assert torch.equal(encoder.embed(clouds()), once)


def test_a_standardised_encoder_is_saved_loaded_and_told_apart(encoder, tmp_path):
    before, fresh = fingerprint(encoder), PointEncoder(**SIZES).eval()
    standardise_vectors(encoder, clouds(40, seed=1))
    encoder.save_pretrained(tmp_path)
    loaded = PointEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.embed(clouds()), encoder.embed(clouds()))
    assert fingerprint(loaded) == fingerprint(encoder) != before
    fresh.load_weights(encoder)
    assert fingerprint(fresh) == before


def test_a_channel_that_never_varies_does_not_divide_by_zero(encoder):
    standardise_vectors(encoder, clouds(1).expand(4, -1, -1))
    assert encoder.embed(clouds()).isfinite().all()


# --------------------------------------------------------------------------- calibration, attention


def test_calibration_on_one_batch_is_the_textbook_mean_and_variance():
    torch.manual_seed(0)
    encoder, points = PointEncoder(**SIZES).eval(), clouds(5)
    calibrate_batchnorm(encoder, points)
    rows = encoder.tokenizer.linear1(group(encoder.prepare(points), 8, 8).patches.reshape(-1, 3))
    norm = encoder.tokenizer.norm1
    assert_close(norm.running_mean, rows.mean(0))
    assert_close(norm.running_var, rows.var(0))
    assert not any(module.training for module in encoder.modules())
    assert norm.momentum == 0.1


def test_calibration_in_batches_is_the_mean_over_batches():
    torch.manual_seed(0)
    encoder, points = PointEncoder(**SIZES), clouds(6)
    calibrate_batchnorm(encoder, points, batch_size=2)
    rows = encoder.tokenizer.linear1(group(encoder.prepare(points), 8, 8).patches.flatten(1, 2))
    batches = rows.view(3, -1, rows.shape[-1])
    assert_close(encoder.tokenizer.norm1.running_mean, batches.mean(1).mean(0))
    assert_close(encoder.tokenizer.norm1.running_var, batches.var(1).mean(0))
    assert encoder.training


def test_attention_is_the_textbook_formula():
    torch.manual_seed(0)
    attention, x, rows = Attention(12, 3), torch.randn(2, 4, 12), torch.randn(8, 12)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    keys = Ragged(mask, 8)
    context = keys.pad(rows)
    query = attention.query(x).view(2, 4, 3, 4)
    key, value = attention.key_value(context).view(2, 5, 2, 3, 4).unbind(2)
    logits = torch.einsum("bqhd,bshd->bhqs", query, key) / 2
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    expected = attention.out(torch.einsum("bhqs,bshd->bqhd", weights, value).flatten(2))
    assert_close(attention(x, rows, None, keys), expected)


def test_packed_rows_are_encoded_as_each_sequence_alone(encoder):
    rows, position = torch.randn(10, 24), torch.randn(10, 24)
    layout = Ragged(torch.tensor([[True] * 6, [True] * 4 + [False] * 2]), 10)
    packed = encoder.hidden_states(rows, position, layout)[-1]
    alone = [
        encoder.hidden_states(rows[None, at], position[None, at])[-1][0]
        for at in (slice(6), slice(6, 10))
    ]
    assert_close(packed, torch.cat(alone))


# ---------------------------------------------------------------------------------------- drop-path


def test_drop_path_scales_average_to_one_and_drop_at_a_rising_rate():
    scales = drop_path_scales(0.4, 20_000, 3, BatchGenerator(0), torch.zeros(()))
    assert scales.shape == (20_000, 3, 2)
    assert_close(scales.mean((0, 2)), torch.ones(3), atol=0.02, rtol=0)
    assert_close(
        (scales == 0).float().mean((0, 2)), torch.tensor([0.0, 0.2, 0.4]), atol=0.02, rtol=0
    )
    assert torch.equal(scales[:, 0], torch.ones(20_000, 2)), "the first layer's rate is zero"


def test_a_zero_rate_drops_nothing():
    assert torch.equal(
        drop_path_scales(0.0, 50, 4, BatchGenerator(0), torch.zeros(())), torch.ones(50, 4, 2)
    )


def test_a_dropped_branch_leaves_its_input(encoder):
    block, x = encoder.blocks[0], torch.randn(3, 5, 24)
    keep = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])[:, None]
    out = block(x, None, keep)
    assert torch.equal(out[0], x[0])
    assert_close(out[1], block(x)[1])
    assert_close(out[2], x[2] + 2 * block.mlp(block.norm2(x[2])))


def test_drop_path_is_off_in_evaluation_and_on_in_training():
    torch.manual_seed(0)
    encoder = PointEncoder(**SIZES | {"drop_path": 0.5})
    tokens, position = torch.randn(64, 4, 24), torch.zeros(64, 4, 24)

    def run(seed: int) -> torch.Tensor:
        return encoder.hidden_states(tokens, position, None, BatchGenerator(seed))[-1]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    encoder.eval()
    assert torch.equal(run(0), run(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_embed_takes_points_of_any_float_type(dtype):
    torch.manual_seed(0)
    encoder, points = PointEncoder(**SIZES).eval(), clouds(2).half()
    assert_close(
        encoder.embed(points.to(dtype)), encoder.embed(points.float()), rtol=1e-4, atol=1e-5
    )


def test_map_coordinates_keep_their_shape():
    torch.manual_seed(0)
    encoder, points = PointEncoder(**SIZES).eval(), clouds(2).double()
    assert_close(encoder.embed(points + 5.4e6), encoder.embed(points), rtol=1e-4, atol=1e-5)


def test_a_cloud_of_one_repeated_point_is_refused():
    points = clouds(3)
    points[1] = points[1, 0]
    with pytest.raises(ValueError, match="all points are equal"):
        PointEncoder(**SIZES).eval().embed(points)
