"""Measure where the time of a pretraining step goes: by its parts and by kinds of operations, also
relative to the peak speed of matrix products on this machine (GEMM peak).

    python benchmarks/parts.py                  # paper size, 1,024 points, batch 32, EMA teacher

The step is cut wherever one part passes tensors to the next, in the forward and in the backward
pass, so each part is timed alone. The parts run in turn, and times are medians over rounds. The
GEMM peak is the speed of the fastest product of two 2048 x 2048 fp32 matrices, measured in the same
process in each round.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from common import Training, count_flops, gemm_peak, machine, random_clouds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from jepa3d import config as settings
from jepa3d.allocator import keep_large_blocks
from jepa3d.data.transforms import augment
from jepa3d.models.tokenizer import group
from jepa3d.objectives.jepa import cosine_loss
from jepa3d.ops import BatchGenerator, gather_points

# kind of operation -> how the names of its operations begin
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash",),
    "farthest points, neighbours": ("torch_quickfps", "aten::topk", "aten::argmin", "aten::sort"),
    "optimiser, moving average": ("aten::_fused_adamw", "aten::lerp", "aten::_foreach"),
}


def step(points: Tensor, training: Training, number: int, run: Callable) -> None:
    """Take one training step, cut into parts.

    run: called as `run(name, work)` for each part; it calls `work` and returns the result.
    """
    config, objective = training.config, training.model
    encoder, decoder, generator = (
        objective.encoder,
        objective.decoder,
        BatchGenerator(config.seed, number),
    )
    network = objective.teacher.networks[0]

    def grouping():
        moved = augment(points, config.scale, config.rotate, config.translate, generator)
        centers, patches, _ = group(
            moved, encoder.num_groups, encoder.group_size, generator.stream("group")
        )
        return centers, patches, objective.sampler(centers, generator.stream("sampler"))

    centers, patches, sample = run("grouping, sampling", grouping)
    layout = sample.layout()
    tokens, position = run(
        "student: tokenizer", lambda: encoder.visible(patches, centers, sample.context, layout)
    )
    cut = [x.detach().requires_grad_() for x in (tokens, position)]
    hidden = lambda: encoder.hidden_states(*cut, layout, generator.stream("drop_path"))[-1]  # noqa: E731
    context = run("student: encoder", hidden)
    seen, around = context.detach().requires_grad_(), position.detach().requires_grad_()

    def predict():
        masked = encoder.position(gather_points(centers, sample.target))
        return objective.projection(decoder(seen, layout, around, masked))

    prediction = run("decoder", predict)
    with torch.no_grad():
        taught = run("teacher: tokenizer", lambda: network.tokenizer(patches))
        tokens_of_all = run(
            "teacher: encoder", lambda: network.hidden_states(taught, network.position(centers))[-1]
        )
    target = gather_points(tokens_of_all, sample.target)
    end = prediction.detach().requires_grad_()
    cosine_loss(end, target).backward()
    run("decoder", lambda: prediction.backward(end.grad))
    run("student: encoder", lambda: context.backward(seen.grad))
    grads = [cut[0].grad, cut[1].grad + around.grad]
    run("student: tokenizer", lambda: torch.autograd.backward([tokens, position], grads))

    run("optimiser, moving average", training.update)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_large_blocks()
    config = settings.resolve({"teacher": ["ema"], "encoder": {"num_points": 1024}})
    points = random_clouds(arguments.batch, 1024)
    training = Training(config)
    rounds: dict[str, list[float]] = {}
    flops: dict[str, int] = {}

    def count(name: str, work: Callable):
        with count_flops() as counter:
            found = work()
        flops[name] = flops.get(name, 0) + counter.get_total_flops()
        return found

    step(points, training, 0, count)
    count("whole step", lambda: training(points))
    peaks = []
    for number in range(1, arguments.rounds + 1):
        peaks.append(gemm_peak())
        spent: dict[str, float] = {}

        def stopwatch(name: str, work: Callable, spent=spent):
            began = time.perf_counter()
            found = work()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return found

        step(points, training, number, stopwatch)
        stopwatch("whole step", lambda: training(points))
        for name, seconds in spent.items():
            rounds.setdefault(name, []).append(seconds)
    print(f"Batch {arguments.batch}, fp32, {machine()}; median of {arguments.rounds} rounds\n")
    print(
        "| part, forward and backward | GFLOP/sample | ms | % of the step | % of GEMM peak |\n|---|---|---|---|---|"
    )
    whole = rounds["whole step"]
    for name, seconds in rounds.items():
        share = 100 * median(a / b for a, b in zip(seconds, whole, strict=True))
        rate = 100 * median(flops[name] / a / peak for a, peak in zip(seconds, peaks, strict=True))
        flop = flops[name] / arguments.batch / 1e9
        print(f"| {name} | {flop:.2f} | {1000 * median(seconds):.0f} | {share:.1f} | {rate:.0f} |")

    with profile(activities=[ProfilerActivity.CPU]) as found:
        training(points)
    events = found.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {
        kind: sum(event.self_cpu_time_total for event in events if event.key.startswith(names))
        / total
        for kind, names in KINDS.items()
    }
    shares["the rest: element by element, norms, sums, copies"] = 1 - sum(shares.values())
    print("\n| kind of operation | % of the step's time |\n|---|---|")
    for kind, share in shares.items():
        print(f"| {kind} | {100 * share:.1f} |")


if __name__ == "__main__":
    main()
