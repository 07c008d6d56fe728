"""Large scenes: a feature for every point."""

from pathlib import Path

from jepa3d.cli.app import app


@app.command
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
