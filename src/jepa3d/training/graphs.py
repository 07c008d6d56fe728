"""CUDA graphs: record the forward and backward pass of a step once, then let the GPU replay the
recording with one launch instead of two thousand.

Without a graph, the GPU waits for the host: for a step with the paper's encoder, an H200 computes
for 17 ms, and the host needs 50 to 90 ms to launch the operations (docs/performance.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jepa3d.config import PretrainConfig, RunConfig
from jepa3d.ops import BatchGenerator, RepeatedDraws

WARM_UP = 3  # number of calls before a graph is recorded; torch demands such a warm-up


def can_repeat(config: RunConfig, processes: int, device: torch.device) -> bool:
    """Return whether a run's step can be recorded as graphs, one per set of tensor sizes.

    This is possible for 3D-JEPA on one CUDA GPU, without fp16, SIGReg (objectives/regularizers.py),
    cached targets or gradient accumulation. It also requires that the tensors have only a few
    different sizes in all steps. The samplers "random" and "one_block" meet this condition. The
    other samplers do not, since their contexts may have any length.
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
    """Record `run(points, generator)`, a forward and backward pass, once for each set of tensor
    sizes. Every call replays the recording that belongs to its sizes.

    Each call overwrites the previous call's result, and the gradients of `model`. Before each
    replay, the random numbers that `run` would draw are written into the graph's own buffers.
    """

    def __init__(self, run: Callable[[Tensor, BatchGenerator], Any], model: nn.Module):
        self.run, self.model, self.recorded = run, model, {}
        # The random streams that choose tensor sizes, each with the number of sizes that it chooses
        # from; empty before the first recording.
        self.sizes: dict[str, int] = {}
        self.pool = None

    def __call__(self, points: Tensor, generator: BatchGenerator) -> Any:
        key = self._key(points, generator)
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
        """Return what decides the tensor sizes of a step: the shape of the batch, and the choices
        that the random streams make.
        """
        sizes = []
        for name, count in self.sizes.items():
            stream = BatchGenerator(generator.seed, generator.step, stream=name)
            sizes.append(stream.choice(count))
        return points.shape, *sizes

    def _record(self, points: Tensor, draws: RepeatedDraws) -> tuple:
        """Record a graph. Returns the graph, its input points, draws, output and gradients.

        The warm-up changes the model's buffers; they are restored at the end.
        """
        device = torch.get_device_module(points.device)
        inputs = points.clone()
        saved = [buffer.clone() for buffer in self.model.buffers()]
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
        # thread_local, since another thread copies the next batch to the GPU meanwhile
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
