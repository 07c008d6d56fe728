"""Measure time and memory of `jepa3d scene` on random LAS files with given numbers of points.

    python benchmarks/scene.py --points 1e6 5e6 --model ENCODER [--out features.parquet]

This needs the extra `io`.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import laspy
import numpy as np
from common import machine

DENSITY, PER_OBJECT, CHUNK = (
    50,
    4000,
    1_000_000,
)  # points per square metre; points per object; number of points that are written at once


def make(path: Path, total: int) -> None:
    """Write a scan of `total` points in UTM coordinates.

    Half of the points lie on hills up to 5 m high. The others lie on boxes and cylinders that stand
    on the hills and are 1 to 6 m wide.
    """
    rng, side = np.random.default_rng(0), np.sqrt(total / 2 / DENSITY)
    header = laspy.LasHeader(version="1.4", point_format=6)
    header.scales, header.offsets = np.full(3, 0.001), np.array([500_000.0, 4_000_000.0, 0.0])
    with laspy.open(path, mode="w", header=header) as file:
        for start in range(0, total, CHUNK):
            count = min(CHUNK, total - start)
            objects = count // 2 // PER_OBJECT
            ground = _on_ground(rng.random((count - objects * PER_OBJECT, 2)) * side)
            u, v = rng.random((2, objects, PER_OBJECT))
            radius, height = rng.uniform(0.5, 3, (2, objects, 1))
            angle = 2 * np.pi * u
            reach = np.where(
                rng.random((objects, 1)) < 0.5,
                1,
                1 / np.maximum(abs(np.cos(angle)), abs(np.sin(angle))),
            )
            middle = _on_ground(rng.random((objects, 2)) * side)
            top = rng.random((objects, PER_OBJECT)) < 0.3
            reach = radius * reach * np.where(top, np.sqrt(rng.random(top.shape)), 1)
            shape = np.stack(
                [reach * np.cos(angle), reach * np.sin(angle), height * np.where(top, 1, v)], -1
            )
            xyz = (
                np.concatenate([ground, (shape + middle[:, None]).reshape(-1, 3)]) + header.offsets
            )
            records = laspy.ScaleAwarePointRecord.zeros(count, header=header)
            records["x"], records["y"], records["z"] = rng.permutation(xyz).T
            file.write_points(records)


def _on_ground(xy: np.ndarray) -> np.ndarray:
    """Add the height of the ground to coordinates n 2; returns n 3."""
    return np.column_stack([xy, 5 * np.sin(xy[:, 0] / 40) * np.cos(xy[:, 1] / 40)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=float, nargs="+", default=[1e6, 5e6])
    parser.add_argument("--model", default="default")
    parser.add_argument(
        "--out",
        default="features.ply",
        help="name of the output file; its suffix chooses the format",
    )
    args = parser.parse_args()
    print(machine())
    for total in map(int, args.points):  # in rising order, since the peak is over all runs so far
        with tempfile.TemporaryDirectory() as folder:
            scan, out = Path(folder, "scan.las"), Path(folder, args.out)
            make(scan, total)
            began = time.perf_counter()
            command = [
                Path(sys.executable).with_name("jepa3d"),
                "scene",
                str(scan),
                "--out",
                str(out),
                "--model",
                args.model,
            ]
            subprocess.run(command, check=True, env=os.environ)
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            size = out.stat().st_size / 1e9
            print(
                f"{total:,} points: {seconds:.0f} s, {total / seconds:,.0f} points/s, {peak:.2f} GiB, {size:.2f} GB"
            )
