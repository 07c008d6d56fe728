"""What a run was and gave, to be read and passed on: report."""

from pathlib import Path

from jepa3d.cli.app import app


@app.command
def report(
    run: Path, /, *, data: str | None = None, out: Path | None = None, figures: Path | None = None
) -> None:
    """Write a run as one HTML file: results, curves, figures, settings, cost; it opens anywhere,
    without a network.

    Parameters
    ----------
    run: Path
        A folder of pretrain, classify, segment or fewshot.
    data: str
        Where the run's data is now, for the pictures that need it; where it was by default.
    out: Path
        The file; report.html in the run by default.
    figures: Path
        A folder to write the pictures to as well, as PNG files.
    """
    from jepa3d.report import report as write

    print(f"written: {write(run, data, out, figures)}")
