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
    """Compute a vector for each cloud and write the vectors to Parquet files. If repeated, the
    command computes only the vectors of new and changed clouds.

    Parameters
    ----------
    paths: list[Path]
        Files, folders of files, or stores of jepa3d prepare.
    out: Path
        A .parquet file; or a folder that gets one file per --share, for tens of millions of clouds
        on many machines.
    model: str
        The folder of a run or an encoder, or a Hub id; by default the encoder in the package.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF files define their own. Or none, for vectors
        that are the same however a cloud is rotated; this lowers accuracy and takes twelve times as
        long.
    layer: int
        The layer whose tokens are used: 0 (tokenizer) to the encoder's depth, or -1 for the last.
    pooling: str
        How tokens are pooled to one vector: mean_max, mean or max.
    workers: int
        Number of processes; 0 means one per core, or fewer if there are few clouds to embed.
    share: str
        i/n, such as 2/8, if n commands write to one folder: this command embeds the i-th of n
        shares of the clouds.
    prune: bool
        Also delete the vectors of two kinds of clouds: those whose paths lie inside PATHS but are
        no longer found there, and those outside PATHS whose files no longer exist.
    keep_strays: bool
        Keep stray points, which have hardly any neighbours. By default they are removed.
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
    """Add vectors to a LanceDB store, which can hold millions; delete vectors; build an index.

    Parameters
    ----------
    vectors: Path
        The output of jepa3d embed; a vector replaces a stored vector of the same path. Or the store
        itself, if you only want to --delete or build an index (--ann).
    out: Path
        The store: a folder whose name ends in .lancedb. If it exists, its vectors must come from
        the same encoder.
    delete: tuple[str, ...]
        Conditions in quotes, as for jepa3d search --where. Vectors that meet all of them are
        deleted.
    ann: bool
        Build an index for jepa3d search --probes, which is faster than the exact search, but
        approximate.
    """
    from jepa3d.inference.hits import Condition
    from jepa3d.inference.lance import VectorStore, create_or_update
    from jepa3d.inference.vectors import Vectors
    from jepa3d.locking import writing

    conditions = [Condition.parse(text) for text in delete]
    with writing(out):
        if vectors.resolve() != out.resolve():
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
    """Find the shapes whose vectors have the largest cosine with the vector of a query.

    Parameters
    ----------
    where_in: Path
        The output of jepa3d embed or jepa3d index.
    queries: list[str]
        Clouds, meshes, folders of clouds and meshes, FILE#ROW for one cloud of a file of many
        clouds, STORE#KEY for a cloud of a store, or a .npy file of vectors.
    k: int
        Number of neighbours per query.
    where: tuple[str, ...]
        Conditions in quotes, such as 'label=cup' 'num_points>=5000' 'path~chairs/*'. A neighbour
        must meet all of them. The operators are = != < <= > >= and ~ (matches a pattern with * and
        ?).
    min_cosine: float
        Leave out neighbours whose cosine is lower than this.
    include_self: bool
        If the vector of a query is in the index, it may be one of the query's own neighbours.
    probes: int
        Search only this many partitions of a store that has an index (jepa3d index --ann). This is
        faster but approximate; by default, the search is exact.
    model: str
        Path of the encoder that computed the vectors, if it was moved.
    json: bool
        Print one line of JSON per query.
    html: Path
        An HTML file to write, with pictures of the queries and their neighbours.
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
    """Cluster unlabelled clouds; once you have named some, train a classifier and label all of them.

    Parameters
    ----------
    paths: list[Path]
        Files, folders of files, or stores.
    out: Path
        The folder to write: clusters.html, names.csv, labels.csv and the classifier.
    model: str
        The folder of a run or an encoder, or a Hub id; by default the encoder in the package.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF files define their own.
    clusters: int
        Number of clusters; by default the square root of half the number of clouds, but at most 40.
    names: Path
        A CSV file with the columns path and name. By default, names are read from OUT/names.csv.
        The first run writes this file for you to fill in; in a terminal, it also asks for names.
    unknown: bool
        Label a cloud "unknown" if it resembles no named cloud. About one in 20 clouds that do
        belong to a named class wrongly gets this label too.
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
    up_axis: str | None = None,
    dtype: str = "float32",
) -> None:
    """Compute a feature vector for every point of a large cloud, tile by tile, in bounded memory.

    Parameters
    ----------
    scan: Path
        A LAS, LAZ, PLY, PTX or NPY file, or a table (XYZ, TXT, CSV, PTS, ASC), of any size. Files
        of other formats must fit into memory.
    out: Path
        The file to write. .ply, .las or .laz: the scan's points in their order, with colours that
        show the features. .parquet: the features themselves.
    model: str
        The folder of a run or an encoder, or a Hub id; by default the encoder in the package.
    tile: float
        Side of a tile in the scan's unit, for example the size of the objects of interest. By
        default, it is chosen so that tiles have enough points.
    up_axis: str
        The scan's up axis: x, y or z; by default y for glTF files and z for all others.
    dtype: str
        Number type of the features in a .parquet file: float32 or float16.
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
    """Show clouds on a local web page, with several ways to colour their points: by height, by
    tokens, by similarity to a clicked point, or by sampled context and targets.

    Parameters
    ----------
    paths: list[Path]
        Clouds, meshes, folders of clouds and meshes, FILE#ROW for one cloud of a file of many
        clouds, or stores of jepa3d prepare.
    model: str
        The folder of a run or an encoder, or a Hub id. By default, the encoder that computed the
        vectors of the index; without an index, the encoder in the package.
    index: Path
        The output of jepa3d embed or jepa3d index. The page then also shows the nearest shapes.
    port: int
        Port of the page; 0 means any free port. Only this machine can open the page.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF files define their own.
    """
    from jepa3d.inference.view import open_page, serve_until_stopped

    serve_until_stopped(open_page(paths, model, index, port, up_axis).server)


def export(model: str = "default", /, *, out: Path) -> None:
    """Write a model as ONNX, torch.export program and Hub folder, for use without this package, and
    check that the written files give the same results as the model.

    Parameters
    ----------
    model: str
        The folder of a run, an encoder or a classifier, or a Hub id; by default the encoder in the
        package.
    out: Path
        The folder to write; it must not exist yet.
    """
    from jepa3d.inference.export import export as write

    write(model, out)
    print(f"written: {out}, {', '.join(sorted(file.name for file in out.iterdir()))}")
