"""Compare ways to search a million vectors: exact search in a Parquet file and in a memory-mapped
copy of it, LanceDB, and FAISS. Measure recall, latency, memory, disk space and the first answer.

    python benchmarks/search.py --store STORE              # a store of jepa3d prepare with some thousand shapes or more
    python benchmarks/search.py --store STORE --count 100000

The packaged encoder computes a vector of each shape in the store. The vectors of 200 shapes are the
queries. The million vectors to search are made from the other vectors: each is a random point
between two vectors that are close to each other, plus noise of a tenth of their distance. Each way
to search runs in its own process. The true neighbours are computed by numpy in float64. The column
CPU has the processor time of all threads per query, which other programs on the machine change less
than the wall-clock time. FAISS is included if faiss-cpu is installed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine

K, QUERIES = 10, 200
WAYS = (
    "jepa3d, Parquet",
    "jepa3d, mapped copy",
    "LanceDB, exact",
    "LanceDB, IVF_FLAT",
    "FAISS, Flat",
    "FAISS, IVF_FLAT",
)


def make(store: Path, count: int, folder: Path) -> None:
    """Write `count` vectors to folder/v.parquet and the queries to folder/q.npy."""
    import jepa3d
    from jepa3d.inference.spec import EmbeddingSpec
    from jepa3d.inference.vectors import ROWS, table, write
    from jepa3d.models.ready import fingerprint

    encoder = jepa3d.load()
    made, rng = jepa3d.embed(store, encoder), np.random.default_rng(0)
    queries, made = made[:QUERIES], made[QUERIES:]
    near = np.argsort(-(made @ made.T), 1)[:, 1:21]
    spec = EmbeddingSpec("default", fingerprint(encoder), -1, "mean_max", "z", made.shape[1])

    def tables():
        for at in range(0, count, ROWS):
            n = min(ROWS, count - at)
            one = rng.integers(0, len(made), n)
            two = near[one, rng.integers(0, 20, n)]
            step = made[two] - made[one]
            noise = (
                rng.normal(size=step.shape)
                * 0.1
                * np.linalg.norm(step, axis=1, keepdims=True)
                / step.shape[1] ** 0.5
            )
            names = [f"/shapes/{i:08d}.ply" for i in range(at, at + n)]
            rows = {"path": names, "label": [None] * n, "num_points": [1024] * n, "stamp": [0] * n}
            x = made[one] + rng.random((n, 1)) * step + noise
            yield table(spec, zip(*rows.values(), x, strict=True))

    write(tables(), folder / "v.parquet")
    np.save(folder / "q.npy", queries)


def vectors(folder: Path) -> np.ndarray:
    """Read all vectors into memory."""
    from jepa3d.inference.vectors import Vectors, to_numpy

    opened = Vectors(folder / "v.parquet")
    out = np.empty((len(opened), opened.spec.embed_dim), np.float32)
    at = 0
    for batch in opened.batches(["vector"]):
        out[at : at + len(batch)] = to_numpy(batch.column(0))
        at += len(batch)
    return out


def truth(folder: Path) -> None:
    """Compute the true K nearest neighbours of each query, and write them to folder/truth.npy."""
    x, queries = vectors(folder), np.load(folder / "q.npy").astype(np.float64)
    best = np.full((len(queries), K), -2.0), np.zeros((len(queries), K), np.int64)
    for at in range(0, len(x), 50_000):
        part = x[at : at + 50_000].astype(np.float64)
        cosine = queries @ (part / np.linalg.norm(part, axis=1, keepdims=True)).T
        cosine /= np.linalg.norm(queries, axis=1, keepdims=True)
        index = np.broadcast_to(np.arange(at, at + len(part)), cosine.shape)
        cosine, index = np.concatenate([best[0], cosine], 1), np.concatenate([best[1], index], 1)
        order = np.argsort(-cosine, 1)[:, :K]
        best = np.take_along_axis(cosine, order, 1), np.take_along_axis(index, order, 1)
    np.save(folder / "truth.npy", best[1])


def faiss_index(folder: Path, way: str) -> Path:
    return folder / f"{way[7:].lower()}.faiss"


def build(way: str, folder: Path) -> None:
    """Build the index of one way to search."""
    from jepa3d.inference.lance import VectorStore, create_or_update
    from jepa3d.inference.vectors import Vectors

    if way == "jepa3d, mapped copy":
        from jepa3d.inference.search import search

        search(folder / "v.parquet", np.load(folder / "q.npy")[0], K)
    elif way == "LanceDB, exact":
        create_or_update(Vectors(folder / "v.parquet"), folder / "v.lancedb")
    elif way == "LanceDB, IVF_FLAT":
        VectorStore(folder / "v.lancedb").build()
    elif way.startswith("FAISS"):
        import faiss

        x = vectors(folder)
        faiss.normalize_L2(x)
        index = faiss.IndexFlatIP(x.shape[1])
        if way == "FAISS, IVF_FLAT":
            index = faiss.IndexIVFFlat(
                index, x.shape[1], int(len(x) ** 0.5), faiss.METRIC_INNER_PRODUCT
            )
            index.train(x[:: max(1, len(x) // 100_000)].copy())
        index.add(x)
        faiss.write_index(index, str(faiss_index(folder, way)))


def ask(way: str, folder: Path, probes: int) -> None:
    """Search for all queries, and print JSON: the seconds from the start to the first answer, the
    milliseconds of later answers, the recall and the peak memory.
    """
    queries, known = np.load(folder / "q.npy"), np.load(folder / "truth.npy")
    start = time.perf_counter()
    if way.startswith("FAISS"):
        import faiss

        index = faiss.read_index(str(faiss_index(folder, way)))
        if "IVF" in way:
            index.nprobe = probes
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)

        def find(i: int) -> list[int]:
            return index.search(unit[i : i + 1].astype(np.float32), K)[1][0].tolist()
    else:
        from jepa3d.inference import search as mapped
        from jepa3d.inference.search import search

        path = folder / ("v.parquet" if "jepa3d" in way else "v.lancedb")
        if way == "jepa3d, Parquet":
            mapped.WORTH = 10**9

        def find(i: int) -> list[int]:
            hits = search(path, queries[i], K, probes=probes if "IVF" in way else None)[0]
            return [int(Path(hit.path).stem) for hit in hits]

    count = 20 if way in ("jepa3d, Parquet", "LanceDB, exact") else QUERIES
    times, right = [], 0
    for i in range(count):
        begun = time.perf_counter()
        right += len(set(find(i)) & set(known[i].tolist()))
        times.append(time.perf_counter() - begun)
        if i == 0:
            first, used = time.perf_counter() - start, time.process_time()
    used = (time.process_time() - used) / (count - 1) * 1000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    low, high = np.percentile(times[1:], [50, 95]) * 1000
    found = {
        "first": first,
        "p50": low,
        "p95": high,
        "cpu": used,
        "recall": right / (K * count),
        "peak": peak,
    }
    print(json.dumps(found))


def size(path: Path) -> float:
    """Return the size of a file or folder in MB."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--probes", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        name, folder, *rest = options.role
        if name == "make":
            make(options.store, options.count, Path(folder))
        elif name == "truth":
            truth(Path(folder))
        elif name == "build":
            build(rest[0], Path(folder))
        else:
            ask(rest[0], Path(folder), int(rest[1]))
        return

    def run(*role: str) -> tuple[str, float]:
        command = [
            sys.executable,
            __file__,
            "--store",
            str(options.store),
            "--count",
            str(options.count),
        ]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--role", *role], check=True, capture_output=True, text=True
        )
        return done.stdout, time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        run("make", folder)
        run("truth", folder)
        print(f"{options.count:,} vectors: {machine()}; recall@{K} and times of single queries\n")
        print(
            "| | build, s | disk, MB | first answer, s | p50, ms | p95, ms | CPU, ms | recall@10 | peak RSS, MiB |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for way in options.ways:
            try:
                _, built = run("build", folder, way)
            except subprocess.CalledProcessError as error:
                print(f"| {way} | {error.stderr.strip().splitlines()[-1]} | | | | | | |")
                continue
            path = Path(folder) / ("v.parquet" if way == "jepa3d, Parquet" else "v.lancedb")
            path = Path(folder) / "v.parquet.arrow" if "mapped" in way else path
            path = faiss_index(Path(folder), way) if "FAISS" in way else path
            for probes in options.probes if "IVF" in way else [0]:
                r = json.loads(run("ask", folder, way, str(probes))[0].splitlines()[-1])
                name = f"{way}, {probes} probes" if probes else way
                took = "-" if way == "jepa3d, Parquet" else f"{built:.0f}"
                print(
                    f"| {name} | {took} | {size(path):,.0f} | {r['first']:.2f} | {r['p50']:.1f} | "
                    f"{r['p95']:.1f} | {r['cpu']:.1f} | {r['recall']:.3f} | {r['peak']:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
