"""Stage I, the training of the dVAE, and its schedules."""

import pytest
import torch
from torch.testing import assert_close

from jepa3d.config import DVAEConfig
from jepa3d.models.dvae import DVAE
from jepa3d.models.tokenizer import group
from jepa3d.objectives.autoencoding import Autoencoding
from jepa3d.ops import BatchGenerator

POINTS = torch.randn(3, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dvae():
    torch.manual_seed(0)
    return DVAE(
        16,
        12,
        num_groups=8,
        group_size=8,
        num_points=64,
        tokenizer_dim=8,
        dgcnn_dim=8,
        folding_dim=8,
    )


def scheduled(dvae, progress: float, config: DVAEConfig) -> tuple[float, float]:
    """Return the temperature and the KL weight that the dVAE gets."""
    calls = []
    handle = dvae.register_forward_pre_hook(lambda _, args: calls.append(args[2:4]))
    Autoencoding(config, dvae)(POINTS, BatchGenerator(0), progress)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize(
    ("step", "temperature", "kl_weight"),
    [
        (0, 1.0, 0.0),
        (10_000, 0.9770577, 0.0),
        (25_000, 0.8627063, 0.005449674),
        (35_000, 0.7440580, 0.0146447),
        (50_000, 0.53125, 0.0345492),
        (60_000, 0.3863983, 0.05),
        (100_000, 0.0625, 0.0975528),
        (110_000, 0.0625, 0.1),
        (200_000, 0.0625, 0.1),
    ],
)
def test_temperature_and_kl_weight_are_acts_of_a_run_of_200_000_steps(
    step, temperature, kl_weight, dvae
):
    """ACT's configuration has `temp` from 1 to 0.0625 and `kldweight` from 0 to 0.1, both with
    ntime 100,000.
    """
    progress = step / 200_000
    assert scheduled(dvae, progress, DVAEConfig()) == pytest.approx(
        (temperature, kl_weight), rel=1e-5
    )


def test_schedules_follow_the_configuration(dvae):
    config = DVAEConfig(temperature=(2.0, 0.5), kl_weight=0.4)
    assert scheduled(dvae, 0.0, config) == pytest.approx((2.0, 0.0))
    assert scheduled(dvae, 1.0, config) == pytest.approx((0.5, 0.4))


def test_the_output_is_that_of_the_dvae_on_the_grouped_points(dvae):
    objective = Autoencoding(DVAEConfig(), dvae.eval())
    output = objective(POINTS, BatchGenerator(0, 3), 1.0)
    generator = BatchGenerator(0, 3)
    centers, patches, _ = group(POINTS, 8, 8, generator.stream("group"))
    assert output == dvae(patches, centers, 0.0625, 0.1, generator.stream("gumbel"))
    metrics = objective.metrics(output)
    assert set(metrics) == {"reconstruction", "fine", "kl", "perplexity"}
    assert metrics["fine"] == output.fine.item()


def test_a_generator_makes_the_step_again_and_another_step_differs(dvae):
    objective = Autoencoding(DVAEConfig(), dvae.train())
    one, two, other = (objective(POINTS, BatchGenerator(0, step), 0.1).loss for step in (0, 0, 1))
    assert one == two
    assert one != other


def test_training_lowers_the_reconstruction_error(dvae):
    objective = Autoencoding(DVAEConfig(), dvae.train())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    losses = []
    for step in range(15):
        output = objective(POINTS, BatchGenerator(0, step), step / 15)
        losses.append(output.reconstruction.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_moments_after_a_step_nothing_moves(dvae):
    objective = Autoencoding(DVAEConfig(), dvae)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.after_step(0.5)
    for name, value in objective.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
