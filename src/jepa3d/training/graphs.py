"""A pass as a graph that a GPU repeats: one launch by the host instead of two thousand, which is
what a step waits for.

Measured on an H200 (docs/performance.md): the paper's step keeps the GPU busy for 17 ms and the
host for 50.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jepa3d.config import PretrainConfig, RunConfig
from jepa3d.ops import BatchGenerator, RepeatedDraws

WARM_UP = 3  # passes before a graph is recorded, as torch asks for


def can_repeat(config: RunConfig, processes: int, device: torch.device) -> bool:
    """Whether every pass of a run has one of few shapes: random masks or one block, unlike contexts
    of any length.
    """
    return (
        torch.get_device_module(device).__name__ == "torch.cuda"
        and isinstance(config, PretrainConfig)
        and config.objective == "jepa"
        and config.sampler.name in ("random", "one_block")
        and config.mixed_precision != "fp16"
        and not (config.target.sigreg or config.target.cache)
        and processes == config.accumulate == 1
    )


class Repeated:
    """Forward and backward of `run(points, generator)`, recorded once for each set of sizes drawn,
    then repeated.

    The result and the gradients of `model` stay valid until the next call. Each graph has its own
    draws in its own buffers, those that `run` would have made.
    """

    def __init__(self, run: Callable[[Tensor, BatchGenerator], Any], model: nn.Module):
        self.run, self.model, self.recorded = run, model, {}
        self.sizes: dict[str, int] | None = None  # the streams by which sizes are drawn, once known
        self.pool = None

    def __call__(self, points: Tensor, generator: BatchGenerator) -> Any:
        key = None if self.sizes is None else self._key(points, generator)
        if key not in self.recorded:
            draws = RepeatedDraws(generator.seed, generator.step)
            recorded = self._record(points, draws)
            self.sizes = draws.choices
            key = self._key(points, generator)
            self.recorded[key] = recorded
        graph, seen, draws, output, gradients = self.recorded[key]
        seen.copy_(points, non_blocking=True)
        draws.redraw(generator.step)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return output

    def _key(self, points: Tensor, generator: BatchGenerator) -> tuple:
        """Everything that decides the shapes of a pass: the batch's and the sizes that it draws."""
        assert self.sizes is not None
        drawn = []
        for name, count in self.sizes.items():
            stream = BatchGenerator(generator.seed, generator.step, stream=name)
            drawn.append(stream.choice(count))
        return points.shape, *drawn

    def _record(self, points: Tensor, draws: RepeatedDraws) -> tuple:
        """The graph, its points, draws, output and gradients. What warming up moved is put back."""
        device = torch.get_device_module(points.device)
        seen, kept = points.clone(), [buffer.clone() for buffer in self.model.buffers()]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        aside = device.Stream()
        aside.wait_stream(device.current_stream())
        with device.stream(aside):
            for _ in range(WARM_UP):
                self.run(seen, RepeatedDraws(draws.seed, draws.step, parent=draws))
                for parameter in parameters:
                    parameter.grad = None
        device.current_stream().wait_stream(aside)
        graph = device.CUDAGraph()
        # Another thread reads ahead.
        with device.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.run(seen, RepeatedDraws(draws.seed, draws.step, parent=draws))
        self.pool = graph.pool()
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)
        gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        return graph, seen, draws, detached(output), gradients


def detached(output: Any) -> Any:
    """The same named tuple without its history, which would keep nodes of this recording for the
    next.
    """
    return type(output)(
        *(value.detach() if isinstance(value, Tensor) else value for value in output)
    )
