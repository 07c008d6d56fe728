"""Embed any number of clouds on a Ray cluster: a Parquet file a partition, and another of what failed there.

find /shared/scans -type f | sort | split --lines 10000 - lists/   # a partition is a file of absolute paths
python examples/ray_embed.py lists/ /shared/vectors                # run again, it does what is left
jepa3d search /shared/vectors scan.ply
"""

import shutil
import time
from pathlib import Path

import cyclopts
import pyarrow.parquet as pq
import ray

import jepa3d
from jepa3d.inference.vectors import write_apart
from jepa3d.locking import writing


def finished(part: Path, out: Path) -> bool:
    file = out / f"{part.name}.parquet"
    return file.exists() and file.stat().st_mtime >= part.stat().st_mtime


class EmbedPartition(jepa3d.Embedder):
    """An actor: takes a list, writes OUT/LIST.parquet and OUT/failed/LIST.parquet, returns how many rows they have."""

    def __call__(self, batch):
        part, out = Path(batch["part"][0]), Path(batch["out"][0])
        good, bad = out / f"{part.name}.parquet", out / "failed" / f"{part.name}.parquet"
        if not finished(part, out):  # or a node died just after it
            paths = dict.fromkeys(part.read_text(errors="surrogateescape").strip("\n").split("\n"))
            write_apart(super().__call__({"path": paths}), self.making, good)
        return batch | {"vectors": [pq.read_metadata(good).num_rows], "failed": [pq.read_metadata(bad).num_rows]}


def main(lists: Path, out: Path, *, model: str = "default", cpus: int = 1, gpus: float = 0) -> None:
    """Embed the partitions in LISTS that OUT lacks, by actors of so many cores and GPUs; all nodes see the folders."""
    begun, clouds, failed, out = time.time(), 0, 0, out.absolute()
    parts = sorted(file.absolute() for file in lists.iterdir())
    with writing(out):  # one command at a time
        [shutil.rmtree(partial) for partial in out.glob(".partial-*")]  # of killed actors
        left = [{"part": str(part), "out": str(out)} for part in parts if not finished(part, out)]
        print(f"{len(parts):,} partitions, {len(left):,} to do", flush=True)
        if left:
            ray.init(log_to_driver=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            actors = ray.data.ActorPoolStrategy(min_size=1, max_size=int(ray.cluster_resources()["CPU"]) // cpus)
            options = {"compute": actors, "num_cpus": cpus, "num_gpus": gpus, "batch_size": 1}
            given = {"model": str(Path(model).absolute()) if Path(model).exists() else model, "workers": cpus}
            rows = ray.data.from_items(left, override_num_blocks=len(left))
            rows = rows.map_batches(EmbedPartition, fn_constructor_kwargs=given, **options)
            for number, row in enumerate(rows.iter_rows(), 1):
                clouds, failed = clouds + row["vectors"] + row["failed"], failed + row["failed"]
                done = f"{Path(row['part']).name}: {row['vectors']:,} vectors, {row['failed']:,} failed"
                print(f"{done}; {number:,} of {len(left):,}, {clouds / (time.time() - begun):.0f}/s", flush=True)
        print(f"{out}: {clouds:,} clouds in {time.time() - begun:.0f} s, {failed:,} failed", flush=True)


cyclopts.run(main)
