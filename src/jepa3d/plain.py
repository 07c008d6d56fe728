"""Converts settings between plain values (YAML, JSON) and frozen dataclasses; also reads small
files, and writes them atomically.
"""

import csv
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import io
import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import ge, gt, le, lt
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin

import yaml
from cyclopts import Group, Parameter

from jepa3d.locking import writing

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

# The logger of the library's progress messages. They are not shown unless a program adds a handler,
# as the command line does.
log = logging.getLogger("jepa3d")
log.addHandler(logging.NullHandler())


def progress_bar(items: Iterable | None = None, doing: str = "", **settings: Any) -> "tqdm":
    """Make a progress bar on standard error, which appears after one second.

    items: what to iterate over; without items, `settings` may contain tqdm's `total`. doing: the
    text before the bar. settings: arguments of tqdm. The bar is hidden if standard error is not a
    terminal, or if the library's messages are not shown.
    """
    from tqdm import tqdm  # imported here, so that importing jepa3d stays quick

    hidden = not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO))
    look: dict[str, Any] = {"delay": 1, "leave": False, "dynamic_ncols": True, "disable": hidden}
    return tqdm(items, doing, **look | settings)


def merge(base: dict, *overrides: dict) -> dict:
    """Merge nested dictionaries; the value of a later dictionary replaces an earlier value."""
    out = dict(base)
    for override in overrides:
        for key, value in override.items():
            nested = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merge(out[key], value) if nested else value
    return out


def read_recipe(path: str | Path) -> dict:
    """Read a recipe: a YAML file of settings, which may also name a preset.

    Raises ValueError if the file cannot be read or does not contain a mapping.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: this recipe cannot be read: {reason}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe must be a YAML mapping of settings")
    return recipe


def from_dict(cls: type, values: dict, where: str = "") -> Any:
    """Build a dataclass of settings, which may contain other dataclasses, from plain values.

    where: prefix of the settings' names in messages. Raises ValueError for a value of a wrong type,
    and for an unknown key; the message then suggests a similar known key, if there is one.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ValueError(f"setting {name!r} is unknown{nearest(key, fields)}")
        kind = fields[key].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"setting {name!r} must be a group of settings, not {value!r}")
            made[key] = from_dict(kind, value, f"{name}.")
        else:
            made[key] = _checked(name, value, kind)
    return cls(**made)


def setting(default: Any, help: str = "", allowed: str | None = None, **presets: Any) -> Any:
    """Make a field of a dataclass of settings (see `configuration`).

    help: the field's text in `--help` and docs/settings.md. allowed: the range of a number, or of
    each number in a tuple, such as "[0, 1)"; "[0, 1] rising" also requires that no number is lower
    than the number before it. presets: preset name -> value, for the presets that change the
    default.
    """
    metadata = {"doc": help, "range": allowed, "presets": presets}
    return dataclasses.field(default=default, metadata=metadata)


def configuration(title: str) -> Callable[[type[T]], type[T]]:
    """Return a decorator that turns the fields of a dataclass of settings into command-line flags.

    title: the heading above these flags in `--help`. If a field only changes the default of a base
    class's field, it keeps the help and range of that field.
    """

    def decorate(cls: type[T]) -> type[T]:
        base = getattr(cls.__base__, "__dataclass_fields__", {})
        for part in dataclasses.fields(cast(Any, cls)):
            if part.name in inspect.get_annotations(cls):
                metadata = {**base.get(part.name, part).metadata, "presets": {}}
                own = part.metadata.items()
                metadata |= {key: value for key, value in own if value}
                presets = metadata["presets"].items()
                others = ", ".join(f"{name} {value}" for name, value in presets)
                text = f"{metadata.get('doc', '')} {f'[{others}]' if others else ''}"
                metadata["help"] = text.strip()
                part.metadata = MappingProxyType(metadata)
        # in --help, the group "Run" comes first, then the other groups in the order of config.py
        order = int(title != "Run")
        return Parameter(group=Group.create_ordered(title, sort_key=order))(cls)

    return decorate


def check_ranges(config: Any, where: str = "") -> None:
    """Raise ValueError for the first setting outside its range, also in nested groups. The value
    None is always allowed.
    """
    for part in dataclasses.fields(config):
        value, name = getattr(config, part.name), f"{where}{part.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif (allowed := part.metadata.get("range")) and value is not None:
            _check_range(name, value, allowed)


