"""Commands that prepare data and pretrain encoders: prepare, pretrain, demo, info."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from jepa3d.config import PretrainConfig

_DEFAULT = PretrainConfig()


@contextmanager
def going_on_with(command: str) -> Iterator[None]:
    """Add the command that continues the run to the message of an interrupted run."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):  # nothing was saved, so nothing can be continued
            raise
        raise KeyboardInterrupt(f"{stop}; continue with{command}") from None


def prepare(
    source: Path,
    /,
    *,
    out: Path,
    points: int | Literal["all"] = 2048,
    reduce: Literal["fps", "random", "voxel"] = "fps",
    short: Literal["skip", "repeat"] = "repeat",
    up_axis: Literal["x", "y", "z"] | None = None,
    unit: str | None = None,
    split: str = "folder",
    keep: tuple[Literal["normals", "colors", "parts"], ...] = (),
    precision: Literal["float32", "float16"] = "float32",
    variant: str | None = None,
    columns: tuple[str, ...] | None = None,
    seed: int = 0,
    keep_strays: Annotated[bool, Parameter(negative=())] = False,
    reader: str | None = None,
    workers: int = 0,
    strict: bool = False,
) -> None:
    """Convert the download of a benchmark, or your own files, to a store, which all other commands
    read on demand.

    If it was interrupted, repeat the command to continue; run later, it adds new files.

    Parameters
    ----------
    source: Path
        A folder, a single file, or an archive (.zip, .tar.*); docs/data.md lists formats and
        benchmarks.
    out: Path
        The store: a new folder, or a store begun with the same settings.
    points: int
        Points per cloud, or all. Meshes are sampled by area (8,192 points if all are kept).
    reduce: str
        How larger clouds are reduced: fps (then any first points are a sample too), random, or
        voxel (even, in linear time).
    short: str
        What happens to smaller clouds: repeat (for 64 points or more; each copy is moved a little
        along the surface), or skip (leave them out).
    up_axis: str
        Up axis of the files; by default that of the benchmark or format (glTF: y), else z.
    unit: str
        Unit of the files, only recorded; the files' own coordinates can be restored in any case.
    split: str
        folder (by folders train, test, val, or the benchmark's lists), the fraction for test, or a
        file that lists the test clouds.
    keep: tuple[str, ...]
        What to keep besides points: some of normals, colors, parts.
    precision: str
        float32; or float16, which halves the size and rounds coordinates by at most 0.00025 of a
        cloud's radius.
    variant: str
        Which data set, if a benchmark's folder contains several: obj_bg, obj_only, pb_t50_rs,
        modelnet10, modelnet40.
    columns: tuple[str, ...]
        Names of the columns for x, y and z in tables that name them differently; or of all columns
        of .bin files.
    seed: int
        Seed of mesh samples, reductions and the split.
    keep_strays: bool
        Keep stray points, which have hardly any neighbours; by default they are removed first,
        except from benchmarks.
    reader: str
        Your own reader of a file format: package.module:function, from a path to points n x 3.
    workers: int
        Number of processes; 0 means one per core.
    strict: bool
        Stop at the first cloud that cannot be used, instead of leaving it out.
    """
    from jepa3d.data.prepare import Preparation
    from jepa3d.data.prepare import prepare as run

    names = tuple(name for text in columns or () for name in text.split(","))
    options = Preparation(
        None if points == "all" else points,
        reduce,
        short,
        up_axis,
        unit,
        split,
        keep,
        precision,
        variant,
        names or None,
        seed,
        keep_strays,
        reader,
    )
    for store in run(source, out, options, workers, strict):
        print(
            f"see it with: jepa3d info {store}; train on it with: jepa3d pretrain --data {store} --out RUN"
        )


def pretrain(
    *,
    config: Annotated[PretrainConfig, Parameter(name="*")] = _DEFAULT,
    preset: str = "small",
    recipe: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Pretrain an encoder on unlabelled shapes.

    Parameters
    ----------
    preset: str
        tiny (minutes on a laptop, with the targets that worked best there), small (as in the
        paper), base.
    recipe: Path
        YAML settings; they override the preset, and flags override them.
    out: Path
        Run folder to create; required unless --dry-run.
    resume: bool
        Continue the interrupted run in --out. Under torchrun --max-restarts, this also begins the
        run.
    dry_run: bool
        Read some data, take two steps of every stage, print what the whole run will cost, and write
        nothing.
    """
    from jepa3d.training import pretrain as training
    from jepa3d.training.runs import is_main, leave

    if dry_run:
        training.dry_run(config)
        leave()
        return
    if out is None:
        raise ValueError("--out is missing: give a folder for the run")
    with going_on_with(f": jepa3d pretrain --out {out} --resume"):
        training.pretrain(config, out, resume)
    if is_main():
        hint = f"jepa3d probe {out} --data {config.data[0]}"
        print(f"done: {out}; see what it learned with: {hint}")
    leave()


def demo(*, out: Path = Path("demo"), max_steps: int | None = None, shapes: int = 4000) -> None:
    """Pretrain on built-in shapes for some minutes, probe the encoder, draw pictures.

    Parameters
    ----------
    out: Path
        Folder to write; an interrupted demo there is continued.
    max_steps: int
        Number of training steps, for a shorter demo.
    shapes: int
        Number of synthetic shapes.
    """
    from jepa3d.demo import run_demo

    run_demo(out, max_steps, shapes)


def info(
    path: str | None = None,
    /,
    *,
    up_axis: str = "z",
    labels_key: str = "labels",
    picture: Path | None = None,
    verify: bool = False,
) -> None:
    """Describe a run, a store or any other source of shapes; without a path, this installation.

    Parameters
    ----------
    path: str
        A run folder, or anything that --data takes.
    up_axis: str
        The data's up axis: x, y or z.
    labels_key: str
        The name of the array of labels in a .npz bundle.
    picture: Path
        A PNG file for a contact sheet, if the path is a source of shapes.
    verify: bool
        Compare a store's files with their checksums.
    """
    from jepa3d import info as describing

    describing.describe(path, up_axis, labels_key, picture, verify)
