"""Commands of exporting."""

from pathlib import Path

from jepa3d.cli.app import app


@app.command
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
