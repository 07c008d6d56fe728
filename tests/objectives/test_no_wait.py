"""No step reads from its device: every operation is run on `meta`, a device that nothing can be
read from.

There `.item()`, `.tolist()`, `.cpu()`, `nonzero` and `if tensor:` raise, as on a GPU they would
make the host wait.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa3d import config as settings
from jepa3d.data.transforms import augment
from jepa3d.models.decoder import ContextAwareDecoder
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier
from jepa3d.models.layout import Ragged
from jepa3d.models.sampling import TokenSample
from jepa3d.models.teacher import Teacher
from jepa3d.models.tokenizer import group
from jepa3d.objectives.autoencoding import Autoencoding
from jepa3d.objectives.generative import Generative
from jepa3d.objectives.invariance import Invariance
from jepa3d.objectives.jepa import JEPA
from jepa3d.objectives.supervised import Supervised
from jepa3d.ops import BatchGenerator
from jepa3d.training.pretrain import make_dvae

B = 4
SIZES = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 16,
}


def make(objective: str, **overrides):
    config = settings.resolve(
        {"encoder": SIZES, "target": {"layers": 2}, "teacher": ["ema"]}, overrides
    )
    encoder = PointEncoder(**vars(config.encoder))
    if objective == "generative":
        return Generative(config, encoder)
    if objective == "invariance":
        return Invariance(config, encoder)
    if objective == "supervised":
        return Supervised(Classifier(SIZES, ["a", "b"]))
    if objective == "dvae":
        return Autoencoding(config.dvae, make_dvae(config))
    return JEPA(
        config,
        encoder,
        Teacher([PointEncoder(**vars(config.encoder))], "standardize", 2, average=0),
    )


@pytest.fixture
def on_meta(monkeypatch):
    # The device meta has no generators.
    monkeypatch.setattr(BatchGenerator, "on", lambda self, device: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # nor autocast
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("jepa", {"sampler": {"name": "random"}}),
        ("jepa", {"sampler": {"name": "multi_block"}}),
        ("jepa", {"sampler": {"name": "multi_block"}, "decoder": {"depth": 0}}),
        ("generative", {}),
        ("invariance", {}),
        ("supervised", {}),
        ("dvae", {}),
    ],
    ids=str,
)
def test_a_step_does_not_wait(name, overrides, on_meta):
    objective = make(name, **overrides).train()
    # The sizes of blocks are known only after they are drawn, so the sample is given.
    if overrides.get("sampler", {}).get("name") == "multi_block":
        context, target = (
            torch.zeros(B, 9, dtype=torch.long),
            torch.zeros(B, 4, 3, dtype=torch.long),
        )
        sample = TokenSample(context, torch.ones(B, 9, dtype=torch.bool), target, num_context=30)
        objective.sampler = lambda centers, generator: sample
    points = augment(torch.randn(B, 64, 3), (0.8, 1.2), True, 0.1, BatchGenerator(0))
    labels = (torch.zeros(B, dtype=torch.long),) if name == "supervised" else ()
    output = objective(points, BatchGenerator(0), 0.5, *labels)
    output.loss.backward()
    objective.after_step(0.5)
    assert output.loss.device.type == "meta"
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_drawing_blocks_waits_once(on_meta, monkeypatch):
    """It waits for the lengths of the contexts, which this test replaces."""
    waits = []
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: waits.append(self.shape) or [9, 7, 8, 6]
    )
    objective = make("jepa", sampler={"name": "multi_block"})
    output = objective(torch.randn(B, 64, 3), BatchGenerator(0))
    assert waits == [(B,)]
    assert output.encoded.shape == (30, 24)


def test_sampling_and_neighbours_have_no_loop_over_the_clouds():
    def operations(batch: int) -> int:
        count = 0

        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal count
                count += 1
                return func(*args, **(kwargs or {}))

        with Counter():
            group(torch.randn(batch, 64, 3), 16, 8)
        return count

    assert operations(2) == operations(32) > 16


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_encoder_and_decoder_are_one_graph(drop_path):
    encoder = PointEncoder(**SIZES, drop_path=drop_path)
    decoder = ContextAwareDecoder(24, 2, 3)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def passes(patches, centers, index, target):
        layout = Ragged(mask, 8)
        tokens, position = encoder.visible(patches, centers, index, layout)
        context = encoder.hidden_states(tokens, position, layout)[-1]
        return decoder(context, layout, position, encoder.position(target)), encoder.features(
            patches, centers
        )[0]

    inputs = (
        torch.randn(2, 8, 8, 3),
        torch.randn(2, 8, 3),
        torch.randint(0, 8, (2, 5)),
        torch.randn(2, 3, 4, 3),
    )
    compiled = torch.compile(passes, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs)
    (found[0].sum() + found[1].sum()).backward()
    assert all(p.grad is not None for p in [*encoder.parameters(), *decoder.parameters()])
    if not drop_path:
        torch.testing.assert_close(found, passes(*inputs))
