"""What an encoder is for: embed, index, search, label, scene, view, export."""

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
    """Turn clouds into vectors, kept in Parquet; run again, it adds what is new or changed.

    Parameters
    ----------
    paths: list[Path]
        Files, folders of files, or stores of jepa3d prepare.
    out: Path
        A .parquet file; or a folder of one a share (for many machines and tens of millions of
        clouds).
    model: str
        The folder of a run or an encoder, or a Hub id; the encoder of the package by default.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF know their own. Or none: vectors that are the
        same however a cloud is turned, which tell less and cost twelve times as much.
    layer: int
        Of the encoder: 0 (tokenizer) to its depth, or -1, the last.
    pooling: str
        Of tokens to one vector: mean_max, mean or max.
    workers: int
        Processes; 0: one a core, fewer for few files.
    share: str
        i/n: of n commands that fill one folder, the one that does every n-th cloud from the i-th.
    prune: bool
        Forget what is no longer at PATHS, and files that are gone.
    keep_strays: bool
        Also encode points that lie where hardly any other does, which are left out otherwise.
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
    """Put vectors into a store for millions: rows of the same path are replaced; delete some; or
    index it.

    Parameters
    ----------
    vectors: Path
        What jepa3d embed wrote; or the store itself, to delete from it or index it.
    out: Path
        The store, a folder whose name ends in .lancedb; new or of the same encoder.
    delete: tuple[str, ...]
        Conditions as of search --where, in quotes; rows for which all hold are deleted.
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
    """Find the shapes most like a query, by the cosine of their vectors; exact unless told
    otherwise.

    Parameters
    ----------
    where_in: Path
        What jepa3d embed or index wrote.
    queries: list[str]
        Clouds, meshes, folders of them, FILE#ROW of a file of many, STORE#KEY of a store, or a .npy
        of vectors.
    k: int
        Neighbours of each.
    where: tuple[str, ...]
        Conditions that all must hold, in quotes: 'label=cup' 'path~*/train/*' 'num_points>=5000' (=
        != < <= > >= ~).
    min_cosine: float
        Leave out what is less like it.
    include_self: bool
        Keep the query's own file among its neighbours.
    probes: int
        Approximate search of that many partitions of a store that was indexed by jepa3d index
        --ann.
    model: str
        Where the encoder of the index lies now, if it moved.
    json: bool
        A line of JSON a query.
    html: Path
        A page with pictures of the queries and their neighbours.
    """
    from jepa3d.inference import neighbours
    from jepa3d.inference import search as searching

    pairs, found = neighbours.random_cosines(where_in), []
    written = neighbours.to_json if json else neighbours.to_text
    for query in queries:
        names, vectors = searching.query_vectors(where_in, query, model)
        exclude = None if include_self else names
        hits = searching.search(where_in, vectors, k, where, exclude, probes)
        near = [[hit for hit in some if hit.cosine >= min_cosine] for some in hits]
        found += zip(names, near, strict=True)
        for name, some in zip(names, near, strict=True):
            print(written(name, some, pairs))
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
    """From unlabelled clouds to a classifier: clusters, names for a few of them, and a label for
    every cloud.

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
        How many to propose; by default the square root of half the clouds, at most 40.
    names: Path
        A CSV of columns path and name; by default OUT/names.csv, once you filled it in. In a
        terminal you are asked.
    unknown: bool
        Call clouds that are unlike every named one unknown; of the named classes one in 20 is,
        wrongly.
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
    """Give every point of a large cloud a feature, by overlapping tiles; memory stays bounded.

    Parameters
    ----------
    scan: Path
        LAS, LAZ, PLY, NPY or a table (XYZ, TXT, CSV, PTS) of any size; other clouds where they fit
        into memory.
    out: Path
        .ply, .las or .laz: features as colours, in the order of the scan. .parquet: the features
        themselves.
    model: str
        The folder of a run or an encoder, or a Hub id; the encoder of the package by default.
    tile: float
        Side of a tile in the scan's unit, as large as the objects of interest; by default as many
        points need.
    up_axis: str
        The scan's up axis: x, y or z.
    dtype: str
        Of the features in .parquet: float32 or float16.
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
    """Show clouds on a local web page: coloured by height, tokens, similarity to a click, or a
    pretraining sample.

    Parameters
    ----------
    paths: list[Path]
        Clouds, meshes, folders of them, FILE#ROW of a file of many, or stores of jepa3d prepare.
    model: str
        The folder of a run or an encoder, or a Hub id; by default that of the index, without one
        "default".
    index: Path
        What jepa3d embed or index wrote: the nearest shapes are shown beside.
    port: int
        Of the page, which only this machine can open; 0: any that is free.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF know their own.
    """
    from jepa3d.inference.view import open_page, serve_until_stopped

    serve_until_stopped(open_page(paths, model, index, port, up_axis).server)


def export(model: str = "default", /, *, out: Path) -> None:
    """Write a model for use without this package: ONNX, torch.export, and a folder ready for the
    Hub; all checked.

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