def _check_range(name: str, value: Any, allowed: str) -> None:
    """Check a number, or the numbers in a tuple, against the range `allowed`.

    Raises ValueError if a number lies outside the range, or if the range says "rising" and a number
    is lower than the number before it.
    """
    match = re.fullmatch(r"([\[(])(.+), (.+)([\])])( rising)?", allowed)
    assert match, allowed
    opens, low, high, closes, rising = match.groups()
    numbers = value if isinstance(value, tuple) else (value,)
    above, below = (ge if opens == "[" else gt), (le if closes == "]" else lt)
    # NaN is refused too: every comparison with NaN is false
    if not all(above(x, float(low)) and below(x, float(high)) for x in numbers):
        bound = "positive" if (opens, low) == ("(", "0") else f"at least {low}"
        limits = f"be {bound} and at most {high}"
        if float(high) <= 1:
            limits = f"lie in {allowed.removesuffix(' rising')}"
        raise ValueError(f"{name} {value} must {limits}")
    if rising and list(numbers) != sorted(numbers):
        raise ValueError(f"{name} {value} must satisfy low <= high")


def to_dict(config: Any) -> dict:
    """Convert a dataclass of settings to plain JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(values: dict, reference: dict, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings in `values` that differ from a reference, as name -> (value, reference).

    The name of a nested setting has dots. Settings that only the reference has are ignored.
    """
    out = {}
    for key, value in values.items():
        other = reference.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            out |= differences(value, other, f"{where}{key}.")
        elif value != other:
            out[f"{where}{key}"] = (value, other)
    return out


def nearest(name: str, known) -> str:
    """Return a text that suggests the most similar known name, or "" if no name is similar."""
    close = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_code(name: str) -> bool:
    """Return whether the value of a setting names a user's function: `package.module:function`."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) is not None


def load_code(name: str) -> Any:
    """Import the function `package.module:function`. Raises ValueError if it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: cannot be imported ({error})") from error


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError if a value is not one of the choices and does not name a user's function."""
    if value not in choices and not is_code(value):
        known = f"{', '.join(choices)} or package.module:function"
        raise ValueError(f"{name} {value!r}: use {known}{nearest(value, choices)}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: add `path` to an OSError that names no file, such as "no space left"."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def printable(text: str) -> str:
    """Make text safe for a terminal: a control character becomes ?, and a byte that is not UTF-8
    becomes an escape such as \\udcff.
    """
    plain = (c if c.isprintable() or unicodedata.category(c) in ("Zs", "Cs") else "?" for c in text)
    return "".join(plain).encode("utf-8", "backslashreplace").decode()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: yield a temporary path to write to; at the end, the file written there
    replaces the file at `path`, atomically and durably.

    Other processes see either the old or the new file. After an error, such as a full disk, the
    temporary file is deleted.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably, and make the folders that contain it.

    Raises ValueError if another command is writing the same file.
    """
    with writing(path), naming(path), replacing(path) as partial:
        partial.write_bytes(content)


def write_csv(path: Path, *rows: Sequence) -> None:
    """Write a CSV file with `write_bytes`; the first of `rows` is its header."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))


def write_checked(path: Path, value: dict) -> None:
    """Write a JSON object and its checksum to a file, with `write_bytes`."""
    write_bytes(path, json.dumps({"sha256": _digest(value)} | value, indent=2).encode())


def read_checked(path: Path, *needed: str) -> dict:
    """Read a JSON object that `write_checked` wrote.

    needed: keys that the object must have. A file without a checksum is accepted: RUN/run.json has
    none because people may edit it, and files of version 0.1.0 have none. Raises ValueError if the
    file is missing, is damaged or lacks a key.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged or cut off ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: it is not a JSON object")
    written = value.pop("sha256", None)
    if written is not None and written != _digest(value):
        raise ValueError(f"{path}: damaged: its checksum is wrong")
    if lacking := [key for key in needed if key not in value]:
        raise ValueError(f"{path}: damaged: it has no {lacking[0]}")
    return value


def sha256_of(path: Path) -> str | None:
    """Return the sha256 of a file, or None if the file does not exist."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _digest(value: dict) -> str:
    """Return the sha256 of a JSON object; the order of its keys has no effect."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Convert the value of a setting to the type `kind`: scalar, Literal, Optional or tuple.

    Raises ValueError if the value does not fit the type.
    """
    origin, args = get_origin(kind), get_args(kind)
    wrong = f"setting {name!r}: {value!r} is not"
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{wrong} one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        wanted = len(args) if Ellipsis not in args else None
        if not isinstance(items, (list, tuple)) or (wanted and len(items) != wanted):
            raise ValueError(f"{wrong} a list of {wanted or 'several'} values")
        return tuple(_checked(name, item, args[0]) for item in items)
    if type(None) in args:
        return None if value is None else _checked(name, value, args[0])
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        with suppress(ValueError):
            return float(value)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{wrong} of type {kind.__name__}")
    return value
