"""Read run folders, which `jepa3d pretrain`, `classify`, `segment` and `fewshot` write.

config.json         the resolved settings         run.json       data, versions, status, cost
metrics.jsonl       one line per logged step      results.json   metrics of a downstream run
untrained/          the untrained encoder         encoder/, dvae/ or model/   the trained network
stage1/NAME/        runs of stage I               given/N/       networks copied from path or Hub
snapshots/step-N/   the encoder during training   checkpoints/   kept until the run is finished

The untrained encoder has random weights: those of step 0, or, if the run starts from given weights
(the setting `init`), those that it would otherwise have started from. Stage I is the training of a
network that the run then uses as a teacher, or whose weights it starts from. The folders given/0,
given/1 and so on have copies of the networks that the settings name by path or Hub id. A downstream
run is one of `classify`, `segment` or `fewshot`; its config.json also contains
its `task`, which is one of these names. Runs of `pretrain` are written by training/pretrain.py.
Downstream runs are written by training/finetune.py and training/fewshot.py, whose docstrings list
further files.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa3d.config import KINDS, FewshotConfig, resolve
from jepa3d.plain import from_dict, merge, read_checked, to_dict


@dataclass(frozen=True)
class Run:
    """A run in a folder; its files are read when a property is used.

    If a file is missing or damaged, a property raises a ValueError that names the file, unless the
    docstring of the property says something else.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Return whether the folder holds a run, finished or not."""
        return (Path(folder) / "run.json").is_file()

    @property
    def config(self) -> dict[str, Any]:
        """The settings in config.json. A setting that did not exist when the run was made gets the
        value that applied then.
        """
        file = self.folder / "config.json"
        try:
            values = json.loads(file.read_text())
            # After version 0.1.0, mixed_precision is never "auto" in config.json (see `settle` in
            # training/engine.py). In version 0.1.0, "auto" meant what "measure" means now.
            if values.get("mixed_precision") == "auto":
                values["mixed_precision"] = "measure"
            task = {"task": values.pop("task")} if "task" in values else {}
            # Each fold of a few-shot run is itself a run, with the task `classify` but few-shot
            # settings.
            kind = KINDS[task.get("task", "pretrain")]
            kind = FewshotConfig if "ways" in values else kind
            # Older versions had no setting qkv_bias, and their encoders always had these biases.
            values = merge({"encoder": {"qkv_bias": True}}, values)
            return task | to_dict(from_dict(kind, values) if task else resolve(values))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            found = f"does not hold the settings of a run of this version ({error})"
            raise ValueError(f"{file}: {found}") from error

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json: data, status, command, and (if known) cost and precision.

        Precision, compilation and device have the key "engine". Other keys are versions and
        machine, and for `pretrain` the settings that differ from the paper's ("departures").
        """
        record = read_checked(self.folder / "run.json", "status", "data", "command")
        groups = {
            "data": ("name", "shapes", "fingerprint"),
            "cost": ("cpu_seconds", "wall_seconds"),
            "engine": ("mixed_precision", "compile"),
        }
        for group, names in groups.items():
            for name in names:
                if name not in record.get(group, names):
                    found = f"damaged: its {group} has no {name}"
                    raise ValueError(f"{self.folder}/run.json: {found}")
        return record

    @property
    def task(self) -> str:
        """What the run does, given as a command's name: pretrain, classify, segment or fewshot."""
        return self.config.get("task", "pretrain")

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.record["status"] == "finished"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of the logged steps, oldest first; empty if there are none. Damaged lines,
        such as a line that was cut off when the run was killed, are left out.
        """
        found, file = [], self.folder / "metrics.jsonl"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        for line in lines:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and isinstance(values.get("step"), int):
                    found.append(values)
        return found

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of a downstream run's results.json; None before it exists."""
        file = self.folder / "results.json"
        return read_checked(file) if file.is_file() else None

    @property
    def cost(self) -> dict[str, Any] | None:
        """Steps, CPU seconds, wall seconds and memory so far; None before the first checkpoint."""
        if (cost := self.record.get("cost")) is None and (newest := self.checkpoint):
            cost = read_checked(newest / "state.json")
        return cost

    @property
    def cpu_minutes(self) -> float:
        """The CPU-minutes of a finished run, including stage I and cached targets."""
        cost = self.record["cost"]
        return (cost["cpu_seconds"] + (cost.get("stage1_cpu_seconds") or 0)) / 60

    @property
    def engine(self) -> dict[str, Any] | None:
        """Precision, compilation and device, as chosen when the run began; None if not stored."""
        found, file = self.record.get("engine"), self.folder / "engine.json"
        if not found and file.exists():  # version 0.1.0 stored them there
            found = read_checked(file, "mixed_precision", "compile")
        return found

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the newest checkpoint; None if there is none."""
        return max((self.folder / "checkpoints").glob("step-*"), default=None)

    @property
    def encoder(self) -> Path:
        """The folder of a finished pretraining run's encoder."""
        return self.folder / "encoder"

    @property
    def untrained(self) -> Path:
        """The folder of the untrained encoder (see the top of this file)."""
        return self.folder / "untrained"

    @property
    def snapshots(self) -> dict[int, Path]:
        """The folders of all stored encoders of a finished run, by step: the untrained encoder (as
        step 0), the snapshots, and the final encoder.
        """
        folders = (self.folder / "snapshots").glob("step-*")
        between = {int(folder.name.removeprefix("step-")): folder for folder in folders}
        return {0: self.untrained, self.record["cost"]["step"]: self.encoder} | between

    @property
    def stages(self) -> list["Run"]:
        """The runs of stage I, ordered by folder name."""
        return [Run(folder) for folder in sorted(self.folder.glob("stage1/*"))]

    @property
    def teachers(self) -> dict[str, Path]:
        """The folders of a run's other networks, by name, such as "stage1 dvae" or "given 0". These
        are the networks that stage I trained, and copies of the networks that the settings name by
        path or Hub id.
        """
        folders = [stage.folder for stage in self.stages]
        folders += sorted(self.folder.glob("given/*"))
        return {f"{folder.parent.name} {folder.name}": folder for folder in folders}
