"""Commands that use an encoder: embed, index, search, label, scene, view, export."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def embed(
    paths: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path,
    model: str = "default",
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
    workers: int = 0,
    share: str = "1/1",
    prune: Annotated[bool, Parameter(negative=())] = False,
    keep_strays: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Turn clouds into vectors in Parquet files; run again, it adds what is new or changed.

    Parameters
    ----------
    paths: list[Path]
        Files, folders of files, or stores of jepa3d prepare.
    out: Path
        A .parquet file; or a folder with one file per share (for many machines and tens of millions
        of clouds).
    model: str
        The folder of a run or an encoder, or a Hub id; the encoder of the package by default.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF know their own. Or none, for vectors that are
        the same however a cloud is rotated; this lowers accuracy and takes twelve times as long.
    layer: int
        Layer of the encoder: 0 (tokenizer) to its depth, or -1 for the last.
    pooling: str
        How tokens are pooled to one vector: mean_max, mean or max.
    workers: int
        Number of processes; 0 means one per core, and fewer for few files.
    share: str
        i/n, if n commands fill one folder: this command embeds the i-th of n shares of the clouds.
    prune: bool
        Delete the vectors of clouds that are no longer at PATHS, or whose files are gone.
    keep_strays: bool
        Also encode stray points, which have hardly any neighbours; otherwise they are removed.
    """
    from jepa3d.inference.embed_files import embed_files

    embed_files(paths, out, model, up_axis, layer, pooling, workers, share, prune, keep_strays)


