"""Archives of files.

`jepa3d prepare` unpacks them, since it copies their clouds; other commands refuse them.
"""

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import first_line, printable
from jepa3d.data.io import refusal
from jepa3d.plain import log

_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
REFUSAL = "an archive: unpack it first, or make a store of it with jepa3d prepare"
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, zlib.error)
# An archive may unpack to this many times its size, and always to this many bytes.
_MOST = 100, 1 << 30


def is_archive(path: Path) -> bool:
    """Whether a file is an archive, by its name. A compressed single file such as a.ply.gz is none."""
    return path.suffix.lower() in _SUFFIXES and refusal(path) is not None


@contextmanager
def unpacked(source: Path, out: Path) -> Iterator[Path]:
    """A folder with the files of an archive, beside `out` and removed afterwards; other sources
    unchanged.

    The caller must hold the lock of `out`. Raises ReadError for an archive that is damaged or too
    large, or that would write outside its folder.
    """
    if not (source.is_file() and is_archive(source)):
        yield source
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # left by a killed command, since the lock is held here
    for left in out.parent.glob(f".{escape(out.name)}.unpacked-*"):
        shutil.rmtree(left)
    made = tempfile.mkdtemp(prefix=f".{out.name}.unpacked-", dir=out.parent)
    folder = Path(made).resolve()
    try:
        log.info(f"unpacking {printable(str(source))}")
        try:
            if source.suffix.lower() == ".zip":
                _unzip(source, folder)
            else:
                _untar(source, folder)
        except _DAMAGE as error:
            what = f"damaged or refused archive ({first_line(error)})"
            raise ReadError(f"{source}: {what}") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if not (folder / name).resolve().is_relative_to(folder):
                what = f"member {name!r} would be written outside its folder"
                raise ReadError(f"{source}: {what}")
        total = sum(member.file_size for member in archive.infolist())
        _check_size(source, folder, total)
        archive.extractall(folder)


def _untar(source: Path, folder: Path) -> None:
    """Members are unpacked one by one, since the claimed size of each is checked before it is
    written.
    """
    with tarfile.open(source) as archive:
        total = 0
        for member in archive:
            total += member.size
            _check_size(source, folder, total)
            archive.extract(member, folder, filter="data")


def _check_size(source: Path, folder: Path, total: int) -> None:
    """Raises ReadError if the files are far larger than their archive, or do not fit on the disk."""
    size = f"would unpack to {total:,} bytes"
    if total > max(_MOST[0] * source.stat().st_size, _MOST[1]):
        raise ReadError(f"{source}: {size}, too many for its size; unpack it yourself")
    if total > (free := shutil.disk_usage(folder).free):
        raise ReadError(f"{source}: {size} beside the store, where {free:,} are free")
