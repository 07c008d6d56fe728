"""Saving and loading a network: a folder or a Hub repository of config.json and model.safetensors."""

import hashlib
import http.client
import inspect
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_origin

import safetensors.torch
import torch
from huggingface_hub import ModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from jepa3d.plain import nearest

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REACHED_WITHIN = 5  # seconds; the Hub's own client tries six times, for half a minute


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, their checksum among the metadata.

    OSError names a file that cannot be written.
    """
    try:
        safetensors.torch.save_file(tensors, path, {"sha256": _digest(tensors)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError, which names it, where it is damaged.

    A file without a checksum (made by version 0.1.0, or by others) is taken as it is.
    """
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cut off or damaged ({str(error).splitlines()[0]})") from error
    if written is not None and written != _digest(tensors):
        raise ValueError(f"{path}: damaged: its checksum is not the one written")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Pretrained(nn.Module, ModelHubMixin):
    """`save_pretrained(folder)`, `from_pretrained(folder or Hub id)`, `push_to_hub`; loads all
    weights or none.

    The arguments of `__init__` travel as config.json and must be plain values.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        for name in getattr(
            self, "PARTS", {}
        ):  # whole: what a part does not say is what `BEFORE` says
            vars(self)["_hub_mixin_config"][name] = vars(getattr(self, name))["_hub_mixin_config"]
        weights = {
            name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()
        }
        save_file(weights, save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        force_download=False,
        token=None,
        cache_dir=None,
        local_files_only=False,
        revision=None,
        **settings,
    ):
        """The network in a folder of `save_pretrained` or a Hub repository, in evaluation mode;
        `settings` override.

        Raises ValueError, which names the file at fault and what is expected of it.
        """
        folder = local_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        file, weights = folder / "config.json", folder / "model.safetensors"
        found = _as_made(cls, read_settings(folder))
        known = {name: value for name, value in found.items() if name in _arguments(cls)} | settings
        _check(cls, known, f"{file}: is not one of {cls.__name__}")
        try:
            model = cls(**known)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{file}: makes no {cls.__name__} ({first_line(error)})") from error
        tensors = load_file(weights)
        expected = model.state_dict()
        wrong = [
            name
            for name in sorted(tensors.keys() | expected.keys())
            if _differ(tensors, expected, name)
        ]
        if wrong:
            raise ValueError(
                f"{weights}: not the weights of the {cls.__name__} in {file.name}: {wrong[0]} "
                f"{_differ(tensors, expected, wrong[0])}"
                + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            )
        for name, values in tensors.items():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{weights}: {name} holds NaN or infinite values: train again, or take other weights"
                )
        model.load_state_dict(tensors)
        return model.eval()


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    return {
        name: value
        for name, value in inspect.signature(cls.__init__).parameters.items()
        if name != "self"
    }


def _as_made(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file, an argument younger than it as the network was before:

    `cls.BEFORE`, else its default.
    """
    made = getattr(cls, "BEFORE", {}) | settings
    parts = {
        name: part
        for name, part in getattr(cls, "PARTS", {}).items()
        if isinstance(made.get(name), dict)
    }
    return made | {name: _as_made(part, made[name]) for name, part in parts.items()}


def _check(cls: type, settings: dict[str, Any], begin: str) -> None:
    """ValueError where settings lack an argument of a class (its first one is always needed), or
    one has another type.

    Arguments that hold those of another network, `cls.PARTS`, are checked alike.
    """
    arguments = _arguments(cls)
    first = next(iter(arguments))
    needed = [
        name for name, value in arguments.items() if value.default is value.empty or name == first
    ]
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"{begin}: it lacks {', '.join(missing)}")
    for name, value in settings.items():
        if name not in arguments:
            raise ValueError(f"{begin}: {name} is unknown{nearest(name, arguments)}")
        wanted = get_origin(arguments[name].annotation) or arguments[name].annotation
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{begin}: {name} is {value!r}, not of type {wanted.__name__}")
        if wanted is int and value < 1 and name != "layer":  # -1 is the last
            raise ValueError(f"{begin}: {name} is {value}, and at least 1 is needed")
        if part := getattr(cls, "PARTS", {}).get(name):
            _check(part, settings[name], f"{begin}: {name}")


def _differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> str:
    """How a tensor differs from what is expected, in words; empty where it does not."""
    if name not in found:
        return "is missing"
    if name not in expected:
        return "has no place in it"
    sizes = list(found[name].shape), list(expected[name].shape)
    return "" if sizes[0] == sizes[1] else f"has the shape {sizes[0]}, not {sizes[1]}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_settings(folder: Path) -> dict[str, Any]:
    """What config.json in a folder holds.

    Raises ValueError, which names the file, where it is missing or damaged.
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: is missing, so {folder} holds no network") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or not JSON ({first_line(error)})") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file}: holds a value of type {type(settings).__name__}, not the settings of a network"
        )
    return settings


# -------------------------------------------------------------------------------- what a name means


def check_name(model: str | Path, known: Iterable[str] = ()) -> bool:
    """True if a folder or file lies at `model`, False if it can only be of the Hub: owner/name.

    Raises ValueError for any other name, with the most similar one of `known` and of what lies
    beside it.
    """
    if Path(model).exists():
        return True
    if _HUB_ID.fullmatch(str(model)):
        return False
    raise ValueError(
        f"{model}: neither a folder nor a Hub id (owner/name){similar(Path(model), known)}"
    )


def similar(path: Path, known: Iterable[str] = ()) -> str:
    """`; did you mean ...?`, where a name is like `path`."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    found = nearest(path.name, [*known, *(folder.name for folder in beside if folder.is_dir())])
    return (
        found.replace("mean '", f"mean '{path.parent}/") if found and len(path.parts) > 1 else found
    )


def local_folder(model: str | Path, **options: Any) -> Path:
    """The folder at `model`, or the local copy of the Hub repository of that id; `options` of
    `hf_hub_download`.

    Asks the Hub only for owner/name, and only if it answers within seconds. Raises ValueError.
    """
    if check_name(model):
        if Path(model).is_dir():
            return Path(model)
        raise ValueError(f"{model}: a file, and the folder of a network is expected")
    begin = f"{model}: neither a folder nor a repository of the Hub that can be had"
    unreachable = (
        "" if options.get("local_files_only") or constants.HF_HUB_OFFLINE else _unreachable()
    )
    if unreachable:
        options |= {"local_files_only": True}
    try:
        files = [
            hf_hub_download(str(model), name, **options)
            for name in ("config.json", "model.safetensors")
        ]
    except LocalEntryNotFoundError as error:
        reason = unreachable or "this machine is told to stay offline"
        raise ValueError(
            f"{begin} ({reason}, and no copy is kept here){similar(Path(model))}"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{model}: a repository of the Hub without config.json or model.safetensors"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{begin} ({first_line(error)}){similar(Path(model))}") from error
    return Path(files[0]).parent


def _unreachable() -> str:
    """Why the Hub cannot be reached; empty where it answers, whatever it says."""
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACHED_WITHIN).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return (
            ""
            if isinstance(reason, ssl.SSLError)
            else f"{constants.ENDPOINT} cannot be reached: {reason}"
        )
    return ""
