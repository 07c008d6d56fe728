"""Teachers: frozen networks, moving averages, and teachers loaded from files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.teacher import Teacher, ema_update, load_module, normalise
from jepa3d.models.transformer import Attention

ENCODER = {
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "drop_path": 0.5,
}
CODES = {
    "width": 16,
    "num_codes": 8,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "dgcnn_dim": 4,
    "folding_dim": 8,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def student():
    return PointEncoder(**ENCODER)


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 8, 8, 3), torch.randn(batch, 8, 3)


def around(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zero patches and centres for as many tokens as `tokens` has."""
    return torch.zeros(*tokens.shape[:2], 8, 3), torch.zeros(*tokens.shape[:2], 3)


class Says(PointEncoder):
    """A network that returns the given features."""

    def __init__(self, tokens: torch.Tensor):
        nn.Module.__init__(self)
        self.tokens, self.width = tokens, tokens.shape[-1]

    def features(self, patches, centers, layers, generator=None):
        return [self.tokens]


def ema_teacher(student: PointEncoder) -> Teacher:
    return Teacher([copy.deepcopy(student)], average=0)


# -------------------------------------------------------------------------------- moving average


def test_the_average_follows_its_closed_form(student):
    teacher, momenta = ema_teacher(student), (0.9, 0.5, 0.99, 1.0)
    expected = [parameter.detach().clone() for parameter in student.parameters()]
    history = []
    for momentum in momenta:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        history.append([parameter.detach().clone() for parameter in student.parameters()])
        ema_update(teacher, student, momentum)
    # The closed form: theta_n = prod(m) theta_0 + sum_i (1 - m_i) prod_{j > i} m_j student_i
    weights = [
        torch.tensor(momenta[i + 1 :]).prod() * (1 - momenta[i]) for i in range(len(momenta))
    ]
    for index, (start, parameter) in enumerate(
        zip(expected, teacher.networks[0].parameters(), strict=True)
    ):
        total = torch.tensor(momenta).prod() * start
        total = total + sum(w * states[index] for w, states in zip(weights, history, strict=True))
        assert_close(parameter.detach(), total)


def test_statistics_of_batchnorm_are_copied(student):
    teacher = ema_teacher(student)
    student.train().tokenizer(torch.randn(5, 8, 3) + 3)
    ema_update(teacher, student, 0.9)
    for (name, old), new in zip(
        teacher.networks[0].named_buffers(), student.buffers(), strict=True
    ):
        assert torch.equal(old, new), name


def test_the_average_begins_as_the_student_and_shares_nothing_with_it(student):
    teacher = ema_teacher(student)
    assert teacher.average == 0
    for old, new in zip(teacher.networks[0].parameters(), student.parameters(), strict=True):
        assert torch.equal(old, new)
        assert old.data_ptr() != new.data_ptr()
    assert all(parameter.requires_grad for parameter in student.parameters())


# -------------------------------------------------------------------------------------- a teacher


@pytest.mark.parametrize("make", [lambda: PointEncoder(**ENCODER), lambda: DVAE(**CODES)])
def test_a_teacher_is_deterministic_in_training_mode_and_has_no_gradient(make):
    teacher, (patches, centers) = Teacher([make()]), inputs()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = teacher(patches, centers)
    nn.ModuleList([teacher]).train()  # the training loop calls train() on the parent module
    assert torch.equal(teacher(patches, centers), first)
    assert not any(module.training for module in teacher.modules())
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert first.shape == (3, 8, teacher.width)


def test_a_teacher_says_what_its_module_says(student):
    patches, centers = inputs()
    assert torch.equal(
        Teacher([student])(patches, centers), student.eval().features(patches, centers)[0]
    )


