"""The context-aware decoder: which token may attend to which."""

import pytest
import torch
from torch.testing import assert_close

from jepa3d.models.decoder import ContextAwareBlock, ContextAwareDecoder, token_ranks
from jepa3d.models.layout import Joint, Ragged

B, V, A, T, C = 2, 5, 3, 4, 12
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
LAYOUT, ROWS = Ragged(MASK, 8), 8


def enlarge(module: torch.nn.Module) -> None:
    """Make weights so large that every visible token changes the output."""
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
    context, context_position = (torch.randn(ROWS, C, generator=generator) for _ in range(2))
    return context, LAYOUT, context_position, torch.randn(B, A, T, C, generator=generator)


STYLES = [
    (depth, cross, stacked)
    for depth in (1, 2)
    for cross in (True, False)
    for stacked in (True, False)
]


@pytest.mark.parametrize(("depth", "cross_attention", "stacked"), STYLES)
def test_every_target_token_is_predicted(depth, cross_attention, stacked, inputs):
    out = make(depth=depth, cross_attention=cross_attention, stacked=stacked)(*inputs)
    assert out.shape == (B, A, T, C)
    assert len(out.flatten(0, 2).unique(dim=0)) == B * A * T, "tokens at different positions differ"


@pytest.mark.parametrize(("depth", "cross_attention", "stacked"), STYLES)
def test_a_block_sees_the_mask_tokens_of_another_only_when_stacked(
    depth, cross_attention, stacked, inputs
):
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
def test_every_context_token_is_felt_by_every_block_of_its_sample_alone(
    depth, cross_attention, stacked, inputs
):
    decoder = make(depth=depth, cross_attention=cross_attention, stacked=stacked)
    context, _, position, target_position = inputs
    before, changed = decoder(*inputs), context.clone()
    changed[7] = torch.randn(C)  # the last of the second sample
    after = decoder(changed, LAYOUT, position, target_position)
    assert (after[1] - before[1]).abs().amax(-1).min() > 0.001
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("stacked", [True, False])
def test_samples_do_not_mix_and_padding_counts_for_nothing(stacked, inputs):
    decoder, (context, _, position, target_position) = make(stacked=stacked), inputs
    alone = [
        decoder(
            context[rows],
            Ragged(MASK[i : i + 1, :count], count),
            position[rows],
            target_position[i : i + 1],
        )
        for i, (rows, count) in enumerate([(slice(5), 5), (slice(5, 8), 3)])
    ]
    assert_close(decoder(*inputs), torch.cat(alone))


def test_the_position_of_a_target_token_is_felt_by_the_rest_of_its_block(inputs):
    decoder, (*context, target_position) = make(), inputs
    moved = target_position.clone()
    moved[:, 0, 0] = torch.randn(B, C)
    change = decoder(*context, target_position) - decoder(*context, moved)
    assert change[:, 0, 1:].abs().amax(-1).min() > 0.001


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("cross_attention", [True, False])
def test_an_isolated_mask_token_is_predicted_as_if_it_were_alone(depth, cross_attention, inputs):
    decoder = make(depth=depth, cross_attention=cross_attention, isolated=True)
    *context, target_position = inputs
    together = decoder(*context, target_position)
    alone = [
        decoder(*context, place)
        for place in target_position.flatten(1, 2)[:, :, None, None].unbind(1)
    ]
    assert_close(together.flatten(1, 2), torch.cat(alone, 1)[:, :, 0])
    changed = context[0].clone()
    changed[7] = torch.randn(C)  # the last of the second sample
    felt = (decoder(changed, *context[1:], target_position) - together).abs().amax(-1)
    assert felt[1].min() > 0.001
    assert felt[0].max() == 0


def test_ranks_say_the_order_along_each_axis_and_nothing_else():
    centers = torch.tensor([[[0.0, 5.0, 1.0], [0.1, -3.0, 2.0], [9.0, 4.0, 3.0]]])
    assert_close(token_ranks(centers), torch.tensor([[[-1.0, 1, -1], [0, -1, 0], [1, 0, 1]]]))
    assert torch.equal(token_ranks(centers), token_ranks(centers**3))
    assert token_ranks(centers[:, :1]).tolist() == [[[-1, -1, -1]]]


