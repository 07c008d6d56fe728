"""Commands that fine-tune networks on labelled shapes or apply fine-tuned networks: classify,
segment, fewshot, predict.
"""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from jepa3d.cli.pretraining import going_on_with
from jepa3d.config import FewshotConfig, FinetuneConfig, SegmentConfig

Preset = Annotated[
    str,
    Parameter(
        help="Default settings: tiny, small (the paper's) or base. With --init, the encoder keeps "
        "its own size."
    ),
]
Recipe = Annotated[
    Path | None,
    Parameter(help="A YAML file of settings; it overrides the preset, and flags override both."),
]
Out = Annotated[Path, Parameter(help="Folder of the run; it must be new, except with --resume.")]
Resume = Annotated[bool, Parameter(help="Continue the interrupted run in --out.")]


def classify(
    *,
    config: Annotated[FinetuneConfig, Parameter(name="*")] = FinetuneConfig(),  # noqa: B008
    preset: Preset = "small",
    recipe: Recipe = None,
    out: Out,
    resume: Resume = False,
) -> None:
    """Fine-tune a classifier of whole shapes. By default, the epoch is chosen on validation, and
    the test split is scored once.
    """
    _run("classify", config, out, resume)


def segment(
    *,
    config: Annotated[SegmentConfig, Parameter(name="*")] = SegmentConfig(),  # noqa: B008
    preset: Preset = "small",
    recipe: Recipe = None,
    out: Out,
    resume: Resume = False,
) -> None:
    """Fine-tune a part segmenter. By default, the epoch is chosen on validation, and the test split
    is scored once.
    """
    _run("segment", config, out, resume)


def fewshot(
    *,
    config: Annotated[FewshotConfig, Parameter(name="*")] = FewshotConfig(),  # noqa: B008
    preset: Preset = "small",
    recipe: Recipe = None,
    out: Out,
    resume: Resume = False,
) -> None:
    """Measure few-shot accuracy over several episodes, by fine-tuning or on frozen features. The
    episodes are published folds or are drawn at random.
    """
    _run("fewshot", config, out, resume)


def predict(
    run: Path,
    files: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path,
    category: str | None = None,
    up_axis: Literal["x", "y", "z"] = "z",
) -> None:
    """Classify or segment files with a fine-tuned network.

    Parameters
    ----------
    run: Path
        The output folder of classify, segment or label.
    files: list[Path]
        Files, folders of files, or stores of jepa3d prepare.
    out: Path
        What to write; it must not exist yet. For a classifier: a CSV file with one row per cloud.
        For a segmenter: a folder with one PLY file per cloud, which contains part labels and
        colours.
    category: str
        The category of the clouds, if the segmenter was trained on several categories.
    up_axis: str
        The files' up axis: x, y or z; stores and glTF files define their own.
    """
    from jepa3d.inference.predicting import predict_files

    predict_files(run, files, out, category, up_axis)


def _run(command: str, config: FinetuneConfig, out: Path, resume: bool) -> None:
    from jepa3d.training.fewshot import run_fewshot
    from jepa3d.training.finetune import finetune
    from jepa3d.training.runs import is_main, leave, show_result

    with going_on_with(f": jepa3d {command} --out {out} --resume"):
        if isinstance(config, FewshotConfig):
            run_fewshot(config, out, resume)
        else:
            finetune(config, out, resume)
    if is_main():
        show_result(out)
    leave()
