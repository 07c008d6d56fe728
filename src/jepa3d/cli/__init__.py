"""The command line: reads the arguments, runs a command, and prints the library's messages."""

import argparse
import io
import logging
import multiprocessing
import sys
from pathlib import Path

import cyclopts
from cyclopts import Parameter

import jepa3d
from jepa3d import config as settings
from jepa3d.allocator import keep_large_blocks
from jepa3d.cli import evaluating, finetuning, pretraining, using
from jepa3d.config import KINDS, SCHEDULE, STAGE_ONE
from jepa3d.plain import from_dict, log, merge, printable, read_recipe, to_dict
from jepa3d.run import Run

app = cyclopts.App(
    name="jepa3d",
    help="Self-supervised learning on 3D point clouds with 3D-JEPA (arXiv 2409.15803).",
    # a function, since finding the version takes a while
    version=lambda: jepa3d.__version__,
    help_format="markdown",  # unlike plaintext, it joins the lines of a paragraph
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
    suppress_keyboard_interrupt=False,
)
for command in (
    *(pretraining.prepare, pretraining.pretrain, pretraining.demo, pretraining.info),
    *(finetuning.classify, finetuning.segment, finetuning.fewshot, finetuning.predict),
    *(evaluating.probe, evaluating.curve, evaluating.results, evaluating.retrieval),
    *(evaluating.compare, evaluating.report),
    *(using.embed, using.index, using.search, using.label),
    *(using.scene, using.view, using.export),
):
    app.command(command)


def _weaker_settings(command: str, tokens: list[str]) -> dict:
    """Return the settings of a training command before its flags are applied.

    command: pretrain, classify, segment or fewshot. tokens: its arguments. The settings come from
    the preset and the recipe, which overrides the preset. If a run is resumed, both override the
    settings that are stored in the run. For pretrain, one flag is applied here, `--objective`,
    because it determines which group of the recipe has the run's schedule: with the objective
    `generative`, the recipe's `generative.max_steps` is the run's `max_steps`. Raises ValueError if
    the preset, the recipe or the stored settings are wrong, or if the run that is resumed was made
    by another command.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--recipe", "--out", "--objective"):
        parser.add_argument(flag)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(tokens)
    layers = []
    if known.resume and known.out and Path(known.out, "config.json").is_file():
        before = Run(Path(known.out)).config
        if (task := before.pop("task", "pretrain")) != command:
            raise ValueError(f"{known.out}: a run of jepa3d {task}, not of {command}")
        layers.append(before)
    recipe = read_recipe(known.recipe) if known.recipe else {}
    if named := known.preset or recipe.pop("preset", None):
        layers.append(settings.preset(named, KINDS[command]))
    recipe.pop("preset", None)
    layers.append(recipe)
    try:
        if command != "pretrain":
            return to_dict(from_dict(KINDS[command], merge({}, *layers)))
        flag = {"objective": known.objective} if known.objective else {}
        return to_dict(settings.resolve(*layers, flag))
    except ValueError as error:
        where = f"{known.recipe}: " if known.recipe else ""
        raise ValueError(f"{where}{error}") from error


def _one_schedule(tokens: list[str], objective: str) -> list[str]:
    """Rewrite flags such as `--generative.lr` as `--lr`.

    objective: the objective of the run. If it is `generative`, these two flags mean the same
    setting; likewise for all settings in `SCHEDULE` (config.py). Raises ValueError if both flags
    are given with different values.
    """
    words, given = [], {}
    values = iter(tokens)
    for word in values:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").removeprefix(f"{objective}.").replace("-", "_")
        if not (flag.startswith("--") and name in SCHEDULE):
            words.append(word)
            continue
        value = value if equals else next(values, "")
        if given.setdefault(name, value) != value:
            found = f"{name} {given[name]} and {value}: {name} and {objective}.{name}"
            raise ValueError(f"{found} are the same setting in this run")
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", value]
    return words


class Printer(logging.Handler):
    """Prints the library's messages: warnings to standard error, all others to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # imported here, since --help does not need it

        file = sys.stderr if record.levelno > logging.INFO else sys.stdout
        with tqdm.external_write_mode(file):  # redraws a progress bar below the message
            print(record.getMessage(), file=file, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    After a mistake of the user, or an error of the system such as a full disk, it prints one line
    and exits with status 2. After an interruption, it exits with status 130.
    """
    tokens = sys.argv[1:] if arguments is None else arguments
    keep_large_blocks()
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show is printed as an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    printer = Printer()
    log.setLevel(logging.INFO)
    log.addHandler(printer)
    try:
        if tokens and (command := tokens[0]) in KINDS:
            weaker = _weaker_settings(command, tokens)
            app.config = [cyclopts.config.Dict({command: weaker})]
            if (objective := weaker.get("objective", "jepa")) in STAGE_ONE:
                tokens = _one_schedule(tokens, objective)
        app(tokens)
    except (ValueError, OSError) as error:
        print(printable(f"jepa3d: error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        for process in multiprocessing.active_children():
            # without this, the main process would wait until its worker processes have finished
            process.terminate()
        print(printable(f"jepa3d: {str(stop) or 'stopped'}"), file=sys.stderr)
        sys.exit(130)
    finally:
        log.removeHandler(printer)
