"""3D-JEPA as a whole: gradients, losses, and that no target leaks into the context."""

import copy
import dataclasses

import pytest
import torch
from torch.testing import assert_close

from jepa3d.config import resolve
from jepa3d.models.decoder import token_ranks
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.sampling import TokenSample
from jepa3d.models.teacher import Teacher
from jepa3d.models.tokenizer import group
from jepa3d.objectives.jepa import JEPA, cosine_loss, pool_rows
from jepa3d.objectives.regularizers import sigreg
from jepa3d.ops import BatchGenerator
from jepa3d.validate import validate

SIZES = {
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "drop_path": 0.0,
}
B = 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def frozen(width: int = 12) -> Teacher:
    sizes = {
        name: SIZES[name] for name in ("num_groups", "group_size", "num_points", "tokenizer_dim")
    }
    return Teacher([DVAE(width=width, num_codes=8, dgcnn_dim=4, folding_dim=8, **sizes)])


def make(width: int = 12, encoder: dict | None = None, ema: bool = False, **settings) -> JEPA:
    torch.manual_seed(0)
    config = resolve({"encoder": SIZES | (encoder or {}), **settings})
    student = PointEncoder(**dataclasses.asdict(config.encoder))
    return JEPA(
        config,
        student,
        Teacher([copy.deepcopy(student)], "layernorm", average=0) if ema else frozen(width),
    )


