"""A page to look at clouds with an encoder's eyes."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from jepa3d.cli.app import app


@app.command
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
