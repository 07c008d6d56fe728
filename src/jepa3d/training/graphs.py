"""CUDA graphs: record a step's forward and backward once, then let the GPU replay the recording
with one launch instead of two thousand.

Without a graph, a step waits for the host: on an H200 (docs/performance.md), the paper's step
takes the GPU 17 ms and the host 50 ms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jepa3d.config import PretrainConfig, RunConfig
from jepa3d.ops import BatchGenerator, RepeatedDraws

WARM_UP = 3  # calls before a graph is recorded, as torch demands


def can_repeat(config: RunConfig, processes: int, device: torch.device) -> bool:
    """Return whether a run's step can be recorded as graphs, one per set of tensor sizes.

    The tensors may have only a few different sizes. Random and one-block masks meet this condition;
    multi-block masks do not, since their contexts vary in length.
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
    """Record forward and backward of `run(points, generator)` once for each set of tensor sizes,
    and replay the recording in later calls.

    The result and the gradients of `model` are overwritten by the next call. Before each replay,
    the random numbers that `run` would draw are written into the graph's own buffers.
    """

    def __init__(self, run: Callable[[Tensor, BatchGenerator], Any], model: nn.Module):
        self.run, self.model, self.recorded = run, model, {}
        # Random streams that choose tensor sizes; None before the first recording.
        self.sizes: dict[str, int] | None = None
        self.pool = None

    def __call__(self, points: Tensor, generator: BatchGenerator) -> Any:
        key = None if self.sizes is None else self._key(points, generator)
        if key not in self.recorded:
            draws = RepeatedDraws(generator.seed, generator.step)
            recorded = self._record(points, draws)
            self.sizes = draws.choices
            key = self._key(points, generator)
            self.recorded[key] = recorded
        graph, inputs, draws, output, gradients = self.recorded[key]
        inputs.copy_(points, non_blocking=True)
        draws.redraw(generator.step)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return output

    def _key(self, points: Tensor, generator: BatchGenerator) -> tuple:
        """Return what decides the tensor sizes: the shape of the batch, and the sampled sizes."""
        assert self.sizes is not None
        sizes = []
        for name, count in self.sizes.items():
            stream = BatchGenerator(generator.seed, generator.step, stream=name)
            sizes.append(stream.choice(count))
        return points.shape, *sizes

    def _record(self, points: Tensor, draws: RepeatedDraws) -> tuple:
        """Record a graph. Returns the graph, its input points, draws, output and gradients.

        The model's buffers, which the warm-up changes, are restored.
        """
        device = torch.get_device_module(points.device)
        inputs, saved = points.clone(), [buffer.clone() for buffer in self.model.buffers()]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        side_stream = device.Stream()
        side_stream.wait_stream(device.current_stream())
        with device.stream(side_stream):
            for _ in range(WARM_UP):
                self.run(inputs, RepeatedDraws(draws.seed, draws.step, parent=draws))
                for parameter in parameters:
                    parameter.grad = None
        device.current_stream().wait_stream(side_stream)
        graph = device.CUDAGraph()
        # thread_local, since another thread reads the next batch meanwhile
        with device.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.run(inputs, RepeatedDraws(draws.seed, draws.step, parent=draws))
        self.pool = graph.pool()
        for buffer, value in zip(self.model.buffers(), saved, strict=True):
            buffer.copy_(value)
        gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        return graph, inputs, draws, detached(output), gradients


def detached(output: Any) -> Any:
    """Detach the tensors of a named tuple, so that autograd frees the nodes of the recording."""
    return type(output)(
        *(value.detach() if isinstance(value, Tensor) else value for value in output)
    )
