"""The command line: parse, call, print."""

import argparse
import json
import sys
from pathlib import Path

import cyclopts

from jepa3d import config as settings
from jepa3d.allocator import keep_large_blocks
from jepa3d.cli import evaluating, exporting, finetuning, pretraining, reporting, scenes, using, viewing  # noqa: F401
from jepa3d.cli.app import app
from jepa3d.config import FewshotConfig, FinetuneConfig, PretrainConfig, SegmentConfig
from jepa3d.plain import from_dict, merge, read_recipe, to_dict

_KINDS = {
    "pretrain": PretrainConfig,
    "classify": FinetuneConfig,
    "segment": SegmentConfig,
    "fewshot": FewshotConfig,
}


def _weaker_settings(command: str, tokens: list[str]) -> dict:
    """What the flags of a training command override: the stored run when resuming, then preset and recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--recipe")
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(tokens)
    layers = []
    stored = Path(known.out or "", "config.json")
    if known.resume and known.out and stored.is_file():
        before = json.loads(stored.read_text())
        if (task := before.pop("task", "pretrain")) != command:
            raise ValueError(f"{known.out}: a run of jepa3d {task}, not {command}")
        layers.append(before)
    recipe = read_recipe(known.recipe) if known.recipe else {}
    if named := known.preset or recipe.pop("preset", None):
        layers.append(settings.preset(named) if command == "pretrain" else settings.finetune_preset(named))
    recipe.pop("preset", None)
    try:
        return to_dict(from_dict(_KINDS[command], merge({}, *layers, recipe)))
    except ValueError as error:
        raise ValueError(f"{known.recipe}: {error}" if known.recipe else str(error)) from error


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a mistake of the user is one line and exit status 2, an interrupted run 130."""
    tokens = sys.argv[1:] if arguments is None else arguments
    keep_large_blocks()
    try:
        if tokens and (command := tokens[0]) in _KINDS:
            app.config = [cyclopts.config.Dict({command: _weaker_settings(command, tokens)})]
        app(tokens)
    except (ValueError, OSError) as error:
        sys.exit(_fail(error))
    except KeyboardInterrupt as stop:
        print(f"jepa3d: {str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception) -> int:
    print(f"jepa3d: error: {error}", file=sys.stderr)
    return 2
