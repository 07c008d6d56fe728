"""Data in, an encoder out: prepare, pretrain, demo, info."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from jepa3d.config import PretrainConfig

_DEFAULT = PretrainConfig()


@contextmanager
def going_on_with(command: str) -> Iterator[None]:
    """Add to the message of an interrupted run which command goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):  # nothing was saved
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
    """Turn a benchmark's download or anybody's files into a store that every other command reads in
    place.

    Interrupted, the same command goes on; run again later, it adds the files that are new.

    Parameters
    ----------
    source: Path
        A folder, a single file, or an archive (.zip, .tar.*); the formats and benchmarks are in
        docs/data.md.
    out: Path
        The store: a new folder, or one begun with the same settings.
    points: int
        Points a cloud, or all. A mesh is sampled by area (8,192 where all are kept).
    reduce: str
        How a cloud gets that few: fps (any smaller number is then a prefix), random, or voxel
        (even, in linear time).
    short: str
        A cloud of fewer points: repeat (64 at least; each copy is moved a little along the
        surface), or skip, left out.
    up_axis: str
        Of the files; by default what the benchmark or format (glTF: y) has, else z.
    unit: str
        Of the files, written down for later; coordinates lead back to the file's own in any case.
    split: str
        folder (named train, test, val, or the benchmark's lists), a fraction for test, or a file
        listing test clouds.
    keep: tuple[str, ...]
        Some of normals, colors, parts.
    precision: str
        float32, or float16: half the size, rounded by at most 0.00025 of a cloud's radius a
        coordinate.
    variant: str
        Where a benchmark's folder holds several data sets: obj_bg, obj_only, pb_t50_rs, modelnet10,
        modelnet40.
    columns: tuple[str, ...]
        Names of x, y and z in tables whose headers have others; or of all columns of .bin files.
    seed: int
        Of mesh samples, reductions and the split.
    keep_strays: bool
        Keep points that lie where hardly any other does, as benchmarks always do; else they are
        left out first.
    reader: str
        Reads files of a format of your own: package.module:function, from a path to points n x 3.
    workers: int
        Processes; 0 is one a core.
    strict: bool
        Stop at the first cloud that cannot be used instead of leaving it out.
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
        tiny (a laptop's minutes, with the targets that learned most in them), small (the paper),
        base.
    recipe: Path
        YAML settings; flags win over it, it wins over the preset.
    out: Path
        Run folder to make; required unless --dry-run.
    resume: bool
        Continue the run in --out, which was interrupted; under torchrun --max-restarts, begin it as
        well.
    dry_run: bool
        Read some data, take two steps of every stage, print what the whole run will cost, write
        nothing.
    """
    from jepa3d.training import pretrain as training
    from jepa3d.training.runs import is_main, leave

    if dry_run:
        training.dry_run(config)
        leave()
        return
    if out is None:
        raise ValueError("--out is missing: the folder that the run is written to")
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
        Folder to write; a demo interrupted there goes on.
    max_steps: int
        A shorter demo.
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
    """Describe a run, a store, any source of shapes, or without a path this installation.

    Parameters
    ----------
    path: str
        A run folder, or anything that --data takes.
    up_axis: str
        The data's up axis.
    labels_key: str
        The labels of a .npz bundle.
    picture: Path
        Write a contact sheet of a source of shapes.
    verify: bool
        Compare a store with its checksums.
    """
    from jepa3d import info as describing

    describing.describe(path, up_axis, labels_key, picture, verify)
