"""Commands that evaluate encoders and runs: probe, curve, results, retrieval, compare, report."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from jepa3d.cli.pretraining import going_on_with
from jepa3d.run import Run

# The defaults of five arguments of `probe`: layer, pooling, protocols, quick and per_class. With
# --corruptions or --parts, `probe` accepts only these values.
_CHOICES = ("best", "mean_max", None, False, None)


def probe(
    runs: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    layer: str = "best",
    pooling: str = "mean_max",
    protocols: tuple[str, ...] | None = None,
    part: Literal["test", "validation"] = "test",
    quick: bool = False,
    per_class: str | None = None,
    corruptions: Annotated[bool, Parameter(negative=())] = False,
    parts: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
) -> None:
    """Show what an encoder learned: the accuracy of its frozen features under named protocols,
    compared with an untrained encoder and other baselines.

    Parameters
    ----------
    runs: list[Path]
        Finished runs of one configuration, with different seeds; the table has mean and standard
        deviation over the runs. Or one encoder: default (the one in the package), a folder, or a
        Hub id.
    data: str
        Labelled shapes with a train and a test split.
    labels_key: str
        The name of the array of labels in a .npz bundle.
    up_axis: str
        The data's up axis: x, y or z; or none, for vectors that are the same however a shape is
        rotated.
    layer: str
        The layer whose tokens are used: best (chosen on validation), or a number from 0 (tokenizer)
        to the encoder's depth.
    pooling: str
        How tokens are pooled to one vector: mean_max, mean or max.
    protocols: tuple[str, ...]
        The protocols to run (docs/protocols.md): some of logistic, logistic_10, knn, svc_linear,
        linear_svc, mlp3. By default, all of them.
    part: str
        The split to score: test; or, for choosing a recipe, validation (a fifth of train if the
        data has no validation split).
    quick: bool
        Do not choose layer and regularisation: use the last layer (or --layer) and C = 0.1. This is
        much faster.
    per_class: str
        A protocol, whose accuracy for each class is also printed.
    corruptions: bool
        Instead, measure the accuracy on corrupted shapes: with noise, stray points, cuts,
        rotations, and the seven corruptions of PointCloud-C.
    parts: bool
        Instead, measure how well the features of points predict the points' part labels.
    out: Path
        The JSON file to write; by default probe-DATA.json in the folder of the first run, or
        probe-DATA-MODEL.json in the current folder if RUNS is an encoder. Options that change the
        result are added to the default name.
    """
    from jepa3d.evaluation import corrupted, dense
    from jepa3d.evaluation import probe as probing
    from jepa3d.evaluation.labelled import LabelledSet
    from jepa3d.evaluation.protocol import write_json
    from jepa3d.evaluation.tables import show

    models, dataset = [str(run) for run in runs], LabelledSet(data, labels_key, up_axis)
    chosen = layer, pooling, protocols, quick, per_class
    if corruptions or parts:
        if (corruptions and parts) or chosen != _CHOICES:
            others = "--layer, --pooling, --protocols, --quick, --per-class"
            rule = f"give only one of these two flags, and without {others}"
            raise ValueError(f"--corruptions and --parts: {rule}")
        if parts:
            result = dense.probe_parts(models, dataset, part)
            show([dense.sheet(result)])
        else:
            result = corrupted.corrupted("probe", models, dataset, part)
            show([corrupted.sheet(result)])
    else:
        if layer != "best" and not layer.isdigit():
            allowed = "best, or a number from 0 (tokenizer) to the encoder's depth"
            raise ValueError(f"--layer {layer}: use {allowed}")
        names = protocols or probing.PROTOCOLS
        probing.check_per_class(per_class, names)
        how = None if layer == "best" else int(layer), pooling, names, part, quick
        result = probing.probe(runs, *dataset, *how)
        show(probing.sheets(result, per_class))
    words = [labels_key, f"up-{up_axis}", f"layer{layer}", pooling]
    words += [*(protocols or ()), part]
    usual = ("labels", "up-z", "layerbest", "mean_max", "test")
    special = [word for word in words if word not in usual]
    special += ["quick"] * quick + ["corruptions"] * corruptions + ["parts"] * parts
    # If RUNS is an encoder and not a run, the file is written to the current folder. So the default
    # name of the file contains the encoder's name: for the folder `encoder` of a run, the run's.
    if not (run := Run.is_at(runs[0])):
        model = runs[0].absolute()
        special.insert(0, (model.parent if model.name == "encoder" else model).name)
    if out is None:
        # a folder has no suffix: scans.v1 and scans.v2 are two sets
        source = Path(data).name if Path(data).is_dir() else Path(data).stem
        name = "-".join(["probe", source.replace(":", "-"), *special])
        out = (runs[0] if run else Path()) / f"{name}.json"
    write_json(out, result)
    print(f"written: {out}")


def curve(
    runs: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    protocol: str = "logistic_10",
    part: Literal["test", "validation"] = "test",
    out: Path = Path("curves.png"),
) -> None:
    """Plot probe accuracy against CPU-minutes of training, from the snapshots of finished runs.

    Parameters
    ----------
    runs: list[Path]
        Finished runs of pretrain --snapshot-every. Runs of one configuration with different seeds
        share a line of the plot.
    data: str
        Labelled shapes with a train and a test split.
    labels_key: str
        The name of the array of labels in a .npz bundle.
    up_axis: str
        The data's up axis: x, y or z.
    protocol: str
        The probe (docs/protocols.md): logistic, logistic_10, knn, svc_linear, linear_svc or mlp3.
    part: str
        The split to score: test; or, for choosing a recipe, validation (a fifth of train if the
        data has no validation split).
    out: Path
        The picture to write.
    """
    from jepa3d.evaluation.curve import learning_curves, sheet
    from jepa3d.evaluation.labelled import LabelledSet
    from jepa3d.evaluation.tables import show
    from jepa3d.figures import draw_learning_curves

    arms = learning_curves(runs, LabelledSet(data, labels_key, up_axis), protocol, part)
    show([sheet(arms, protocol, part)])
    draw_learning_curves(arms, out, f"{Path(data).stem}, {protocol}, {part} split")
    print(f"written: {out}")


def results(
    runs: Annotated[tuple[Path, ...], Parameter(negative=())] = (),
    /,
    *,
    choose: str | None = None,
    published: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
) -> None:
    """Print tables of fine-tuning runs: means over seeds, differences paired by seed, and published
    results for comparison.

    Parameters
    ----------
    runs: tuple[Path, ...]
        Runs of classify, segment or fewshot, or folders that contain such runs.
    choose: str
        A setting, such as lr. Of runs that differ only in this setting and the seed, the tables
        show only the runs with the best value of the setting: the value with the highest validation
        score, averaged over seeds.
    published: bool
        Print all tables of published results, even if no runs are given.
    out: Path
        A Markdown file to which the tables are also written.
    """
    from jepa3d.evaluation.protocol import provenance
    from jepa3d.evaluation.published import PUBLISHED, published_sheet
    from jepa3d.evaluation.results import tables
    from jepa3d.evaluation.tables import markdown, show
    from jepa3d.plain import write_bytes

    if not runs and not published:
        hint = "Give folders, or --published for the published tables alone"
        raise ValueError(f"results of which runs? {hint}")
    if choose is not None and not runs:
        raise ValueError(f"--choose {choose}: needs runs to choose from")
    sheets = tables(list(runs), choose) if runs else []
    sheets += map(published_sheet, PUBLISHED.values()) if published else []
    show(sheets)
    if out is not None:
        text = markdown(sheets, provenance()["command"])
        write_bytes(out, text.encode("utf-8", "backslashreplace"))
        print(f"written: {out}")


def retrieval(
    models: Annotated[list[str], Parameter(negative=())],
    /,
    *,
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    part: Literal["test", "train"] = "test",
    corruptions: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
) -> None:
    """Measure how well vectors retrieve shapes of the same class, compared with an untrained
    encoder and handcrafted descriptors.

    Parameters
    ----------
    models: list[str]
        default (the encoder in the package), runs (also of jepa3d classify), folders of encoders,
        or Hub ids.
    data: str
        Labelled shapes with a train and a test split.
    labels_key: str
        The name of the array of labels in a .npz bundle.
    up_axis: str
        The data's up axis: x, y or z; or none, for vectors that are the same however a shape is
        rotated.
    part: str
        The split to search in: test; or train, for choosing an encoder.
    corruptions: bool
        Instead, search with corrupted queries: with noise, stray points, cuts, rotations, and the
        seven corruptions of PointCloud-C.
    out: Path
        A JSON file to which the result is also written.
    """
    from jepa3d.evaluation import corrupted
    from jepa3d.evaluation import retrieval as retrieving
    from jepa3d.evaluation.labelled import LabelledSet
    from jepa3d.evaluation.protocol import write_json
    from jepa3d.evaluation.tables import show

    dataset = LabelledSet(data, labels_key, up_axis)
    if corruptions:
        result = corrupted.corrupted("retrieval", models, dataset, part)
        show([corrupted.sheet(result)])
    else:
        result = retrieving.retrieval(models, dataset, part)
        show([retrieving.sheet(result)])
    if out is not None:
        write_json(out, result)
        print(f"written: {out}")


def compare(
    grid: Path,
    /,
    *,
    data: tuple[str, ...] = (),
    score: tuple[str, ...] = (),
    labels_key: tuple[str, ...] = ("labels",),
    up_axis: tuple[str, ...] = (),
    part: Literal["test", "validation"] = "test",
    out: Path,
) -> None:
    """Train configurations with the same seeds and report which are better than a reference, by
    paired differences with 95 % intervals.

    If the command is interrupted, repeat it to continue. Finished runs are not repeated, so you can
    also add configurations and seeds to the grid and repeat the command.

    Parameters
    ----------
    grid: Path
        A YAML file with the configurations (arms), the seeds, and the arm that is the reference:
        see docs/protocols.md and recipes/compare/.
    data: tuple[str, ...]
        Training data; by default the data in the grid. Training does not use their labels.
    score: tuple[str, ...]
        Labelled shapes with a train and a test split, on which the encoders are scored; by default
        the training data.
    labels_key: tuple[str, ...]
        The name of the array of labels in a .npz bundle of the scored data: one for all sources, or
        one per source.
    up_axis: tuple[str, ...]
        The up axis (x, y or z) of the scored data: one for all sources, or one per source; by
        default z. Without --score, the training data is scored, and the default is the up axis in
        the grid.
    part: str
        The split to score: test; or, for choosing a recipe, validation (a fifth of train if the
        data has no validation split).
    out: Path
        The folder of the comparison: its runs, tables and picture.
    """
    from jepa3d.evaluation.labelled import LabelledSet
    from jepa3d.training import compare as comparing
    from jepa3d.training.grid import read_grid

    common = {"data": list(data)} if data else {}
    common |= {"up_axis": list(up_axis)} if up_axis and not score else {}
    plan = read_grid(grid, common, comparing.BASELINES)
    trained_on = plan.arms[plan.reference]
    axes = up_axis or (("z",) if score else trained_on.up_axis)
    sets = LabelledSet.each(score or trained_on.data, labels_key, axes)
    with going_on_with(" the same command"):
        comparing.compare(plan, sets, part, out)
    print(f"written: {out / 'table.md'}, compare.json and compare.png")


def report(
    run: Path, /, *, data: str | None = None, out: Path | None = None, figures: Path | None = None
) -> None:
    """Write a report of a run as one HTML file: results, curves, pictures, settings and cost.

    Parameters
    ----------
    run: Path
        A run of pretrain, classify, segment or fewshot, finished or not.
    data: str
        Where the run's data is now, if it was moved; some of the pictures need it.
    out: Path
        The file to write; by default report.html in the folder of the run.
    figures: Path
        A folder to which the pictures are also written, as PNG files.
    """
    from jepa3d.report import report as write

    print(f"written: {write(run, data, out, figures)}")