def test_standardized_targets_have_zero_mean_and_unit_variance_per_channel():
    tokens = 3 * torch.randn(4, 16, 6) * torch.arange(1, 7) + torch.arange(6)
    rows = Teacher([Says(tokens)], "standardize")(*around(tokens)).flatten(0, 1)
    assert_close(rows.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    assert_close(rows.var(0, unbiased=False), torch.ones(6), atol=1e-4, rtol=0)
    assert_close(
        torch.corrcoef(torch.stack([rows[:, 2], tokens.flatten(0, 1)[:, 2]]))[0, 1].item(), 1.0
    )


def test_layernormed_targets_have_zero_mean_and_unit_variance_per_token():
    tokens = 3 * torch.randn(4, 16, 12) + 5
    out = Teacher([Says(tokens)], "layernorm")(*around(tokens))
    assert_close(out.mean(-1), torch.zeros(4, 16), atol=1e-5, rtol=0)
    assert_close(out.var(-1, unbiased=False), torch.ones(4, 16), atol=1e-4, rtol=0)


def test_centred_targets_lose_their_mean_and_nothing_else():
    tokens = torch.randn(4, 16, 6) * torch.arange(1, 7) + 5
    out = Teacher([Says(tokens)], "center")(*around(tokens))
    assert_close(out, tokens - tokens.flatten(0, 1).mean(0))


def test_joined_teachers_speak_side_by_side_and_only_the_average_moves(student):
    frozen, (patches, centers) = DVAE(**CODES), inputs()
    joined = Teacher([frozen, copy.deepcopy(student)], "standardize", average=1)
    assert joined.width == 16 + 12
    alone = [Teacher([network], "standardize")(patches, centers) for network in (frozen, student)]
    assert_close(joined(patches, centers), torch.cat(alone, -1))
    before = copy.deepcopy(joined.networks)
    with torch.no_grad():
        student.position[0].weight.add_(1)
    ema_update(joined, student, 0.5)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before[0].parameters(), joined.networks[0].parameters(), strict=True)
    )
    assert_close(joined.networks[1].position[0].weight, before[1].position[0].weight + 0.5)


@pytest.mark.parametrize("norm", ["none", "layernorm", "standardize"])
def test_several_layers_are_averaged_after_each_is_normalised(student, norm):
    patches, centers = inputs()
    states = student.eval().hidden_states(student.tokenizer(patches), student.position(centers))
    expected = (normalise(states[1], norm) + normalise(states[2], norm)) / 2
    assert_close(Teacher([student], norm, layers=2)(patches, centers), expected.detach())


def test_targets_as_they_are():
    tokens = torch.randn(2, 3, 4)
    assert torch.equal(Teacher([Says(tokens)])(*around(tokens)), tokens)


# ---------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("make", "inside"), [(PointEncoder, ""), (PointEncoder, "encoder"), (DVAE, ""), (DVAE, "dvae")]
)
def test_a_saved_network_is_loaded_as_what_it_is(make, inside, tmp_path):
    """The network is loaded from its own folder or from that of its run."""
    module = make(**(ENCODER if make is PointEncoder else CODES)).eval()
    module.save_pretrained(tmp_path / inside)
    loaded, (patches, centers) = load_module(str(tmp_path)), inputs()
    assert type(loaded) is make
    assert torch.equal(loaded.features(patches, centers)[0], module.features(patches, centers)[0])


def refusal(path) -> str:
    with pytest.raises(ValueError, match="no encoder or dVAE could be loaded") as caught:
        load_module(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "kind", ["empty folder", "missing path", "file", "broken config", "broken weights"]
)
def test_what_is_no_network_is_a_one_line_error_that_names_it(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    path = tmp_path / "teacher"
    if kind == "file":
        path.write_text("points")
    elif kind != "missing path":
        path.mkdir()
    if kind.startswith("broken"):
        PointEncoder(**ENCODER).save_pretrained(path)
        (path / ("config.json" if kind == "broken config" else "model.safetensors")).write_text("{")
    message = refusal(path)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_weights_that_lack_a_tensor_are_an_error(student, tmp_path):
    from safetensors.torch import load_file, save_file

    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["blocks.1.mlp.0.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    refusal(tmp_path)


def test_a_network_of_another_kind_is_an_error(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    save_file({"embeddings.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    refusal(tmp_path)


def test_in_bf16_an_encoder_teaches_in_bf16_and_a_dvae_in_fp32():
    patches, centers = torch.randn(2, 8, 8, 3), torch.randn(2, 8, 3)
    for network, rounded in ((PointEncoder(**ENCODER), True), (DVAE(**CODES), False)):
        teacher = Teacher([network])
        exact = teacher(patches, centers)
        with torch.autocast("cpu", torch.bfloat16):
            found = teacher(patches, centers)
        assert found.dtype == torch.float32
        assert_close(found, exact, rtol=0, atol=0.1)
        assert torch.equal(found, exact) != rounded


def test_attention_in_bf16_on_a_cpu_is_in_fp32(monkeypatch):
    seen, attend = [], F.scaled_dot_product_attention

    def keep(query, *args, **more):
        seen.append(query.dtype)
        return attend(query, *args, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", keep)
    attention, x = Attention(12, 3), torch.randn(2, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, x).dtype == torch.bfloat16
    assert seen == [torch.float32]
