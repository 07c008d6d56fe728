"""`jepa3d info`: what a run, a source of shapes or this installation is, in plain lines."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from jepa3d.data.datasets import PointClouds, load
from jepa3d.evaluation.protocol import provenance
from jepa3d.training import checkpoint


def describe(path: str | None, up_axis: str = "z", labels_key: str = "labels") -> None:
    """Print what `path` is. Raises ValueError when it is neither a run nor shapes."""
    if path is None:
        _installation()
    elif (Path(path) / "run.json").is_file():
        _run(Path(path))
    else:
        _shapes(load([path], 512 if path.startswith("synthetic") else 1, "all", [up_axis], labels_key, raw=True))


def _installation() -> None:
    facts = provenance()
    print(", ".join(f"{name} {value}" for name, value in facts["versions"].items()))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    print(f"python {facts['python']}, {facts['machine']}, device {device}")
    for module, use in (
        ("torch_quickfps", "compiled sampling (extra: fast)"),
        ("matplotlib", "pictures (extra: view)"),
    ):
        print(f"{use}: {'yes' if importlib.util.find_spec(module) else 'no'}")


def _run(run: Path) -> None:
    record, config = (json.loads((run / name).read_text()) for name in ("run.json", "config.json"))
    data, cost = record["data"], record.get("cost")
    print(f"{run}: {config['objective']}, {record['status']}, {record['command']}")
    print(f"data: {data['name']}, {data['shapes']:,} shapes, sha256 {data['fingerprint'][:16]}")
    print("parameters: " + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in record["parameters"].items()))
    if cost is None and (newest := checkpoint.latest(run / "checkpoints")):
        cost = json.loads((newest / "state.json").read_text())
    if cost:
        print(
            f"step {cost['step']:,}, {cost['cpu_seconds'] / 60:.1f} CPU-minutes, "
            f"{cost['wall_seconds'] / 60:.1f} minutes, peak memory {cost['peak_memory'] / 2**30:.2f} GiB"
        )
        if cost.get("stage1_cpu_seconds"):
            print(f"stage I before that: {cost['stage1_cpu_seconds'] / 60:.1f} CPU-minutes")
    if record["departures"]:
        print("departs from the paper's setting in:")
        for name, (ours, paper) in record["departures"].items():
            print(f"  {name}: {ours} (paper: {paper})")


def _shapes(clouds: PointClouds) -> None:
    sizes = sorted({len(cloud) for cloud in clouds.points})
    span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    print(f"{clouds.name}: {len(clouds):,} shapes of {span} points, sha256 {clouds.fingerprint}")
    if clouds.split is not None:
        print(f"split: {int((clouds.split == 0).sum()):,} train, {int((clouds.split == 1).sum()):,} test")
    if clouds.labels is None:
        print("no labels")
        return
    counts = np.bincount(clouds.labels, minlength=len(clouds.class_names))
    print(
        f"{len(clouds.class_names)} classes: "
        + ", ".join(f"{n} {c}" for n, c in zip(clouds.class_names, counts, strict=True))
    )
