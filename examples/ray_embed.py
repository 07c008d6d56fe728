"""Embeds any number of clouds on a Ray cluster: writes a Parquet file per partition, with an error
instead of a vector for each cloud that failed.

find /shared/scans -type f | sort | split --lines 10000 - lists/   # a partition is a file of absolute paths
python examples/ray_embed.py lists/ /shared/vectors                # run again, it embeds what is missing
jepa3d search /shared/vectors scan.ply
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import cyclopts
import pyarrow.parquet as pq
import ray

import jepa3d
from jepa3d.inference.vectors import write
from jepa3d.locking import writing


def finished(part: Path, file: Path) -> bool:
    """Return whether the file of a partition exists and is newer than its list of paths."""
    return file.exists() and file.stat().st_mtime >= part.stat().st_mtime


class EmbedPartition(jepa3d.Embedder):
    """An actor that embeds the paths of a list into a file. Returns how many rows have a vector,
    and how many failed.
    """

    def __call__(self, batch):
        part, file = Path(batch["part"][0]), Path(batch["file"][0])
        if not finished(part, file):  # Ray repeats a task if a node dies just after writing
            paths = part.read_text(errors="surrogateescape").strip("\n").split("\n")
            with TemporaryDirectory(
                prefix=".partial-", dir=file.parent
            ) as mine:  # its own folder: an actor that Ray gave up may still be writing
                write([super().__call__({"path": paths})], Path(mine, "new"))
                Path(mine, "new").replace(file)
        errors = pq.read_table(file, columns=["error"])["error"]
        return batch | {"vectors": [errors.null_count], "failed": [len(errors) - errors.null_count]}


def main(lists: Path, out: Path, *, model: str = "default", cpus: int = 1, gpus: float = 0) -> None:
    """Embed the partitions in LISTS that OUT lacks. cpus and gpus: those of one actor. All nodes
    must see both folders.
    """
    clouds, failed, out = 0, 0, out.absolute()
    files = {part.absolute(): out / f"{part.name}.parquet" for part in sorted(lists.iterdir())}
    with writing(out):  # only one command at a time may write there
        [shutil.rmtree(partial) for partial in out.glob(".partial-*")]  # left by killed actors
        left = [
            {"part": str(part), "file": str(file)}
            for part, file in files.items()
            if not finished(part, file)
        ]
        print(f"{len(files):,} partitions, {len(left):,} to do", flush=True)
        if left:
            out.mkdir(exist_ok=True)
            ray.init(log_to_driver=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            options = {
                "num_cpus": cpus,
                "num_gpus": gpus,
                "batch_size": 1,
            }  # Ray starts as many actors as there is room for
            given = {
                "model": str(Path(model).absolute()) if Path(model).exists() else model,
                "workers": cpus,
            }
            done = ray.data.from_items(left, override_num_blocks=len(left))
            for row in done.map_batches(
                EmbedPartition, fn_constructor_kwargs=given, **options
            ).iter_rows():
                clouds, failed = clouds + row["vectors"] + row["failed"], failed + row["failed"]
                print(
                    f"{row['file']}: {row['vectors']} vectors, {row['failed']} failed; {clouds:,} done",
                    flush=True,
                )
        print(f"{out}: {clouds:,} clouds done, {failed:,} of them failed", flush=True)


cyclopts.run(main)
