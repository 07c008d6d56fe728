"""Use a GPU for ten minutes: compare its numbers with those of the CPU, measure the paper's
training step, and train an encoder.

    python benchmarks/gpu.py --out gpu --budget 540
    python benchmarks/gpu.py --out gpu --budget 300 --parts train --sweethome sweethome3d_2048.npz
    python benchmarks/gpu.py --out gpu --rehearse      # every part, at sizes that take seconds; a GPU is not needed

This needs only the core dependencies of the package, and no network. For a machine that has torch
and the usual libraries, `pip wheel --no-deps -w wheels . trimesh` makes the missing wheels. The
parts run one after another, each in its own process, so that a part that fails does not stop the
others. All results are written to OUT/*.json as soon as they are known. The parts are:

same   compares results of the device with those of the CPU: farthest point sampling (FPS),
       neighbours, vectors, loss and gradient of every objective, a resumed run, and bf16
step   measures samples/s and memory of the paper's step, in every precision, eager and compiled;
       also writes a profile of the step
train  trains the encoders of --arms in turn on built-in shapes, and writes OUT/ARM.safetensors in
       half precision
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import Training, count_flops, random_clouds
from safetensors.torch import save_file

from jepa3d import config as settings
from jepa3d import ops
from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.data.procedural import make_procedural
from jepa3d.data.synthetic import CLASS_NAMES, make_shape
from jepa3d.models.encoder import PointEncoder
from jepa3d.ops import BatchGenerator, unit_sphere
from jepa3d.plain import merge
from jepa3d.training.loop import Interrupted
from jepa3d.training.pretrain import make_task, pretrain

SHARES = {"same": 0.12, "step": 0.25, "train": 0.63}  # shares of the time budget
# Settings of the packaged encoder. In training, views are made from clouds of `DRAWN` points.
LARGE = {
    "num_points": 1024,
    "num_groups": 64,
    "group_size": 20,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 6,
    "tokenizer_dim": 48,
}
DRAWN = 2 * LARGE["num_points"]
# name of an arm, that is, of one way of training -> its settings
ARMS: dict[str, dict[str, Any]] = {
    "view": {"teacher": ["ema", "untrained"], "target": {"view": 1.0}},
    "joined": {"teacher": ["ema", "untrained"]},
}


def device() -> torch.device:
    """Return the accelerator of this machine, or the CPU if there is none."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def wait() -> None:
    """Wait until the device has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(call: Callable[[], Any], tries: int = 5) -> float:
    """Return the median seconds of a call, after one call as warm-up."""
    times = []
    for _ in range(tries + 1):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


# --------------------------------------------------------------------------------- the same numbers


def same(out: Path, budget: float, rehearse: bool) -> dict:
    """Compare results of the device with those of the CPU.

    Returns for each check the difference, the largest allowed one, and whether the check passed.
    """
    found: dict[str, dict] = {}

    def check(name: str, error: float, allowed: float) -> None:
        found[name] = {"error": error, "allowed": allowed, "good": bool(error <= allowed)}
        print(
            f"{'ok  ' if error <= allowed else 'BAD '} {name}: {error:.3g} (at most {allowed:g})",
            flush=True,
        )

    points = random_clouds(8, 2048)
    there = points.to(device())
    for count, samples in ((64, 16), (1000, 128), (2048, 512)):
        cloud, start = points[:, :count].contiguous(), torch.arange(8)
        want = ops._farthest_point_sample_reference(cloud, samples, start)
        got = ops._farthest_point_sample_reference(cloud.to(device()), samples, start.to(device()))
        check(
            f"FPS {count} to {samples}, loop: indices that differ",
            (got.cpu() != want).float().mean().item(),
            0.001,
        )
        if there.is_cuda and (kernel := ops._triton()):
            got = kernel.farthest_point_sample(cloud.to(device()), samples, start.to(device()))
            check(
                f"FPS {count} to {samples}, Triton: indices that differ",
                (got.cpu() != want).float().mean().item(),
                0,
            )
    near = ops.knn(there[:, :64], there, 32).cpu() != ops.knn(points[:, :64], points, 32)
    check("neighbours that differ", near.float().mean().item(), 0.001)
    encoder = PointEncoder(**(settings.preset("tiny")["encoder"] if rehearse else {})).eval()
    with torch.inference_mode():
        want = encoder.embed(points)
        got = encoder.to(device()).embed(there).cpu()
    check("vectors of the encoder", ((got - want).norm() / want.norm()).item(), 1e-4)
    for name, overrides in {
        "jepa": {},
        "jepa, view": {"target": {"view": 1.0}},
        "generative": {},
        "invariance": {},
        "dvae": {},
    }.items():
        config = settings.resolve(settings.preset("tiny"), overrides, {"teacher": ["ema"]})
        base = objective_gradient(
            config, name.partition(",")[0], points[:, :512], torch.device("cpu")
        )
        here = objective_gradient(config, name.partition(",")[0], points[:, :512], device())
        check(f"{name}: loss", abs(here[0] - base[0]) / abs(base[0]), 1e-4)
        check(f"{name}: gradient", ((here[1] - base[1]).norm() / base[1].norm()).item(), 5e-3)
        half = objective_gradient(
            config, name.partition(",")[0], points[:, :512], device(), torch.bfloat16
        )
        check(f"{name}: loss in bf16", abs(half[0] - base[0]) / abs(base[0]), 0.05)
    clouds = PointClouds("random", "", random_clouds(64, 512).numpy())
    eight = {"max_steps": 8, "checkpoint_every": 4, "log_every": 4, "mixed_precision": "no"}
    config = settings.resolve(settings.preset("tiny"), eight)
    runs = out / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    try:
        pretrain(config, runs / "stopped", stop_at=4, clouds=clouds)
    except Interrupted:
        pretrain(config, runs / "stopped", resume=True, clouds=clouds)
    pretrain(config, runs / "whole", clouds=clouds)
    vectors = [
        PointEncoder.from_pretrained(runs / name / "encoder").embed(points[:, :512])
        for name in ("stopped", "whole")
    ]
    check(
        "a resumed run: vectors",
        ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item(),
        1e-3,
    )
    for name, overrides in {"": {}, ", view": {"target": {"view": 1.0}}}.items():
        losses = []
        for repeats in (False, True):
            training = Training(
                settings.resolve(settings.preset("tiny"), overrides), where=device()
            )
            training.repeated = training.repeated if repeats else None
            losses.append(torch.stack([training(there[:, :512]).clone() for _ in range(12)]))
        check(f"12 steps as graphs{name}: loss", (losses[0] - losses[1]).abs().max().item(), 1e-2)
    return found


def objective_gradient(
    config: PretrainConfig, objective: str, points, where, dtype=None
) -> tuple[float, torch.Tensor]:
    """Compute the loss and the gradient of an objective's first step.

    Random numbers are sampled on the CPU, so that they are the same for every device.
    """
    clouds = PointClouds("random", "", points.numpy())
    rand, randn = torch.rand, torch.randn

    def on_cpu(draw, *shape, generator=None, device=None, **others):
        return draw(*shape, generator=generator, **others).to(device or "cpu")

    with (
        patch.object(
            BatchGenerator, "on", lambda self, _: torch.Generator().manual_seed(self._key)
        ),
        patch.object(torch, "rand", lambda *shape, **others: on_cpu(rand, *shape, **others)),
        patch.object(torch, "randn", lambda *shape, **others: on_cpu(randn, *shape, **others)),
    ):
        model = make_task(config, objective, clouds, {}).objective.to(where).train()
        with torch.autocast(where.type, dtype) if dtype else nullcontext():
            loss = model(points.to(where), BatchGenerator(0, 0), 0.0).loss
        loss.backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradient).float().cpu()


# --------------------------------------------------------------------------------- the paper's step


def step(out: Path, budget: float, rehearse: bool) -> dict:
    """Measure the paper's training step in several ways, then FPS, and then embedding.

    The most important measurements come first, since the time may run out.
    """
    end, found = time.monotonic() + budget, {}
    batch, size = (8, settings.preset("tiny")) if rehearse else (128, {})
    shape = settings.resolve(size).encoder
    ways: dict[str, dict] = {
        "bf16": {"mixed_precision": "bf16"},
        "bf16, random masks": {
            "mixed_precision": "bf16",
            "sampler": {"name": "random", "mask_ratio": 0.6},
        },
        "bf16, random masks, no graph": {
            "mixed_precision": "bf16",
            "sampler": {"name": "random", "mask_ratio": 0.6},
        },
        "fp32": {},
        "TF32": {"tf32": True},
        "bf16, batch 512": {"mixed_precision": "bf16", "batch": 4 * batch},
        "bf16, compiled": {"mixed_precision": "bf16", "compile": "yes"},
    }
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training/loop.py
    found["matrix rate, TFLOP/s"] = matrix_rate(512 if rehearse else 8192)
    print(found, flush=True)
    for name, overrides in ways.items():
        if time.monotonic() > end - 20:
            print(f"{name}: no time left")
            continue
        overrides = dict(overrides)
        torch.backends.cuda.matmul.allow_tf32 = overrides.pop("tf32", False)
        rows = overrides.pop("batch", batch)
        began = time.perf_counter()
        config = settings.resolve(size, {"teacher": ["ema"]}, overrides)
        training = Training(config, where=device())
        training.repeated = None if "no graph" in name else training.repeated
        points = random_clouds(rows, shape.num_points).to(device())
        for _ in range(3):
            training(points)
        wait()
        first = time.perf_counter() - began
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()
        with count_flops() as counter:
            training(points)
        taken = (
            seconds(
                lambda training=training, points=points: [training(points) for _ in range(5)], 3
            )
            / 5
        )
        peak = (
            torch.accelerator.max_memory_allocated() / 2**30
            if torch.accelerator.is_available()
            else 0.0
        )
        flop = counter.get_total_flops()
        found[name] = {
            "samples/s": rows / taken,
            "ms": 1000 * taken,
            "GiB": peak,
            "GFLOP a sample": flop / rows / 1e9,
            "TFLOP/s": flop / taken / 1e12,
            "first seconds": first,
        }
        print(name, {key: round(value, 2) for key, value in found[name].items()}, flush=True)
        if name in ("bf16", "bf16, random masks"):
            found[f"profile, {name}"] = profile(training, points, out / f"profile-{len(found)}.txt")
            print(found[f"profile, {name}"], flush=True)
        write(out / "step.json", found)
    for batch_size, count, samples in ((128, 2048, 64), (128, 2048, 128), (32, 8192, 1024)):
        cloud = random_clouds(batch_size if not rehearse else 2, count).to(device())
        start = torch.zeros(len(cloud), dtype=torch.long, device=device())
        loop = seconds(
            lambda c=cloud, s=start, n=samples: ops._farthest_point_sample_reference(c, n, s), 3
        )
        found[f"FPS {batch_size} x {count} to {samples}"] = {
            "loop ms": 1000 * loop,
            "ms": 1000 * seconds(lambda c=cloud, n=samples: ops.farthest_point_sample(c, n), 3),
        }
    encoder, clouds = (
        PointEncoder(**vars(shape)).to(device()).eval(),
        random_clouds(batch, 2048).to(device()),
    )
    with torch.inference_mode():
        found["embed, samples/s"] = batch / seconds(lambda: encoder.embed(clouds))
        with torch.autocast(device().type, torch.bfloat16):
            found["embed in bf16, samples/s"] = batch / seconds(lambda: encoder.embed(clouds))
    print(
        {key: value for key, value in found.items() if "FPS" in key or "embed" in key}, flush=True
    )
    return found


def matrix_rate(size: int) -> float:
    """Measure the TFLOP/s of bf16 products of random square matrices."""
    a = torch.randn(size, size, device=device(), dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: [a @ a for _ in range(5)]) * 5 / 1e12


def profile(training: Training, points, file: Path, steps: int = 5) -> dict[str, float]:
    """Profile training steps, and write a table of their operations to `file`.

    Returns the number of kernels per step, the share of the time in which the device is busy, and
    the milliseconds per step that are spent in launches of kernels and in waits.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if points.is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    wait()
    with torch.profiler.profile(activities=kinds) as found:
        began = time.perf_counter()
        for _ in range(steps):
            training(points)
        wait()
        wall = time.perf_counter() - began
    averages = found.key_averages()
    on_device = [
        event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels = [event for event in on_device if not event.is_user_annotation]

    def of(word: str) -> float:
        return (
            sum(event.self_cpu_time_total for event in averages if word in event.key) / steps / 1000
        )

    order = "self_device_time_total" if points.is_cuda else "self_cpu_time_total"
    file.write_text(averages.table(sort_by=order, row_limit=40, max_name_column_width=70))
    return {
        "kernels": len(kernels) / steps,
        "device busy, %": sum(event.time_range.elapsed_us() for event in kernels) / wall / 1e4,
        "launches, ms": of("LaunchKernel"),
        "waits, ms": of("Synchronize"),
        "step while profiled, ms": 1000 * wall / steps,
    }


# --------------------------------------------------------------------------------------- an encoder


def train(out: Path, budget: float, rehearse: bool, arguments: argparse.Namespace) -> dict:
    """Train all arms on the same shapes, each in its own process and for the same time."""
    end, count = time.monotonic() + budget, 84 if rehearse else arguments.shapes
    kinds = [shapes_made(kind, count // 2) for kind in (built_in, procedural)]
    if arguments.sweethome:
        raw = np.load(arguments.sweethome)["points"].astype(np.float32) @ np.array(
            [[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32
        )
        own = in_order(unit_sphere(torch.from_numpy(raw)).numpy())
        kinds += [own] * round(0.3 * count / len(own))  # about a quarter of all shapes
    points = np.concatenate(kinds)
    np.save(out / "shapes.npy", points)
    print(f"{len(points):,} shapes after {budget - (end - time.monotonic()):.0f} s", flush=True)
    for i, arm in enumerate(arguments.arms):
        share = (end - time.monotonic()) / (len(arguments.arms) - i)
        command = [
            sys.executable,
            __file__,
            "--out",
            out,
            "--parts",
            "arm",
            "--arms",
            arm,
            "--budget",
            share - 15,
        ]
        command += ["--batch", arguments.batch, *(["--rehearse"] if rehearse else [])]
        command += ["--start", arguments.start] if arguments.start else []
        subprocess.run(
            [str(word) for word in command], timeout=None if rehearse else share, check=True
        )
    (out / "shapes.npy").unlink()
    return {
        arm: json.loads((out / f"{arm}.json").read_text())
        for arm in arguments.arms
        if (out / f"{arm}.json").exists()
    }


def shapes_made(make: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Make shapes [count, DRAWN, 3] float32 in farthest point order, on all cores."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        return in_order(np.stack(pool.map(make, range(count), chunksize=64)))


def in_order(raw: np.ndarray) -> np.ndarray:
    """Sample `DRAWN` points of each cloud n N 3; returns n DRAWN 3 in farthest point order."""
    done = []
    for at in range(0, len(raw), 256):
        clouds = torch.from_numpy(raw[at : at + 256]).to(device())
        done.append(
            unit_sphere(ops.gather_points(clouds, ops.farthest_point_sample(clouds, DRAWN))).cpu()
        )
    return torch.cat(done).numpy()


def built_in(i: int) -> np.ndarray:
    """Make shape i of the built-in shapes with classes."""
    return make_shape(i % len(CLASS_NAMES), 3 * DRAWN // 2, np.random.default_rng([0, i]))[0]


def procedural(i: int) -> np.ndarray:
    """Make shape i of the random procedural shapes."""
    return make_procedural(i, 3 * DRAWN // 2)


def arm(out: Path, budget: float, rehearse: bool, name: str, batch: int, start: str | None) -> dict:
    """Train one arm in the remaining time.

    A short trial predicts how many steps are possible; 88 % of these are trained.
    """
    end = time.monotonic() + budget
    overrides: dict[str, Any] = {
        "rotate": True,
        "mixed_precision": "bf16",
        "batch_size": 8 if rehearse else batch,
        "log_every": 100,
        "warmup_epochs": 1,
        "checkpoint_every": 10**6,
        "encoder": LARGE,
        "target": {"layers": LARGE["depth"]},
        "init": start,
        "seed": int(start is not None),  # not the seed of the run that made the weights
    }
    points = np.load(out / "shapes.npy")
    config = settings.resolve(settings.preset("tiny"), merge({}, overrides, ARMS[name]))
    clouds = PointClouds("built-in shapes", "", points)
    runs = out / "runs" / name
    shutil.rmtree(runs, ignore_errors=True)
    # Only the second half of the trial is timed, since graphs are recorded in the first half.
    trial = 2 if rehearse else 200
    pretrain(
        settings.resolve(settings.to_dict(config), {"max_steps": trial}),
        runs / "trial",
        clouds=clouds,
    )
    lines = [
        json.loads(line) for line in (runs / "trial" / "metrics.jsonl").read_text().splitlines()
    ]
    rate = (lines[-1]["step"] - lines[-2]["step"]) / (
        lines[-1]["wall_seconds"] - lines[-2]["wall_seconds"]
    )
    steps = 6 if rehearse else max(100, int(0.88 * rate * (end - time.monotonic())))
    every = max(1, steps // 5)
    print(f"{name}: {rate:.1f} steps/s, {steps:,} steps", flush=True)
    config = settings.resolve(
        settings.to_dict(config), {"max_steps": steps, "snapshot_every": every}
    )
    done = threading.Event()
    watch = threading.Thread(
        target=keep_latest, args=(runs / "run", out / f"{name}.safetensors", done)
    )
    watch.start()
    try:
        pretrain(config, runs / "run", clouds=clouds)
    finally:
        done.set()
        watch.join()
    metrics = [
        json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "config": settings.to_dict(config),
        "steps/s": rate,
        "shapes": len(clouds),
        "metrics": metrics[:: max(1, len(metrics) // 100)],
    }


def keep_latest(run: Path, file: Path, done: threading.Event) -> None:
    """Whenever a run has a new encoder, copy the encoder to `file` in half precision."""
    last = None
    while True:
        finished = done.wait(2)
        found = sorted(run.glob("snapshots/*")) + [
            folder for folder in [run / "encoder"] if folder.exists()
        ]
        if found and found[-1] != last:
            last = found[-1]
            state = PointEncoder.from_pretrained(last).state_dict()
            half = {
                key: value.half() if value.is_floating_point() else value
                for key, value in state.items()
            }
            save_file(half, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
        if finished:
            return


# ---------------------------------------------------------------------------------------------- all


def write(file: Path, found: dict) -> None:
    file.write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--budget", type=float, default=540, help="seconds for all parts together")
    parser.add_argument("--parts", nargs="+", choices=[*SHARES, "arm"], default=list(SHARES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument(
        "--shapes", type=int, default=60_000, help="number of built-in shapes to train on"
    )
    parser.add_argument("--batch", type=int, default=256, help="batch size of training")
    parser.add_argument(
        "--sweethome", type=Path, help="a .npz of points [n, N, 3], y up, to train on as well"
    )
    parser.add_argument("--start", help="encoder whose weights training starts from")
    parser.add_argument("--rehearse", action="store_true", help="use sizes that take seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    out, rehearse, end = arguments.out, arguments.rehearse, time.monotonic() + arguments.budget
    if len(arguments.parts) == 1:
        part = arguments.parts[0]
        if part == "arm":
            name = arguments.arms[0]
            found = arm(out, arguments.budget, rehearse, name, arguments.batch, arguments.start)
            write(out / f"{name}.json", found)
        elif part == "train":
            write(out / "train.json", train(out, arguments.budget, rehearse, arguments))
        else:
            write(
                out / f"{part}.json",
                {"same": same, "step": step}[part](out, arguments.budget, rehearse),
            )
        return
    card = (
        torch.get_device_module().get_device_name()
        if torch.accelerator.is_available()
        else "no accelerator"
    )
    print(f"{card}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    for part in arguments.parts:
        left = end - time.monotonic()
        budget = (
            left
            * SHARES[part]
            / sum(SHARES[other] for other in arguments.parts[arguments.parts.index(part) :])
        )
        command = [sys.executable, *sys.argv, "--parts", part, "--budget", str(budget)]
        began = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=max(5, end - time.monotonic())).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        print(f"--- {part}: {time.perf_counter() - began:.0f} s, exit {code}", flush=True)


if __name__ == "__main__":
    main()
