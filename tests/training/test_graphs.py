"""Random numbers in CUDA graphs, which repeat a recorded step.

The graphs themselves need a GPU, and are tested by benchmarks/gpu.py, part `same`.
"""

import pytest
import torch

from jepa3d.data.datasets import load
from jepa3d.ops import BatchGenerator, RepeatedDraws
from jepa3d.training.graphs import can_repeat
from jepa3d.training.pretrain import make_task


@pytest.mark.parametrize("view", [0.0, 1.0])
def test_repeated_draws_are_those_of_another_step(tiny, bundle, view):
    config = tiny(sampler={"name": "random", "mask_ratio": 0.6}, target={"view": view})
    clouds = load([bundle], config.encoder.num_points)
    model = make_task(config, "jepa", clouds, {}).objective.train()
    points, draws = clouds.points[:8], RepeatedDraws(0, 0)
    points = torch.from_numpy(points)
    model(points, draws)

    def sizes(step: int) -> list[int]:
        return [
            BatchGenerator(0, step, stream=name).choice(count)
            for name, count in draws.choices.items()
        ]

    same = next(step for step in range(1, 1000) if sizes(step) == sizes(0))
    draws.redraw(same)
    again = model(points, RepeatedDraws(0, same, parent=draws)).loss
    assert again.item() == model(points, BatchGenerator(0, same)).loss.item()
    assert again.item() != model(points, BatchGenerator(0, 0)).loss.item()
    assert bool(draws.choices) == bool(view)


def test_a_cpu_repeats_nothing(tiny):
    assert not can_repeat(tiny(sampler={"name": "random"}), 1, torch.device("cpu"))
