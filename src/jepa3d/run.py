"""Run folders: what `jepa3d pretrain`, `classify`, `segment` and `fewshot` leave behind, read.

config.json         the resolved settings         run.json       data, versions, status, cost
metrics.jsonl       one line per logged step      results.json   figures of a downstream run
untrained/          the encoder before step 1     encoder/, dvae/ or model/   the trained network
stage1/NAME/        stage I's own runs            given/N/       copies of networks named by path
snapshots/step-N/   the encoder on its way        checkpoints/   of a run that is not finished

`training/pretrain.py` and `training/finetune.py` write them. A downstream run has a task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa3d.config import KINDS, FewshotConfig, resolve
from jepa3d.plain import from_dict, merge, read_checked, to_dict


@dataclass(frozen=True)
class Run:
    """A run in a folder; nothing is read before it is asked for.

    Properties raise ValueError, which names the file, where it is missing or damaged.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Whether there is a run in this folder, finished or not."""
        return (Path(folder) / "run.json").is_file()

    @property
    def config(self) -> dict[str, Any]:
        """The settings in config.json; one that is newer than the run has the value it had then."""
        file = self.folder / "config.json"
        try:
            values = json.loads(file.read_text())
            if values.get("mixed_precision") == "auto":  # of version 0.1.0, where it was a trial
                values["mixed_precision"] = "measure"
            task = {"task": values.pop("task")} if "task" in values else {}
            # The folds of a few-shot run are runs of their own, and say `classify`.
            kind = FewshotConfig if "ways" in values else KINDS[task.get("task", "pretrain")]
            values = merge({"encoder": {"qkv_bias": True}}, values)  # before it was a setting
            return task | to_dict(from_dict(kind, values) if task else resolve(values))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file}: not the settings of a run of this version ({error})"
            ) from error

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says: data, status, command, and what is known of cost and precision."""
        record = read_checked(self.folder / "run.json", "status", "data", "command")
        groups = {
            "data": ("name", "shapes", "fingerprint"),
            "cost": ("cpu_seconds", "wall_seconds"),
            "engine": ("mixed_precision", "compile"),
        }
        for group, names in groups.items():
            for name in names:
                if name not in record.get(group, names):
                    raise ValueError(f"{self.folder}/run.json: damaged: its {group} has no {name}")
        return record

    @property
    def task(self) -> str:
        """The command that made it: pretrain, classify, segment or fewshot."""
        return self.config.get("task", "pretrain")

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps, oldest first; lines that a kill cut off are left out."""
        lines, file = [], self.folder / "metrics.jsonl"
        for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines

    @property
    def result(self) -> dict[str, Any] | None:
        """results.json of a downstream run; None as long as there is none."""
        file = self.folder / "results.json"
        return read_checked(file) if file.is_file() else None

    @property
    def cost(self) -> dict[str, Any] | None:
        """Step, CPU and wall seconds and memory, so far; None before the first checkpoint."""
        if (cost := self.record.get("cost")) is None and (newest := self.checkpoint):
            cost = read_checked(newest / "state.json")
        return cost

    @property
    def cpu_minutes(self) -> float:
        """What a finished run took, stage I and cached targets included."""
        cost = self.record["cost"]
        return (cost["cpu_seconds"] + (cost.get("stage1_cpu_seconds") or 0)) / 60

    @property
    def engine(self) -> dict[str, Any] | None:
        """Precision, compilation and device it began with; None where a run does not say."""
        if found := self.record.get("engine"):
            return found
        file = self.folder / "engine.json"  # of version 0.1.0
        return read_checked(file, "mixed_precision", "compile") if file.exists() else None

    @property
    def checkpoint(self) -> Path | None:
        """The newest one."""
        return max((self.folder / "checkpoints").glob("step-*"), default=None)

    @property
    def encoder(self) -> Path:
        """Where a pretraining run's encoder is, once it is finished."""
        return self.folder / "encoder"

    @property
    def untrained(self) -> Path:
        """Where the encoder before the first step is."""
        return self.folder / "untrained"

    @property
    def snapshots(self) -> dict[int, Path]:
        """The encoder at every step of which it was kept: the first, the last and those between."""
        folders = (self.folder / "snapshots").glob("step-*")
        between = {int(folder.name.removeprefix("step-")): folder for folder in folders}
        return {0: self.untrained, self.record["cost"]["step"]: self.encoder} | between

    @property
    def stages(self) -> list["Run"]:
        """The runs of stage I."""
        return [Run(folder) for folder in sorted(self.folder.glob("stage1/*"))]

    @property
    def teachers(self) -> dict[str, Path]:
        """Networks that stage I trained or that were given by path, by name."""
        folders = [*(stage.folder for stage in self.stages), *sorted(self.folder.glob("given/*"))]
        return {f"{folder.parent.name} {folder.name}": folder for folder in folders}
