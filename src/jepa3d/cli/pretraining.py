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
    """Context manager: if the block is interrupted after a run was saved, the KeyboardInterrupt's
    message also says how to continue the run.

    command: the text that follows "continue with" in the message, such as " the same command".
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        # without a message, nothing was saved, so nothing can be continued
        if not str(stop):
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
    """Convert a downloaded benchmark, or your own files, to a store: a folder of clouds that the
    other commands read.

    If the command is interrupted, repeat it to continue. If you repeat it later, it adds new files.

    Parameters
    ----------
    source: Path
        A folder, a single file, or an archive (.zip, .tar.*); docs/data.md lists formats and
        benchmarks.
    out: Path
        The store: a new folder, or a store begun with the same settings.
    points: int
        Number of points per cloud, or all. On meshes, points are sampled uniformly by area; with
        all, a mesh gets 8,192 points.
    reduce: str
        How clouds with more points are reduced: fps (farthest point sampling), random, or voxel
        (almost as even as fps, and faster for very large clouds).
    short: str
        What happens to clouds with fewer points: repeat (fill up clouds of 64 points or more with
        copies of points, moved a little along the surface), or skip (leave these clouds out).
    up_axis: str
        Up axis of the files; by default that of the benchmark or format (glTF: y), or else z.
    unit: str
        Unit of the coordinates in the files, such as m; it is recorded but changes nothing.
    split: str
        How to split: folder (by folders named train, test and val, or by the benchmark's lists), a
        number such as 0.2 (the share of test), or a file that lists the test clouds.
    keep: tuple[str, ...]
        Which values of each point to keep: some of normals, colors, parts (part labels).
    precision: str
        Number type of stored coordinates: float32; or float16, which halves the size and rounds
        coordinates by at most 0.00025 of a cloud's radius.
    variant: str
        Which data set to convert, if a benchmark's folder contains several: obj_bg, obj_only,
        pb_t50_rs, pb_t50_rs_nobg, modelnet10 or modelnet40.
    columns: tuple[str, ...]
        For tables: the names of the columns that contain x, y and z, if the header has other names
        for them. For .bin files and tables without a header: the names of all columns.
    seed: int
        Seed for sampling meshes, reducing clouds and splitting.
    keep_strays: bool
        Keep stray points, which have hardly any neighbours. By default they are removed, except
        from benchmarks.
    reader: str
        Your own function that reads a file, as package.module:function; see docs/extending.md.
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
        training = f"jepa3d pretrain --data {store} --out RUN"
        print(f"see it with: jepa3d info {store}; train on it with: {training}")


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
        tiny (for runs of some minutes on a laptop; it does not have the paper's masks and teacher,
        but those that work best in such short runs), small (as in the paper), or base (a larger
        encoder).
    recipe: Path
        A YAML file of settings; it overrides the preset, and flags override it.
    out: Path
        Folder of the run; it must be new, except with --resume. Not needed with --dry-run.
    resume: bool
        Continue the interrupted run in --out. Under torchrun --max-restarts, a run that does not
        exist yet is started.
    dry_run: bool
        Read some data, take two steps of every stage, and print what the whole run will cost.
        Nothing is written.
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
    """Pretrain on built-in shapes for some minutes, probe the encoder and draw pictures.

    Parameters
    ----------
    out: Path
        Folder to write to; if a demo there was interrupted, it is continued.
    max_steps: int
        Number of training steps; by default 2,000.
    shapes: int
        Number of built-in shapes to generate.
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
    """Describe a run, an encoder, or a source of shapes; without PATH, describe this installation.

    Parameters
    ----------
    path: str
        A run, the folder of an encoder or classifier, or any source of shapes that --data takes.
    up_axis: str
        The data's up axis: x, y or z.
    labels_key: str
        The name of the array of labels in a .npz bundle.
    picture: Path
        If PATH is a source of shapes: a PNG file to write, with pictures of some of the shapes.
    verify: bool
        Compare the files of a store with their checksums.
    """
    from jepa3d import info as describing

    describing.describe(path, up_axis, labels_key, picture, verify)
