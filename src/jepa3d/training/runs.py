"""Create run folders, check that a resumed run has the same settings and data as at its start, and
mark runs as finished, with their cost.
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil
from accelerate import PartialState
from torch import nn

from jepa3d.config import STAGE_ONE, PretrainConfig, RunConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.protocol import provenance, write_json
from jepa3d.locking import writing
from jepa3d.models.hub import Pretrained
from jepa3d.plain import differences, log, read_checked, sha256_of, to_dict, write_checked
from jepa3d.run import Run
from jepa3d.training import checkpoint
from jepa3d.training.engine import ON_CPU

C = TypeVar("C")
P = ParamSpec("P")


def exclusive(
    train: Callable[Concatenate[C, Path, P], Path],
) -> Callable[Concatenate[C, Path | str, P], Path]:
    """Decorate a function (config, out, ...), so that it holds the lock of the folder `out` while
    it runs.

    The decorated function raises ValueError if another command holds the lock.
    """

    @functools.wraps(train)
    def locked(config: C, out: Path | str, *arguments: P.args, **options: P.kwargs) -> Path:
        out = Path(out)
        with writing(out) if is_main() else nullcontext():
            return train(config, out, *arguments, **options)

    return locked


def begin(out: Path, resume: bool) -> bool:
    """Return True if `out` is a run to continue, False for a new run.

    Raises ValueError if `out` exists, unless it is a run and `resume` is True. Also raises it if
    `out` does not exist and `resume` is True, with one exception: torchrun may repeat a failed
    command, so under torchrun with restarts, `resume` may also start a new run.
    """
    started, existed = (out / "config.json").exists(), out.exists()
    wait_for_everyone()  # every process must have checked before the first one writes
    if existed and not (resume and started):
        hint = ", or continue it with --resume" if started else ""
        raise ValueError(f"{out}: exists already; choose another --out{hint}")
    if resume and not started and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        raise ValueError(f"{out} has no run to resume")
    return started


def close_if_finished(out: Path) -> bool:
    """Return whether the run is finished. If it is finished, log this, and delete the folders that
    only an unfinished run needs.
    """
    finished = Run(out).finished
    if finished:
        drop_scratch(out)  # `finish` does this too, but may have been killed before
        log.info(f"{out}: finished already")
    return finished


def check_unchanged(config: Any, out: Path) -> None:
    """Raise ValueError unless a resumed run has the same settings as at its start, and its
    config.json is intact.
    """
    file = out / "config.json"
    written = Run(out).record.get("config")  # version 0.1.0 wrote no checksum
    if written not in (None, sha256_of(file)):
        found = "is missing, damaged or edited"
        raise ValueError(f"{file} {found}: its checksum differs from that in run.json")
    if changed := differences(read_by(to_dict(config)), read_by(Run(out).config)):
        name, (now, then) = next(iter(changed.items()))
        found = f"was started with {name} = {then}, not {now}"
        raise ValueError(f"{out} {found}; --resume cannot change it")


def read_by(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run uses.

    If the run's objective is "dvae", "generative" or "invariance" (`STAGE_ONE`), the run uses
    neither the settings that only 3D-JEPA has (such as `sampler` and `teacher`) nor those of the
    other two of these objectives.
    """
    objective = settings.get("objective", "jepa")
    if objective not in STAGE_ONE:
        return settings
    others = {"sampler", "decoder", "target", "teacher", "init", *STAGE_ONE}
    others -= {objective}
    return {name: value for name, value in settings.items() if name not in others}


def copy_twin(config: PretrainConfig, out: Path, candidates: Iterable[Path]) -> None:
    """Copy to `out` the first of the runs `candidates` that is finished and has the settings of
    `config`. If there is no such run, do nothing.
    """
    wanted = read_by(to_dict(config))
    for run in candidates:
        if Run(run).finished and not differences(wanted, read_by(Run(run).config)):
            copy = functools.partial(shutil.copytree, run, dirs_exist_ok=True)
            checkpoint.replace_folder(out, copy, new=True)
            return


def check_same_data(clouds: PointClouds, out: Path) -> None:
    """Raise ValueError unless a resumed run has the same data as at its start."""
    before = Run(out).record["data"]
    if (clouds.fingerprint, len(clouds)) != (before["fingerprint"], before["shapes"]):
        now = f"now {clouds.name} with {len(clouds)} shapes"
        found = f"then {before['name']} with {before['shapes']} shapes, {now}"
        raise ValueError(f"{out}: the data changed since the run started: {found}")


def create(
    out: Path,
    config: dict,
    clouds: PointClouds,
    record: dict[str, Any],
    networks: Mapping[str, Pretrained],
) -> None:
    """Create the run folder, completely or not at all.

    The folder gets config.json, run.json (versions, machine, command, status, data and `record`),
    and the networks, each in the sub-folder that its key in `networks` names.
    """
    if not is_main():
        return
    data = {"name": clouds.name, "fingerprint": clouds.fingerprint, "shapes": len(clouds)}

    def write(partial: Path) -> None:
        write_json(partial / "config.json", config)
        digest = sha256_of(partial / "config.json")
        running = {"status": "running", "config": digest, "data": data}
        write_json(partial / "run.json", provenance() | running | record)
        for folder, network in networks.items():
            network.save_pretrained(partial / folder)

    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_folder(out, write, new=True)


