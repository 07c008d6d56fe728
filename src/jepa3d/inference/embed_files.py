"""`jepa3d embed`: compute the vectors of clouds on all cores and write them to Parquet. A later
call computes only the vectors of new and changed clouds.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import because
from jepa3d.data.parallel import mapped
from jepa3d.data.store import hash64
from jepa3d.inference import embedding
from jepa3d.inference.clouds import Address, Item, find_clouds, log_left_out, spelled
from jepa3d.inference.embedding import Embedded, Embedder, as_row
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.inference.vectors import Vectors, table, update, write
from jepa3d.locking import writing
from jepa3d.plain import log

COMMIT_SECONDS = 60.0  # smallest number of seconds between two writes of the file


def embed_files(
    paths: list[Path],
    out: Path,
    model: str = "default",
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
    workers: int = 0,
    share: str = "1/1",
    prune: bool = False,
    keep_strays: bool = False,
) -> Counter[str]:
    """Embed every new or changed cloud at `paths` into `out`: a .parquet file, or a folder with one
    file per share.

    If a call was interrupted, the same call continues it. model, up_axis, layer, pooling,
    keep_strays: as for `jepa3d embed`. workers: number of processes; 0 for one per core, but fewer
    if there are few clouds. share: "2/4" is the second of four calls that together fill one folder.
    prune: delete the vectors of clouds inside `paths` that are no longer found there, and of clouds
    outside `paths` whose files no longer exist.

    Returns the numbers of clouds that are new, changed, unchanged, forgotten (deleted by `prune`)
    and left out, and the number of NaN points (`unseen`). These numbers are also logged, and so is
    every cloud that cannot be used.

    Raises ValueError for wrong settings, for settings other than those of the vectors in `out`, or
    if another command is writing to `out`. Raises ReadError if a path has no clouds (except for an
    empty folder with `prune`), if no cloud can be used and `out` had no vectors before, or if a
    file in `out` is not a file of vectors.
    """
    files, shares = _share_files(out, share)
    if workers < 0:
        raise ValueError(f"--workers {workers}: give 1 or more, or 0 for one per core")
    embedder = Embedder(model, up_axis, layer, pooling, keep_strays=keep_strays)
    # With `prune` a folder may be empty: all its vectors are then deleted.
    emptied = [path for path in paths if prune and path.is_dir()]
    found, skipped = find_clouds(*paths, optional=emptied)
    log_left_out(skipped)
    items = {item.path: item for item in found}
    counts = Counter({"left out": len(skipped)})
    roots = {os.path.abspath(path) for path in paths}
    inside = tuple(spelled(f"{root}/") for root in roots)
    with ExitStack() as locks:
        for file in files.values():
            locks.enter_context(writing(file))
        for number, file in files.items():
            known: dict[str, int] = {}
            if file.exists():
                vectors = Vectors(file, may_be_empty=True)
                embedder.spec.check(vectors.spec, file)
                stamps = vectors.column("stamp")
                known = dict(zip(vectors.column("path"), stamps, strict=True))
            # The file is written even if this share has no clouds, since the file's name records
            # the number of shares.
            elif shares > 1:
                write([table(embedder.spec, [])], file)
            part = [x for x in found if hash64(x.path.encode()) % shares == number - 1]
            todo = [item for item in part if known.get(item.path) != item.stamp]
            gone = known.keys() - items.keys() if prune else set()
            gone = {x for x in gone if x.startswith(inside) or _file_of(x) in (None, *roots)}
            counts.update(known=len(known), tried=len(todo), forgotten=len(gone))
            counts["unchanged"] += len(part) - len(todo)
            # Starting a process takes seconds, so every process must get a few batches of work.
            batch, module = embedding.BATCH, embedding.__name__
            useful = min(os.cpu_count() or 1, max(1, len(todo) // (4 * batch)))
            work = embedder.work, todo, batch, workers or useful, "embedding", module
            finished = embedder.finish(result for _, result in mapped(*work))
            results = zip(todo, finished, strict=True)
            _collect(results, file, embedder.spec, known.keys(), gone, counts)
    if counts["tried"] and not counts["known"] + counts["new"]:
        raise ReadError(f"{paths[0]}: none of the clouds can be used")
    names = ["new", "changed", "unchanged"] + ["forgotten"] * bool(counts["forgotten"])
    done = ", ".join(f"{counts[name]:,} {name}" for name in names)
    unseen = f"; {counts['unseen']:,} points that are NaN were left out"
    done += f"; left out {counts['left out']:,}{unseen if counts['unseen'] else ''}"
    log.info(f"{out}: {done}")
    return counts


def _file_of(path: str) -> str | None:
    """Return the file or store that holds the cloud at an address; None if it no longer exists."""
    address = Address.parse(path)
    return None if address is None else address.file


def _share_files(out: Path, share: str) -> tuple[dict[int, Path], int]:
    """Return the files that this call writes, as a dict from share number to file, and the number
    of shares.

    Raises ValueError if `share` or `out` cannot be used.
    """
    first, _, of = share.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise ValueError(f"--share {share}: give i/n, such as 2/4 for share 2 of 4")
    number, shares = int(first), int(of)
    if out.suffix == ".parquet":
        if shares > 1:
            raise ValueError(f"--share {share}: needs a folder as --out, not a file")
        if out.is_dir():
            raise ValueError(f"{out}: is a folder, not a file; choose another --out")
        return {1: out}, 1
    if out.suffix or out.is_file():
        allowed = "give a .parquet file, or a folder whose name has no dot"
        raise ValueError(f"--out {out}: {allowed}; for .lancedb, see jepa3d index")
    begun = {shares} if shares > 1 else set()
    for file in out.glob("*.parquet"):
        if not (part := re.fullmatch(r"part-\d+of(\d+)\.parquet", file.name)):
            raise ValueError(f"{file}: not written by embed; choose another --out")
        begun.add(int(part[1]))
    if len(begun) > 1:
        found = f"{out} has {min(begun - {shares})} shares"
        raise ValueError(f"--share {share}: {found}, so give that number after the /")
    total = min(begun, default=1)
    # Without --share, this call computes all shares of the folder, one after another.
    numbers = [number] if shares > 1 else range(1, total + 1)
    return {i: out / f"part-{i}of{total}.parquet" for i in numbers}, total


def _collect(
    results: Iterator[tuple[Item, Embedded | str]],
    file: Path,
    spec: EmbeddingSpec,
    known: Iterable[str],
    gone: set[str],
    counts: Counter[str],
) -> None:
    """Write results to a file at intervals and at the end, even if the run is interrupted.

    known: paths that are already in the file. gone: paths whose rows are to be deleted. counts: the
    counts of `embed_files`, to which the results are added. Each write rewrites the whole file. To
    limit this cost, the time from one write to the next is at least `COMMIT_SECONDS`, and at least
    ten times as long as the first of the two took. The write at the end does not wait.
    """
    rows: list[tuple] = []
    due = time.monotonic() + COMMIT_SECONDS

    def commit() -> float:
        begun = time.monotonic()
        if rows or gone:
            update(file, table(spec, rows), gone)
            rows.clear()
            gone.clear()
        ended = time.monotonic()
        return ended + max(COMMIT_SECONDS, 10 * (ended - begun))

    try:
        for item, result in results:
            if isinstance(result, str):
                dropped = item.path in known
                note = "; its former vector is dropped" if dropped else ""
                log.info(f"left out: {because(item.path, result)}{note}")
                gone.update([item.path] if dropped else [])
                counts["left out"] += 1
                continue
            rows.append(as_row(item, result))
            counts["changed" if item.path in known else "new"] += 1
            counts["unseen"] += result.unseen
            if time.monotonic() > due:
                due = commit()
    except KeyboardInterrupt:
        done = f"stopped after {counts['new'] + counts['changed']:,} new vectors, which are saved"
        raise KeyboardInterrupt(f"{done}; repeat the command to continue") from None
    finally:
        commit()
