"""Measure a store of ten million clouds: opening it, looking up clouds, and ordering an epoch. Also
measure how fast a smaller store is read in random order.

    python benchmarks/store.py                    # 10,000,000 clouds: an index of 650 MB in a temporary folder

The large store has an index but no points, because they would take 123 GB. The small store is
complete.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from jepa3d.data.store import COLUMNS, FORMAT, Store, StoredPoints, StoreWriter
from jepa3d.training.loop import batch_index, epoch_order

PER_SHARD, POINTS = 2730, 2048  # clouds in a shard of 32 MiB in float16; points in a cloud


def make_index(path: Path, clouds: int) -> None:
    """Write store.json and the index of a store with `clouds` clouds, but no points."""
    (path / "index").mkdir(parents=True)
    for begin in range(0, clouds, 500_000):
        rows = np.arange(begin, min(begin + 500_000, clouds))
        values = {
            "end": (rows + 1) * POINTS,
            "label": rows % 40,
            "split": rows % 5 == 4,
            "key": rows,
            "content": rows,
            "key_end": (rows + 1) * 12,
            "up": rows * 0 + 2,
            "frame": np.eye(4)[rows * 0 + 3],
        }
        for name, (kind, _) in COLUMNS.items():
            with (path / "index" / f"{name}.bin").open("ab") as file:
                file.write(values[name].astype(kind).tobytes())
        with (path / "index" / "keys.bin").open("ab") as file:
            file.write("".join(f"{row:08d}.npy" for row in rows.tolist()).encode())
    counts = [min(PER_SHARD, clouds - at) for at in range(0, clouds, PER_SHARD)]
    shards = [
        {
            "file": f"points-{i:05d}.safetensors",
            "clouds": n,
            "points": n * POINTS,
            "sha256": "0" * 64,
            "index_crc32": 0,
        }
        for i, n in enumerate(counts)
    ]
    header = {"format": FORMAT, "complete": True, "settings": {"reduce": "fps"}, "shards": shards}
    header |= {"num_points": POINTS, "class_names": [str(i) for i in range(40)], "part_names": []}
    (path / "store.json").write_text(json.dumps(header))


def timed(action, rounds: int = 5) -> str:
    """Return the median milliseconds of an action, as text."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return f"{median(seconds) * 1e3:,.1f} ms"


def resident() -> float:
    """Return the MiB of this process, including memory-mapped pages that were read."""
    return psutil.Process().memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clouds", type=int, default=10_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        make_index(large, arguments.clouds)
        before = resident()
        print(
            f"| {arguments.clouds:,} clouds in {-(-arguments.clouds // PER_SHARD):,} shards | median of 5 |\n|---|---|"
        )
        print(f"| open | {timed(lambda: Store(large))} |")
        store = Store(large)
        print(
            f"| label and key of a cloud | {timed(lambda: (store.columns['label'][7_777], store.key(7_777)))} |"
        )
        print(f"| memory that opening takes | {resident() - before:,.0f} MiB |")
        train = np.flatnonzero(np.asarray(store.columns["split"]) == 0)
        points = StoredPoints(store, train, POINTS)
        sizes = points.shard_sizes
        print(
            f"| rows of the train split | {timed(lambda: np.flatnonzero(np.asarray(store.columns['split']) == 0), 3)} |"
        )
        print(
            f"| order of an epoch | {timed(lambda: epoch_order.__wrapped__(0, 1, len(train), sizes), 3)} |"
        )
        batch_index(0, 0, 128, len(train), sizes)
        step = iter(range(1, 100))
        print(
            f"| indices of a batch of 128 | {timed(lambda: batch_index(0, next(step), 128, len(train), sizes))} |"
        )
        print(f"| memory that all of this takes | {resident() - before:,.0f} MiB |")

        rng = np.random.default_rng(0)
        settings = {"points": POINTS, "reduce": "fps"}
        with StoreWriter(small, settings, (), ()) as writer:
            cloud = rng.normal(size=(POINTS, 3)).astype(np.float16)
            for i in range(20_000):
                row = {"label": None, "split": None, "up": "z", "frame": (0, 0, 0, 1), "content": i}
                writer.add(str(i), {"points": cloud}, **row)
        points = StoredPoints(Store(small), np.arange(20_000), 1024)
        batches = iter(rng.permutation(20_000).reshape(-1, 32))
        once = timed(lambda: points[next(batches)], 400)
        print(
            f"\nA batch of 32 clouds, 1,024 of their 2,048 points, of a real store of 20,000 (234 MiB): {once}"
        )


if __name__ == "__main__":
    main()