def clouds(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, 64, 3, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- wiring

VARIANTS = [
    {
        "decoder": {"depth": depth, "cross_attention": cross, "stacked": stacked},
        "target": {"project": project},
    }
    for depth in (0, 2)
    for cross in (True, False)
    for stacked in (True, False)
    for project in (True, False)
]
SAMPLERS = [{"sampler": {"name": name}} for name in ("random", "one_block")] + [
    {
        "sampler": {
            "name": "sequence",
            "target_ratio": (0.1, 0.15),
            "context_ratio": (0.6, 0.9),
            "min_context": 1,
        }
    }
]
DECODERS = [
    {"decoder": {"isolated": True, "ranks": ranks, "cross_attention": ranks}}
    for ranks in (True, False)
]


@pytest.mark.parametrize(
    "settings",
    [
        *VARIANTS,
        *SAMPLERS,
        *DECODERS,
        {"target": {"unit": "block"}},
        {"target": {"view": 1.0}, "ema": True},
    ],
    ids=str,
)
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(settings):
    objective = make(**settings).train()
    output = objective(clouds(), BatchGenerator(0))
    output.loss.backward()
    assert output.prediction.shape == output.target.shape == (*output.sample.target.shape, 12)
    for name, parameter in objective.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.ndim < 2 or parameter.grad.any(), name
    assert objective.decoder.mask_token.grad.any()


@pytest.mark.parametrize("ranks", [True, False])
def test_with_ranks_the_decoder_is_not_told_how_far_apart_targets_are(ranks):
    objective, grouped = make(decoder={"ranks": ranks}).eval(), group(clouds(), 16, 8)
    sample = objective.sampler(grouped.centers, BatchGenerator(0))
    moved, token = grouped.centers.clone(), sample.target[0, 0, 0]
    moved[0, token] += 1e-4
    assert torch.equal(token_ranks(moved), token_ranks(grouped.centers))
    told = [
        objective.predict(grouped.patches, centers, sample)[0]
        for centers in (grouped.centers, moved)
    ]
    assert torch.equal(*told) is ranks


def test_the_target_carries_a_gradient_only_when_it_is_projected():
    for project in (True, False):
        assert (
            make(target={"project": project})(clouds(), BatchGenerator(0)).target.requires_grad
            is project
        )


def test_targets_are_the_teachers_tokens_at_the_target_indices():
    objective = make(width=16)
    output = objective(clouds(), BatchGenerator(0))
    centers, patches, _ = group(clouds(), 16, 8, BatchGenerator(0).stream("group"))
    tokens = objective.teacher(patches, centers)
    for b in range(B):
        assert_close(output.target[b], tokens[b][output.sample.target[b]])
    assert_close(output.loss, cosine_loss(output.prediction, output.target))
    assert objective.metrics(output)["context_tokens"] == output.sample.mask.sum() / B


def test_a_projected_target_goes_through_the_same_layer():
    plain, projected = make(), make(target={"project": True})
    outputs = [objective(clouds(), BatchGenerator(0)) for objective in (plain, projected)]
    assert_close(outputs[1].target, projected.projection(outputs[0].target))
    assert_close(outputs[1].prediction, outputs[0].prediction)


def test_projecting_the_target_of_another_width_is_an_error():
    with pytest.raises(ValueError, match=r"width 16 must equal encoder\.embed_dim 12"):
        make(width=16, target={"project": True})
    assert make(width=16)(clouds(), BatchGenerator(0)).prediction.shape[-1] == 16


def test_a_generator_makes_the_step_again_and_another_step_differs():
    objective = make(encoder={"drop_path": 0.5}).train()
    one, two, other = (objective(clouds(), BatchGenerator(0, step)).loss for step in (0, 0, 1))
    assert one == two
    assert one != other


def test_a_generator_makes_the_step_again_at_decoder_depth_0_too():
    objective = make(encoder={"drop_path": 0.5}, decoder={"depth": 0}).train()
    one, two = (objective(clouds(), BatchGenerator(0)).loss for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    "settings", [{}, {"ema": True, "target": {"view": 1.0}}, {"decoder": {"depth": 0}}], ids=str
)
def test_several_masks_of_a_cloud_have_their_own_draws_and_one_answer_of_the_teacher(settings):
    objective, asked = make(sampler={"masks": 3}, **settings).train(), []
    objective.teacher.register_forward_hook(lambda module, inputs, tokens: asked.append(tokens))
    output = objective(clouds(), BatchGenerator(0))
    tokens = asked[-1]
    assert len(tokens) == B
    for row, sample in enumerate(output.sample.target):
        assert_close(output.target[row], tokens[row // 3][sample])
    assert (
        output.prediction.shape
        == output.target.shape
        == (3 * B, *output.sample.target.shape[1:], 12)
    )
    chosen = output.sample.target.flatten(1).sort(1).values.view(B, 3, -1)
    assert any(len(masks.unique(dim=0)) > 1 for masks in chosen)
    assert torch.equal(output.centers[::3], output.centers[1::3])
    output.loss.backward()


def test_an_averaged_teacher_moves_after_a_step_and_a_frozen_one_does_not():
    for ema, first, last in [(True, 0.5, 1.0), (False, 0.5, 1.0)]:
        objective = make(ema=ema, target={"momentum": (first, last)})
        before = [p.clone() for p in objective.teacher.parameters()]
        with torch.no_grad():
            for parameter in objective.encoder.parameters():
                parameter.add_(1)
        objective.after_step(1.0)
        assert all(
            torch.equal(a, b) for a, b in zip(before, objective.teacher.parameters(), strict=True)
        )
        objective.after_step(0.5)
        expected = 1 - (first + last) / 2 if ema else 0.0
        for old, new in zip(before, objective.teacher.parameters(), strict=True):
            assert_close(new - old, torch.full_like(old, expected))


# -------------------------------------------------------------------- without a teacher, and SIGReg


def test_without_a_teacher_the_target_is_the_encoders_own_and_carries_a_gradient():
    config = resolve(
        {"encoder": SIZES, "teacher": "none", "target": {"sigreg": 0.02, "num_slices": 8}}
    )
    objective = JEPA(config, PointEncoder(**SIZES), None).train()
    output = objective(clouds(), BatchGenerator(0))
    centers, patches, _ = group(clouds(), 16, 8, BatchGenerator(0).stream("group"))
    tokens = objective.encoder.features(patches, centers)[-1]
    for b in range(B):
        assert_close(output.target[b], tokens[b][output.sample.target[b]])
    penalty = sigreg(tokens.flatten(0, 1), BatchGenerator(0).stream("sigreg"), 8)
    assert_close(output.loss, 0.98 * cosine_loss(output.prediction, output.target) + 0.02 * penalty)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert objective.metrics(output)["sigreg"] == output.sigreg.item()


def test_with_a_teacher_sigreg_reads_the_context_tokens():
    output = make(target={"sigreg": 0.1, "num_slices": 8})(clouds(), BatchGenerator(0))
    assert len(output.encoded) == output.sample.mask.sum()
    penalty = sigreg(output.encoded, BatchGenerator(0).stream("sigreg"), 8)
    assert_close(output.loss, 0.9 * cosine_loss(output.prediction, output.target) + 0.1 * penalty)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_encoded_context_is_what_the_encoder_says_of_it(depth, stacked):
    """With decoder depth 0, mask tokens go through the encoder too, so only the shape is tested."""
    objective, grouped = (
        make(decoder={"depth": depth, "stacked": stacked}).eval(),
        group(clouds(), 16, 8),
    )
    sample = objective.sampler(grouped.centers, BatchGenerator(0))
    found = objective.predict(grouped.patches, grouped.centers, sample)[1]
    assert found.shape == (sample.mask.sum(), 12)
    if depth:
        assert_close(found, encoded(objective, grouped.patches, grouped.centers, sample))


def test_positions_added_once_are_added_before_the_first_block_only():
    every, once = (make(encoder={"position_every_block": flag}).eval() for flag in (True, False))
    tokens, position = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    first = every.encoder.blocks[0](tokens + position)
    states = once.encoder.hidden_states(tokens, position)
    assert_close(states[1], first)
    assert_close(states[2], once.encoder.norm(once.encoder.blocks[1](first)))
    assert_close(
        every.encoder.hidden_states(tokens, position)[2],
        every.encoder.norm(every.encoder.blocks[1](first + position)),
    )
    assert once.decoder.position_every_block is False


# --------------------------------------------------------------------------------------- no leakage


def encoded(objective: JEPA, patches, centers, sample) -> torch.Tensor:
    layout = sample.layout()
    tokens, position = objective.encoder.visible(patches, centers, sample.context, layout)
    return objective.encoder.hidden_states(tokens, position, layout)[-1]


def predict(objective: JEPA, patches, centers, sample) -> torch.Tensor:
    return objective.predict(patches, centers, sample)[0]


def move(points: torch.Tensor, which: torch.Tensor, grouped) -> torch.Tensor:
    """Move the points `which` (B N) at random. Returns the patches with the old grouping and
    centres.
    """
    moved = torch.where(which[..., None], points + torch.randn_like(points), points)
    rows = torch.arange(B)[:, None, None]
    return moved[rows, grouped.index] - grouped.centers[:, :, None]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("name", ["multi_block", "random", "one_block"])
def test_points_in_no_context_patch_cannot_change_the_encoded_context_or_the_prediction(
    name, depth
):
    objective = make(sampler={"name": name, "min_context": 1}, decoder={"depth": depth}).eval()
    points = clouds()
    grouped = group(points, 16, 8)
    sample = objective.sampler(grouped.centers, BatchGenerator(0))
    seen = torch.zeros(B, 64, dtype=torch.bool)
    for b in range(B):
        seen[b, grouped.index[b][sample.context[b][sample.mask[b]]].flatten()] = True
    assert (~seen).sum(1).min() > 0

    def run(patches):
        return encoded(objective, patches, grouped.centers, sample), predict(
            objective, patches, grouped.centers, sample
        )

    before, hidden, visible = (
        run(patches)
        for patches in (grouped.patches, move(points, ~seen, grouped), move(points, seen, grouped))
    )
    assert all(torch.equal(a, b) for a, b in zip(before, hidden, strict=True))
    assert not torch.equal(before[0], visible[0])
    assert not torch.equal(before[1], visible[1])


def test_padding_enters_neither_the_tokens_nor_the_statistics_of_batchnorm():
    objective = make().train()
    grouped = group(clouds(), 16, 8)
    sample = objective.sampler(grouped.centers, BatchGenerator(0))
    assert not sample.mask.all(), "this draw has padding"
    reference = make().train().encoder.tokenizer
    packed = torch.cat([grouped.patches[b][sample.context[b][sample.mask[b]]] for b in range(B)])
    tokens, position = objective.encoder.visible(*grouped[1::-1], sample.context, sample.layout())
    assert torch.equal(tokens, reference(packed))
    centers = torch.cat([grouped.centers[b][sample.context[b][sample.mask[b]]] for b in range(B)])
    assert_close(position, objective.encoder.position(centers))
    assert torch.equal(objective.encoder.tokenizer.norm3.running_var, reference.norm3.running_var)


@pytest.mark.parametrize("depth", [0, 2])
def test_padding_does_not_change_a_prediction(depth):
    objective, grouped = make(decoder={"depth": depth}).eval(), group(clouds(), 16, 8)
    # The weights are so large that attention to padding would change the result.
    for parameter in objective.encoder.blocks.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    sample = objective.sampler(grouped.centers, BatchGenerator(0))
    assert not sample.mask.all(), "this draw has padding"
    whole = predict(objective, grouped.patches, grouped.centers, sample)
    for b in range(B):
        context = sample.context[b : b + 1, sample.mask[b]]
        alone = TokenSample(
            context,
            torch.ones_like(context, dtype=torch.bool),
            sample.target[b : b + 1],
            context.numel(),
        )
        out = predict(objective, grouped.patches[b : b + 1], grouped.centers[b : b + 1], alone)
        assert_close(whole[b : b + 1], out, atol=1e-5, rtol=1e-4)


def test_decoder_depth_0_predicts_by_the_encoder_alone():
    grouped = group(clouds(), 16, 8)
    predictions = []
    for depth in (0, 2):
        objective = make(decoder={"depth": depth}).eval()
        sample = objective.sampler(grouped.centers, BatchGenerator(0))
        predictions.append(predict(objective, grouped.patches, grouped.centers, sample))
    assert predictions[0].shape == predictions[1].shape == (*sample.target.shape, 12)
    assert (predictions[0] - predictions[1]).abs().max() > 1e-3
    # The expected result at depth 0: each block of each sample alone, without padding.
    objective = make(decoder={"depth": 0}).eval()
    encoder, decoder = objective.encoder, objective.decoder
    for b in range(B):
        context = sample.context[b][sample.mask[b]]
        for a, target in enumerate(sample.target[b]):
            tokens = torch.cat(
                [
                    encoder.tokenizer(grouped.patches[b, context]),
                    decoder.mask_token.expand(len(target), -1),
                ]
            )
            position = encoder.position(grouped.centers[b, torch.cat([context, target])])
            out = encoder.hidden_states(tokens[None], position[None])[-1][0, len(context) :]
            assert_close(predictions[0][b, a], objective.projection(out), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("unit", ["token", "block"])
def test_the_loss_is_0_for_equal_2_for_opposite_1_for_orthogonal(unit):
    x = torch.randn(2, 3, 4, 6)
    orthogonal = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    assert_close(cosine_loss(x, x, unit).item(), 0.0, atol=1e-6, rtol=0)
    assert_close(cosine_loss(x, -x, unit).item(), 2.0)
    assert_close(cosine_loss(x, orthogonal, unit).item(), 1.0)


@pytest.mark.parametrize("unit", ["token", "block"])
def test_the_loss_does_not_know_scale(unit):
    x, y = torch.randn(2, 2, 3, 4, 6)
    assert_close(cosine_loss(7 * x, 0.1 * y, unit), cosine_loss(x, y, unit))


def test_token_and_block_agree_for_blocks_of_one_token_and_only_then():
    x, y = torch.randn(2, 2, 3, 1, 6)
    assert_close(cosine_loss(x, y, "token"), cosine_loss(x, y, "block"))
    x, y = torch.randn(2, 2, 3, 4, 6)
    assert (cosine_loss(x, y, "token") - cosine_loss(x, y, "block")).abs() > 1e-4


def test_the_block_loss_is_one_cosine_of_the_blocks_tokens_as_one_vector():
    x, y = torch.randn(2, 2, 3, 4, 6)
    pairs = [(x[b, a].flatten(), y[b, a].flatten()) for b in range(2) for a in range(3)]
    assert_close(
        cosine_loss(x, y, "block"), 1 - sum(p @ q / p.norm() / q.norm() for p, q in pairs) / 6
    )


def test_a_step_down_the_gradient_lowers_the_loss():
    """The equation printed in the paper has the opposite sign."""
    objective = make().train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = objective(clouds(), BatchGenerator(0)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.001


# ------------------------------------------------------------------------------------ the view term


def test_the_view_term_is_added_by_its_weight():
    full, half = (
        make(target={"view": weight})(clouds(), BatchGenerator(0)) for weight in (1.0, 0.5)
    )
    assert_close(full.view, half.view)
    assert_close(full.loss - half.loss, 0.5 * full.view)


def test_pooling_of_packed_rows_is_that_of_each_context_alone():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    sample = TokenSample(
        torch.zeros(2, 3, dtype=torch.long), mask, torch.zeros(2, 1, 1, dtype=torch.long), 4
    )
    rows = torch.randn(4, 5) - 3  # a padded 0 would be the maximum
    want = torch.stack([torch.cat([part.mean(0), part.amax(0)]) for part in (rows[:3], rows[3:])])
    assert_close(pool_rows(rows, sample), want)


def test_the_view_term_needs_a_teacher_asked_in_every_step():
    for settings in (
        {"teacher": ["none"], "target": {"view": 1.0, "sigreg": 0.1}},
        {"target": {"view": 1.0, "cache": True}},
    ):
        with pytest.raises(ValueError, match=r"target\.view needs a teacher"):
            validate(resolve({"teacher": ["untrained"]}, settings))
