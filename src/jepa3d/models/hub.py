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
from typing import Any, ClassVar, get_origin

import safetensors.torch
import torch
from huggingface_hub import ModelHubMixin, constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from jepa3d.plain import nearest

DEFAULT = Path(__file__).parents[1] / "weights"  # the encoder of the package
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_DOWNLOAD = ("revision", "cache_dir", "force_download", "token", "local_files_only")
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
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cut off or damaged ({first_line(error)})") from error
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

    # Arguments that hold those of another network; arguments younger than a file, and what
    # networks were before they came.
    PARTS: ClassVar[dict[str, type]] = {}
    BEFORE: ClassVar[dict[str, Any]] = {}

    def _save_pretrained(self, save_directory: Path) -> None:
        for name in self.PARTS:  # whole: what a part does not say is what `BEFORE` says
            part = vars(getattr(self, name))["_hub_mixin_config"]
            vars(self)["_hub_mixin_config"][name] = part
        state = self.state_dict().items()
        weights = {name: values.detach().cpu().contiguous() for name, values in state}
        save_file(weights, save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """The network in a folder of `save_pretrained` or a Hub repository, in evaluation mode.

        options: revision, cache_dir, force_download, token and local_files_only of a Hub
        repository; others override settings. Raises ValueError, which names the file at fault and
        what is expected of it.
        """
        download = {name: options.pop(name) for name in _DOWNLOAD if name in options}
        folder = local_folder(pretrained_model_name_or_path, **download)
        file, weights = folder / "config.json", folder / "model.safetensors"
        found, names = _as_made(cls, read_settings(folder)), _arguments(cls)
        known = {name: found[name] for name in found if name in names} | options
        _check(cls, known, f"{file}: is not one of {cls.__name__}")
        try:
            model = cls(**known)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            why = f"makes no {cls.__name__} ({first_line(error)})"
            raise ValueError(f"{file}: {why}") from error
        tensors, expected = load_file(weights), model.state_dict()
        names = sorted(tensors.keys() | expected.keys())
        if wrong := list(filter(None, (_differ(tensors, expected, n) for n in names))):
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            what = f"not the weights of the {cls.__name__} in {file.name}"
            raise ValueError(f"{weights}: {what}: {wrong[0]}{more}")
        for name, values in tensors.items():
            if not torch.isfinite(values).all():
                wrong = f"{name} holds NaN or infinite values"
                raise ValueError(f"{weights}: {wrong}: train again, or take others")
        model.load_state_dict(tensors)
        return model.eval()


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    arguments = dict(inspect.signature(cls.__init__).parameters)
    del arguments["self"]
    return arguments


def _as_made(cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, completed by `cls.BEFORE` where the file is older than an argument."""
    complete = cls.BEFORE | settings
    for name, part in cls.PARTS.items():
        if isinstance(complete.get(name), dict):
            complete[name] = _as_made(part, complete[name])
    return complete


def _check(cls: Any, settings: dict[str, Any], begin: str) -> None:
    """Raise ValueError where settings lack an argument of a class (its first one is always needed),
    or one has another type; also of the networks in `cls.PARTS`.
    """
    arguments = _arguments(cls)
    needed = [name for name, value in arguments.items() if value.default is value.empty]
    needed += [name for name in list(arguments)[:1] if name not in needed]
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"{begin}: it lacks {', '.join(missing)}")
    for name, value in settings.items():
        if name not in arguments:
            raise ValueError(f"{begin}: {name} is unknown{nearest(name, arguments)}")
        wanted = get_origin(arguments[name].annotation) or arguments[name].annotation
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            kind = wanted.__name__
            raise ValueError(f"{begin}: {name} is {value!r}, not of type {kind}")
        if wanted is int and value < 1 and name != "layer":  # -1 is the last
            raise ValueError(f"{begin}: {name} is {value}, and at least 1 is needed")
        if part := cls.PARTS.get(name):
            _check(part, settings[name], f"{begin}: {name}")


def _differ(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> str:
    """How a tensor differs from what is expected, in words; empty where it does not."""
    if name not in found:
        return f"{name} is missing"
    if name not in expected:
        return f"{name} has no place in it"
    sizes = list(found[name].shape), list(expected[name].shape)
    if sizes[0] == sizes[1]:
        return ""
    return f"{name} has the shape {sizes[0]}, not {sizes[1]}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in config.json of a folder.

    Raises ValueError, which names the file, where it is missing or damaged.
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: is missing, so {folder} holds no network") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged, not JSON ({first_line(error)})") from error
    if not isinstance(settings, dict):
        found = f"a value of type {type(settings).__name__}"
        raise ValueError(f"{file}: holds {found}, not the settings of a network")
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
    hint = similar(Path(model), known)
    raise ValueError(f"{model}: neither a folder nor a Hub id (owner/name){hint}")


def similar(path: Path, known: Iterable[str] = ()) -> str:
    """`; did you mean ...?`, where a name is like `path`."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    names = [folder.name for folder in beside if folder.is_dir()]
    found = nearest(path.name, [*known, *names])
    if len(path.parts) > 1:
        found = found.replace("mean '", f"mean '{path.parent}/")
    return found


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
    hint, offline = similar(Path(model)), options.get("local_files_only")
    unreachable = "" if offline or constants.HF_HUB_OFFLINE else _unreachable()
    if unreachable:
        options |= {"local_files_only": True}
    names = "config.json", "model.safetensors"
    try:
        files = [hf_hub_download(str(model), name, **options) for name in names]
    except hub_errors.LocalEntryNotFoundError as error:
        reason = unreachable or "this machine is told to stay offline"
        why = f"({reason}, and no copy is kept here)"
        raise ValueError(f"{begin} {why}{hint}") from error
    except hub_errors.EntryNotFoundError as error:
        raise ValueError(
            f"{model}: a repository of the Hub without {' or '.join(names)}"
        ) from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{begin} ({first_line(error)}){hint}") from error
    return Path(files[0]).parent


def _unreachable() -> str:
    """Why the Hub cannot be reached; empty if it answers anything."""
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACHED_WITHIN).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):
            return f"{constants.ENDPOINT} cannot be reached: {reason}"
    return ""
