"""The context-aware decoder: who may see whom."""

import pytest
import torch
from torch.testing import assert_close

from jepa3d.models.decoder import ContextAwareBlock, ContextAwareDecoder

B, V, A, T, C = 2, 5, 3, 4, 12


def enlarge(module: torch.nn.Module) -> None:
    """Weights large enough that whatever can be seen is felt."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def make(**options) -> ContextAwareDecoder:
    torch.manual_seed(0)
    decoder = ContextAwareDecoder(C, **({"depth": 2, "num_heads": 3, "mlp_ratio": 2.0} | options))
    enlarge(decoder)
    return decoder


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    context, context_position = (torch.randn(B, V, C, generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return context, mask, context_position, torch.randn(B, A, T, C, generator=generator)


STYLES = [(depth, cross, stacked) for depth in (1, 2) for cross in (True, False) for stacked in (True, False)]


@pytest.mark.parametrize(("depth", "cross_attention", "stacked"), STYLES)
def test_every_target_token_is_predicted(depth, cross_attention, stacked, inputs):
    out = make(depth=depth, cross_attention=cross_attention, stacked=stacked)(*inputs)
    assert out.shape == (B, A, T, C)
    assert len(out.flatten(0, 2).unique(dim=0)) == B * A * T, "tokens at different positions differ"


@pytest.mark.parametrize(("depth", "cross_attention", "stacked"), STYLES)
def test_a_block_sees_the_mask_tokens_of_another_only_when_stacked(depth, cross_attention, stacked, inputs):
    decoder = make(depth=depth, cross_attention=cross_attention, stacked=stacked)
    *context, target_position = inputs
    moved = target_position.clone()
    moved[:, 1] = torch.randn(B, T, C)
    before, after = decoder(*context, target_position), decoder(*context, moved)
    assert (before[:, 1] - after[:, 1]).abs().amax(-1).min() > 0.01
    for block in (0, 2):
        if stacked:
            assert (before[:, block] - after[:, block]).abs().amax(-1).min() > 0.001
        else:
            assert torch.equal(before[:, block], after[:, block])


@pytest.mark.parametrize(("depth", "cross_attention", "stacked"), STYLES)
def test_padded_context_tokens_have_no_influence(depth, cross_attention, stacked, inputs):
    decoder = make(depth=depth, cross_attention=cross_attention, stacked=stacked)
    context, mask, position, target_position = inputs
    before = decoder(*inputs)
    changed, moved = context.clone(), position.clone()
    changed[~mask], moved[~mask] = torch.randn(2, 2, C)
    assert torch.equal(decoder(changed, mask, moved, target_position), before)
    changed[1, 2] = torch.randn(C)  # while a token that exists has
    assert (decoder(changed, mask, moved, target_position)[1] - before[1]).abs().amax(-1).min() > 0.001


@pytest.mark.parametrize("stacked", [True, False])
def test_samples_do_not_mix(stacked, inputs):
    decoder = make(stacked=stacked)
    alone = torch.cat([decoder(*(value[i : i + 1] for value in inputs)) for i in range(B)])
    assert_close(decoder(*inputs), alone)


def test_the_position_of_a_target_token_is_felt_by_the_rest_of_its_block(inputs):
    decoder, (*context, target_position) = make(), inputs
    moved = target_position.clone()
    moved[:, 0, 0] = torch.randn(B, C)
    change = decoder(*context, target_position) - decoder(*context, moved)
    assert change[:, 0, 1:].abs().amax(-1).min() > 0.001


@pytest.mark.parametrize("passes", [1, 3])
def test_the_shared_cross_attention_is_one_call_a_block(passes, inputs):
    torch.manual_seed(0)
    block = ContextAwareBlock(C, 3, 2.0, cross_attention=True)
    enlarge(block)
    context, mask, _, _ = inputs
    x = torch.randn(B, passes, V + T, C)
    joint = torch.cat([mask, mask.new_ones(B, T)], 1)
    naive = torch.stack([block(x[:, p], context, joint, mask) for p in range(passes)], 1)
    shared = block(x.flatten(0, 1), context, joint.repeat_interleave(passes, 0), mask)
    assert_close(shared.view_as(naive), naive)


def test_a_block_is_self_attention_then_cross_attention_then_mlp(inputs):
    torch.manual_seed(0)
    block, (context, mask, _, _) = ContextAwareBlock(C, 3, 2.0, cross_attention=True), inputs
    x, joint = torch.randn(B, 6, C), torch.ones(B, 6, dtype=torch.bool)
    y = x + block.attention(block.norm1(x), block.norm1(x), joint)
    y = y + block.cross_attention(block.cross_norm(y), context, mask)
    assert_close(block(x, context, joint, mask), y + block.mlp(block.norm2(y)))


def test_the_decoder_adds_positions_at_every_block_and_feeds_every_block_the_context(inputs):
    decoder, (context, mask, position, target_position) = make(), inputs
    for a in range(A):
        x = torch.cat([context, decoder.mask_token.expand(B, T, C)], 1)
        places = torch.cat([position, target_position[:, a]], 1)
        joint = torch.cat([mask, mask.new_ones(B, T)], 1)
        for block in decoder.blocks:
            x = block(x + places, context, joint, mask)
        assert_close(decoder(*inputs)[:, a], decoder.norm(x)[:, V:])


def test_without_cross_attention_there_are_none_of_its_weights():
    names = [name for name, _ in make(cross_attention=False).named_parameters()]
    assert names
    assert not any("cross" in name for name in names)
    assert any("cross_attention" in name for name, _ in make().named_parameters())


def test_assembling_and_taking_apart_keeps_the_order_of_blocks(inputs):
    context, mask, position, target_position = inputs
    for stacked, length in [(False, V + T), (True, V + A * T)]:
        x, places, joint = make(stacked=stacked).assemble(*inputs)
        assert x.shape[1] == places.shape[1] == joint.shape[1] == length
        assert torch.equal(ContextAwareDecoder.predictions(places, target_position), target_position)
        assert torch.equal(places[:, :V], position.repeat_interleave(len(x) // B, 0))
        assert torch.equal(x[:, :V], context.repeat_interleave(len(x) // B, 0))
        assert torch.equal(joint[:, :V], mask.repeat_interleave(len(x) // B, 0))
        assert joint[:, V:].all()
