"""Save and load networks, each stored as config.json and model.safetensors in a folder or in a
repository of the Hugging Face Hub.
"""

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

DEFAULT = Path(__file__).parents[1] / "weights"  # the encoder that comes with the package
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_DOWNLOAD = ("revision", "cache_dir", "force_download", "token", "local_files_only")
# How many seconds to wait for an answer from the Hub. Without this limit, the Hub's client would
# retry for 30 seconds.
_REACHED_WITHIN = 5


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, with their checksum in the metadata.

    Raises OSError, which names the file, if the file cannot be written.
    """
    try:
        safetensors.torch.save_file(tensors, path, {"sha256": _digest(tensors)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_file(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    A file without a checksum (from version 0.1.0 or other software) is accepted. Raises
    ValueError, which names the file, if the file is missing, cannot be read or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("sha256")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)})") from error
    if written is not None and written != _digest(tensors):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """Compute the sha256 of the tensors' names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Pretrained(nn.Module, ModelHubMixin):
    """Base class of networks with `save_pretrained(folder)`, `from_pretrained(folder or Hub id)`
    and `push_to_hub`.

    The arguments of `__init__` are stored in config.json, so they must be values that JSON can
    hold. Loading fails unless every weight has the expected name and shape and is finite.
    """

    # PARTS maps each argument that holds the settings of another network to the class of that
    # network; these settings are checked when a network is loaded. BEFORE holds the values of
    # arguments that an older config.json lacks.
    PARTS: ClassVar[dict[str, type]] = {}
    BEFORE: ClassVar[dict[str, Any]] = {}

    def _save_pretrained(self, save_directory: Path) -> None:
        # Store all settings of the inner networks (PARTS), not only those that the caller gave.
        # When config.json is read, a missing setting would get its value in BEFORE, and this
        # network may have another value.
        for name in self.PARTS:
            part = vars(getattr(self, name))["_hub_mixin_config"]
            vars(self)["_hub_mixin_config"][name] = part
        state = self.state_dict().items()
        weights = {name: values.detach().cpu().contiguous() for name, values in state}
        save_file(weights, save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """Load a network from a folder that `save_pretrained` wrote, or from a Hub repository.

        The network is returned in evaluation mode.

        options: revision, cache_dir, force_download, token and local_files_only are passed to the
        Hub's download; all other options override settings in config.json. Raises ValueError, which
        names the file and the problem, if no network can be loaded.
        """
        download = {name: options.pop(name) for name in _DOWNLOAD if name in options}
        folder = local_folder(pretrained_model_name_or_path, **download)
        file, weights = folder / "config.json", folder / "model.safetensors"
        found, names = _with_defaults(cls, read_settings(folder)), _arguments(cls)
        known = {name: found[name] for name in found if name in names} | options
        _check(cls, known, f"{file} does not describe a {cls.__name__}")
        try:
            model = cls(**known)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            why = f"wrong settings for a {cls.__name__} ({first_line(error)})"
            raise ValueError(f"{file}: {why}") from error
        tensors, expected = load_file(weights), model.state_dict()
        names = sorted(tensors.keys() | expected.keys())
        if wrong := list(filter(None, (_differ(tensors, expected, n) for n in names))):
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            what = f"does not hold the weights of the {cls.__name__} in {file.name}"
            raise ValueError(f"{weights} {what}: {wrong[0]}{more}")
        for name, values in tensors.items():
            if not torch.isfinite(values).all():
                wrong = f"{name} holds NaN or infinite values"
                raise ValueError(f"{weights}: {wrong}; use other weights or train again")
        model.load_state_dict(tensors)
        return model.eval()


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of `cls.__init__`, without `self`."""
    arguments = dict(inspect.signature(cls.__init__).parameters)
    del arguments["self"]
    return arguments


def _with_defaults(cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Complete the settings of an older config.json: an argument that the file lacks gets its
    value in `cls.BEFORE`.
    """
    complete = cls.BEFORE | settings
    for name, part in cls.PARTS.items():
        if isinstance(complete.get(name), dict):
            complete[name] = _with_defaults(part, complete[name])
    return complete


def _check(cls: Any, settings: dict[str, Any], begin: str) -> None:
    """Check that settings fit the arguments of a class, and that the settings of its inner networks
    fit the arguments of their classes (`cls.PARTS`).

    begin: first words of an error message. Raises ValueError if an argument is missing, unknown or
    of the wrong type, or if an integer other than `layer` is not positive. Arguments with a default
    may be absent, except the first argument. The first argument must be present, so that the
    config.json of another kind of network, which has none of the arguments, is refused.
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
        if wanted is int and value < 1 and name != "layer":  # a layer of -1 means the last
            raise ValueError(f"{begin}: {name} is {value}, but must be at least 1")
        if part := cls.PARTS.get(name):
            _check(part, settings[name], f"{begin}: {name}")


def _differ(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> str:
    """Return a text that says how a tensor's shape differs from the expected one, or that the
    tensor is missing or unexpected; the text is empty if nothing is wrong.
    """
    if name not in found:
        return f"{name} is missing"
    if name not in expected:
        return f"{name} is not a tensor of this network"
    sizes = list(found[name].shape), list(expected[name].shape)
    if sizes[0] == sizes[1]:
        return ""
    return f"{name} has the shape {sizes[0]}, not {sizes[1]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings in a folder's config.json.

    Raises ValueError, which names the file, if the file is missing, cannot be read or is not a JSON
    object.
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing, so there is no network in {folder}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not JSON ({first_line(error)})") from error
    if not isinstance(settings, dict):
        found = f"a value of type {type(settings).__name__}"
        raise ValueError(f"{file} holds {found}, not the settings of a network")
    return settings


# ------------------------------------------------------------------------------ folders and Hub ids


def check_name(model: str | Path, known: Iterable[str] = ()) -> bool:
    """Return True if `model` is an existing folder or file, False if it does not exist here but has
    the form of a Hub id (owner/name).

    Raises ValueError for any other name. The message suggests a similar name, if there is one in
    `known` or among the folders beside `model`.
    """
    if Path(model).exists():
        return True
    if _HUB_ID.fullmatch(str(model)):
        return False
    hint = similar(Path(model), known)
    raise ValueError(f"{model}: neither a folder nor a Hub id (owner/name){hint}")


def similar(path: Path, known: Iterable[str] = ()) -> str:
    """Return the text `; did you mean ...?` with a name that is similar to that of `path`, if there
    is one in `known` or among the folders beside `path`; otherwise an empty text.
    """
    neighbours = path.parent.iterdir() if path.parent.is_dir() else ()
    names = [folder.name for folder in neighbours if folder.is_dir()]
    found = nearest(path.name, [*known, *names])
    if len(path.parts) > 1:
        found = found.replace("mean '", f"mean '{path.parent}/")
    return found


def local_folder(model: str | Path, **options: Any) -> Path:
    """Return the folder `model`, or the local copy of the Hub repository with the id `model`.

    The Hub is contacted only if there is no such folder and `model` has the form owner/name. If the
    Hub does not answer within 5 seconds, or in offline mode, an earlier download is used. options:
    arguments of `hf_hub_download`. Raises ValueError if `model` is a file, if it is found neither
    here nor on the Hub, or if the repository lacks one of a network's two files.
    """
    if check_name(model):
        if Path(model).is_dir():
            return Path(model)
        raise ValueError(f"{model}: this is a file; give the folder of a network")
    begin = f"{model}: neither a folder nor a Hub repository that can be loaded"
    hint, offline = similar(Path(model)), options.get("local_files_only")
    unreachable = "" if offline or constants.HF_HUB_OFFLINE else _unreachable()
    if unreachable:
        options |= {"local_files_only": True}
    names = "config.json", "model.safetensors"
    try:
        files = [hf_hub_download(str(model), name, **options) for name in names]
    except hub_errors.LocalEntryNotFoundError as error:
        reason = unreachable or "offline mode is set"
        why = f"({reason}, and no copy is stored here)"
        raise ValueError(f"{begin} {why}{hint}") from error
    except hub_errors.EntryNotFoundError as error:
        raise ValueError(f"{model}: this Hub repository lacks {' or '.join(names)}") from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{begin} ({first_line(error)}){hint}") from error
    return Path(files[0]).parent


def _unreachable() -> str:
    """Return a text that says why the Hub cannot be reached.

    The text is empty if the Hub answers, even if it answers with an error. The text is also empty
    after an SSL error, so that the download is tried all the same: the Hub's client may trust other
    certificates than urllib does.
    """
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