def index(
    vectors: Path,
    /,
    *,
    out: Path,
    delete: tuple[str, ...] = (),
    ann: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Add vectors to a store for millions of them, replacing rows of the same path; or delete rows,
    or build an index.

    Parameters
    ----------
    vectors: Path
        What jepa3d embed wrote; or the store itself, for --delete or --ann alone.
    out: Path
        The store: a folder whose name ends in .lancedb, new or made with the same encoder.
    delete: tuple[str, ...]
        Conditions as for search --where, in quotes; rows that meet all of them are deleted.
    ann: bool
        Build an index for approximate search (jepa3d search --probes).
    """
    from jepa3d.inference.hits import Condition
    from jepa3d.inference.lance import VectorStore, create_or_update
    from jepa3d.inference.vectors import Vectors
    from jepa3d.locking import writing

    conditions = [Condition.parse(text) for text in delete]
    with writing(out):
        if vectors != out:
            new, old = create_or_update(Vectors(vectors), out)
            print(f"{out}: {new:,} new, {old:,} replaced")
        store = VectorStore(out)
        if conditions:
            print(f"{out}: {store.delete(conditions):,} deleted")
        if ann:
            store.build()
        print(f"{out}: {len(store):,} vectors{', indexed' if store.indexed else ''}")


def search(
    where_in: Annotated[Path, Parameter(name="INDEX")],
    queries: Annotated[list[str], Parameter(negative=())],
    /,
    *,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = 10,
    where: tuple[str, ...] = (),
    min_cosine: float = -1.0,
    include_self: Annotated[bool, Parameter(negative=())] = False,
    probes: int | None = None,
    model: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    html: Path | None = None,
) -> None:
    """Find the shapes nearest to a query, by the cosine of their vectors; exact, unless --probes is
    given.

    Parameters
    ----------
    where_in: Path
        What jepa3d embed or jepa3d index wrote.
    queries: list[str]
        Clouds, meshes, folders of them, FILE#ROW for a row of a file of many clouds, STORE#KEY for
        a cloud of a store, or a .npy file of vectors.
    k: int
        Number of neighbours per query.
    where: tuple[str, ...]
        Conditions that must all hold, in quotes: 'label=cup' 'path~*/train/*' 'num_points>=5000'
        (operators = != < <= > >= ~).
    min_cosine: float
        Leave out neighbours with a lower cosine.
    include_self: bool
        List the query's own file among its neighbours.
    probes: int
        Search approximately, in this many partitions of a store that has an index (jepa3d index
        --ann).
    model: str
        Path of the index's encoder, if it has moved.
    json: bool
        Print one line of JSON per query.
    html: Path
        Also write a page with pictures of the queries and their neighbours.
    """
    from jepa3d.inference import neighbours
    from jepa3d.inference import search as searching

    pairs, found = neighbours.random_cosines(where_in), []
    formatted = neighbours.to_json if json else neighbours.to_text
    for query in queries:
        names, vectors = searching.query_vectors(where_in, query, model)
        exclude = None if include_self else names
        hits = searching.search(where_in, vectors, k, where, exclude, probes)
        near = [[hit for hit in ranked if hit.cosine >= min_cosine] for ranked in hits]
        found += zip(names, near, strict=True)
        for name, ranked in zip(names, near, strict=True):
            print(formatted(name, ranked, pairs))
    if html is not None:
        neighbours.write_page(found, where_in, pairs, html)
        print(f"written: {html}", file=sys.stderr)


def label(
    paths: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path,
    model: str = "default",
    up_axis: str = "z",
    clusters: int | None = None,
    names: Path | None = None,
    unknown: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Turn unlabelled clouds into a classifier: cluster them, name a few, and label every cloud.

    Parameters
    ----------
    paths: list[Path]
        Files, folders of files, or stores.
    out: Path
        A folder for clusters.html, names.csv, labels.csv and the model.
    model: str
        The folder of a run or an encoder, or a Hub id; the encoder of the package by default.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF know their own.
    clusters: int
        Number of clusters; by default the square root of half the number of clouds, at most 40.
    names: Path
        A CSV file with the columns path and name; by default OUT/names.csv, once you have filled it
        in. In a terminal, you are asked for names.
    unknown: bool
        Label clouds that resemble no named cloud "unknown"; this also happens, wrongly, to one in
        20 clouds of the named classes.
    """
    from jepa3d.inference.label import label as run
    from jepa3d.locking import writing

    with writing(out):
        run(paths, out, model, up_axis, clusters, names, unknown)


def scene(
    scan: Path,
    /,
    *,
    out: Path,
    model: str = "default",
    tile: float | None = None,
    up_axis: str = "z",
    dtype: str = "float32",
) -> None:
    """Compute a feature for every point of a large cloud, from overlapping tiles, in bounded
    memory.

    Parameters
    ----------
    scan: Path
        LAS, LAZ, PLY, NPY or a table (XYZ, TXT, CSV, PTS) of any size; other formats if they fit
        into memory.
    out: Path
        .ply, .las or .laz: the features as colours, in the order of the scan. .parquet: the
        features themselves.
    model: str
        The folder of a run or an encoder, or a Hub id; the encoder of the package by default.
    tile: float
        Side of a tile in the scan's unit, such as the size of the objects of interest; by default
        chosen so that tiles have enough points.
    up_axis: str
        The scan's up axis: x, y or z.
    dtype: str
        Number type of the features in .parquet: float32 or float16.
    """
    from jepa3d.inference.scene import write_features

    write_features(scan, out, model, tile, up_axis, dtype)


def view(
    paths: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    model: str | None = None,
    index: Path | None = None,
    port: int = 8080,
    up_axis: str = "z",
) -> None:
    """Show clouds on a local web page, coloured by height, tokens, similarity to a clicked point,
    or a pretraining sample.

    Parameters
    ----------
    paths: list[Path]
        Clouds, meshes, folders of them, FILE#ROW for a row of a file of many clouds, or stores of
        jepa3d prepare.
    model: str
        The folder of a run or an encoder, or a Hub id; by default the encoder of the index, or
        without an index that of the package.
    index: Path
        What jepa3d embed or jepa3d index wrote; the nearest shapes in it are shown too.
    port: int
        Port of the page, which only this machine can open; 0 means any free port.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF know their own.
    """
    from jepa3d.inference.view import open_page, serve_until_stopped

    serve_until_stopped(open_page(paths, model, index, port, up_axis).server)


def export(model: str = "default", /, *, out: Path) -> None:
    """Write a model for use without this package, as ONNX, torch.export program and Hub folder;
    each is compared with torch.

    Parameters
    ----------
    model: str
        The folder of a run, an encoder or a classifier, or a Hub id; the encoder of the package by
        default.
    out: Path
        A new folder.
    """
    from jepa3d.inference.export import export as write

    write(model, out)
    print(f"written: {out}, {', '.join(sorted(file.name for file in out.iterdir()))}")