def reference_block(block: ContextAwareBlock, x, context):
    """Compute the paper's block for one target block without padding: x 1 S C, context 1 V C."""
    normed = block.norm1(x)
    x = x + block.attention(normed, normed)
    x = x + block.cross_attention(block.cross_norm(x), context)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_decoder_is_the_papers_pass_by_pass_whatever_rows_it_leaves_out(depth, stacked, inputs):
    """Three shortcuts are exact: the first rows are shared between target blocks, the last block
    computes only keys and values of the context, and each sample has one cross-attention.
    """
    decoder, (context, _, position, target_position) = make(depth=depth, stacked=stacked), inputs
    out = decoder(*inputs)
    for b, rows in enumerate([slice(5), slice(5, 8)]):
        for target in target_position[b].flatten(0, 1)[None] if stacked else target_position[b]:
            x = torch.cat([context[rows], decoder.mask_token.expand(len(target), C)])[None]
            places = torch.cat([position[rows], target])[None]
            for block in decoder.blocks:
                x = reference_block(block, x + places, context[None, rows])
            expected = decoder.norm(x)[0, -len(target) :]
            a = next(a for a in range(A) if torch.equal(target[:T], target_position[b, a]))
            found = out[b].flatten(0, 1) if stacked else out[b, a]
            assert_close(found, expected)


def test_gradients_do_not_depend_on_the_layout(inputs):
    """Compare the decoder with a plain version that gives all rows of all target blocks to every
    block.
    """
    grads = []
    for plain in (False, True):
        decoder, (context, _, position, target_position) = make(), inputs
        context = context.clone().requires_grad_()
        if plain:
            x, places, joint = decoder.assemble(context, LAYOUT, position, target_position)
            x, places = joint.every_pass(x), joint.every_pass(places)
            for block in decoder.blocks:
                x = block(x + places, context, joint)
            out = decoder.predictions(decoder.norm(x), target_position)
        else:
            out = decoder(context, LAYOUT, position, target_position)
        (out * torch.linspace(-1, 1, C)).sum().backward()
        grads.append([context.grad, *(p.grad for p in decoder.parameters())])
    assert_close(*grads)


def test_weights_are_drawn_as_in_the_parents_decoder():
    """Weights are Xavier-uniform with bound sqrt(6 / (in + out)) and C = 384. Query, key and value
    have the bound of one joint matrix C x 3C.
    """
    torch.manual_seed(0)
    block = ContextAwareDecoder(384, 1).blocks[0]
    bounds = {
        "query": 0.0625,
        "key_value": 0.0625,
        "out": 0.0883883,
        "mlp.0": 0.0559017,
        "mlp.2": 0.0559017,
    }
    for name, bound in bounds.items():
        layer = block.mlp if name.startswith("mlp") else block.attention
        weight = layer.get_submodule(name.removeprefix("mlp.")).weight
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=1e-2)
    assert torch.equal(block.attention.out.bias, torch.zeros(384))
    assert torch.equal(block.mlp[0].bias, torch.zeros(4 * 384))


def test_without_cross_attention_there_are_none_of_its_weights():
    names = [name for name, _ in make(cross_attention=False).named_parameters()]
    assert names
    assert not any("cross" in name for name in names)
    assert any("cross_attention" in name for name, _ in make().named_parameters())


def test_assembling_and_taking_apart_keeps_the_order_of_blocks(inputs):
    context, _, position, target_position = inputs
    for stacked, passes, length in [(False, A, T), (True, 1, A * T)]:
        x, places, joint = make(stacked=stacked).assemble(*inputs)
        assert torch.equal(
            ContextAwareDecoder.predictions(places, target_position), target_position
        )
        for rows, given in ((x, context), (places, position)):
            padded = joint.pad(rows)
            assert padded.shape == (B, passes, V + length, C)
            for p in range(passes):
                assert torch.equal(padded[:, p, :V][MASK], given)
        assert torch.equal(
            joint.mask,
            torch.cat([MASK, MASK.new_ones(B, length)], 1)[:, None].expand(B, passes, -1),
        )


@pytest.mark.parametrize("full", [True, False])
def test_layouts_pad_and_pack(full):
    mask = torch.ones(B, V, dtype=torch.bool) if full else MASK
    ragged = Ragged(mask, int(mask.sum()))
    joint = Joint(ragged, A, T)
    rows, masked = torch.randn(ragged.num_rows, C), torch.randn(B * A * T, C)
    assert (ragged.mask is None) == (joint.mask is None) == full
    assert torch.equal(ragged.pack(ragged.pad(rows)), rows)
    assert not ragged.pad(rows)[~mask].any()
    both = torch.cat([rows, masked])
    assert torch.equal(joint.pack(joint.pad(both)), joint.every_pass(both))
    assert torch.equal(joint.every_pass(joint.every_pass(both)), joint.every_pass(both))
    assert torch.equal(joint.pack(joint.pad(masked)), masked)
    of_sample = torch.arange(float(B))[:, None]
    assert torch.equal(ragged.per_row(of_sample)[:, 0], mask.nonzero()[:, 0].float())
    tails = of_sample.repeat_interleave(A * T, 0)
    assert torch.equal(
        joint.per_row(of_sample), torch.cat([ragged.per_row(of_sample).repeat(A, 1), tails])
    )