def check_batch(config: RunConfig, name: str, size: int) -> None:
    """Check a batch size. name: what error messages call the batch size.

    Raises ValueError if the batch size is not a multiple of the number of processes times
    `accumulate`. On a machine without a GPU, also raises ValueError if the weights or the batch
    cannot fit into memory.
    """
    accumulate, encoder = config.accumulate, config.encoder
    memory = psutil.virtual_memory().total if ON_CPU else float("inf")
    # fp32 weights, gradients and the optimiser's two moments take 16 bytes per weight.
    weights = 16 * encoder.depth * int((4 + 2 * encoder.mlp_ratio) * encoder.embed_dim**2)
    if weights > memory:
        what = f"encoder.embed_dim {encoder.embed_dim} and depth {encoder.depth} need {weights / 1e9:,.0f} GB of memory"
        raise ValueError(f"{what}, but this machine has {memory / 1e9:,.0f} GB")
    # A low estimate of the stored activations and points. Each block stores `kept` vectors per
    # visible token. A fifth (0.2) of the tokens is taken to be visible; with the masks of every
    # preset, more are visible. A point has 3 numbers, and a number takes 4 bytes.
    kept = 1 if config.checkpoint_activations else 8
    tokens = 0.2 * encoder.num_groups * encoder.depth * kept * encoder.embed_dim
    needed = 4 * size // accumulate * (tokens + 3 * encoder.num_points)
    if needed > memory:
        what = f"{name} {size} needs at least {needed / 1e9:,.0f} GB, but this machine has {memory / 1e9:,.0f}"
        hint = f"lower batch_size or raise accumulate ({accumulate})"
        raise ValueError(f"{what} GB of memory; {hint}")
    processes = PartialState(cpu=ON_CPU).num_processes
    if size % (processes * accumulate):
        factor = f" x accumulate ({accumulate})" if accumulate > 1 else ""
        found = f"not a multiple of processes ({processes}){factor}"
        raise ValueError(f"{name} {size} is {found}")


def cost_of(out: Path, state: dict) -> dict[str, float]:
    """Return a run's cost. The keys `cpu_seconds` and `wall_seconds` do not include the time spent
    before the first step: on stage I (the training of networks that the run needs first) and on
    computing cached targets. This time has its own keys, `stage1_*`.
    """
    names = ("step", "cpu_seconds", "wall_seconds", "peak_memory")
    cost = {key: state[key] for key in names}
    files = [*out.glob("stage1/*/run.json"), *out.glob("cache/run.json")]
    before = [read_checked(file, "cost")["cost"] for file in files]
    for key in ("cpu_seconds", "wall_seconds"):
        cost[f"stage1_{key}"] = sum(stage[key] for stage in before)
    return cost


def finish(
    out: Path,
    cost: dict[str, float],
    metrics: Mapping[str, float | None],
    result: dict[str, Any] | None = None,
) -> None:
    """Mark a run as finished: write its result (if given) and its cost, and delete its checkpoints
    and cached targets.

    result: the protocol, data, selection, metrics (in per cent, on the test split), validation
    (metrics on the validation split, or None), details (by class, category or fold), and the
    settings by which `jepa3d results` groups runs, such as the fraction of labels. This function
    adds the origin of the encoder, and the run's task, seed, votes, cost, command, versions and
    machine.
    """
    record, config = Run(out).record, Run(out).config
    if result:
        init, frozen = config["init"], config.get("method", "finetune") != "finetune"
        if init is None or Path(init).name == "untrained":
            init = "untrained" if init or frozen else "scratch"
        known = {name: config[name] for name in ("task", "seed", "votes")}
        known |= {"init": init, "pretraining": record["pretraining"], "cost": cost}
        # the command that started the run, not one that resumed it
        origin = provenance() | {"command": record["command"]}
        write_checked(out / "results.json", known | result | origin)
    ended = {"status": "finished", "cost": cost, "metrics": metrics}
    write_json(out / "run.json", record | ended)
    drop_scratch(out)


def drop_scratch(out: Path) -> None:
    """Delete the folders that only an unfinished run needs."""
    for folder in ("checkpoints", "cache"):
        shutil.rmtree(out / folder, ignore_errors=True)


def is_main() -> bool:
    return PartialState(cpu=ON_CPU).is_main_process


def wait_for_everyone() -> None:
    """Wait until every process has made this call."""
    PartialState(cpu=ON_CPU).wait_for_everyone()


def leave() -> None:
    """Leave the group of processes, if there is one. A process that ends while it is in a group of
    the backend gloo may abort.
    """
    PartialState(cpu=ON_CPU).destroy_process_group()


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def show_result(out: Path) -> None:
    """Print a summary of results.json in two lines."""
    result = read_checked(out / "results.json")
    print(outcome(result))
    minutes = result["cost"]["cpu_seconds"] / 60
    hint = "average seeds with: jepa3d results RUNS"
    print(f"{minutes:.1f} CPU-minutes; written: {out}; {hint}")


def outcome(result: dict) -> str:
    """Return one line that sums up a results.json: its metrics, and how the epoch was selected."""
    data = result["data"]
    known = [pair for pair in result["metrics"].items() if pair[1] is not None]
    metrics = ", ".join(f"{name.replace('_', ' ')} {value:.1f} %" for name, value in known)
    votes = f", {result['votes']} votes" if result["votes"] > 1 else ""
    return (
        f"{result['protocol']} on {data['name']}: {metrics} on {data['test']:,} test shapes "
        f"(selection: {result['selection']}{votes}; {data['train']:,} train, {data['validation']:,} validation)"
    )
