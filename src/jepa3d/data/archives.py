"""Archives of files:

`jepa3d prepare` unpacks them, since it copies what it needs; other commands refuse them.
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

from jepa3d.data.boundary import line, printable
from jepa3d.data.cloud import ReadError
from jepa3d.data.io import refusal

_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
REFUSAL = "an archive: unpack it first, or make a store of it with jepa3d prepare"
# bytes of the files in an archive: this many times its size, or this many
_MOST = 100, 1 << 30


def is_archive(path: Path) -> bool:
    """Whether a name is that of an archive; a.ply.gz is one file."""
    return path.suffix.lower() in _SUFFIXES and refusal(path) is not None


@contextmanager
def unpacked(source: Path, out: Path) -> Iterator[Path]:
    """The folder of an archive's files, beside `out` and removed afterwards; any other source as it
    is.

    The caller holds the lock of `out`. Raises ReadError for an archive that is damaged, has a
    member that would be written elsewhere, or is too large.
    """
    if not (source.is_file() and is_archive(source)):
        yield source
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(
        f".{escape(out.name)}.unpacked-*"
    ):  # by a killed command: the lock is ours
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.unpacked-", dir=out.parent)).resolve()
    try:
        print(f"unpacking {printable(str(source))}", flush=True)
        try:
            if source.suffix.lower() == ".zip":
                with zipfile.ZipFile(source) as archive:
                    for name in archive.namelist():
                        if not (folder / name).resolve().is_relative_to(folder):
                            raise ReadError(
                                f"{source}: member {name!r} would be written outside its folder"
                            )
                    _check_size(
                        source, folder, sum(member.file_size for member in archive.infolist())
                    )
                    archive.extractall(folder)
            else:
                with tarfile.open(source) as archive:
                    total = 0
                    # one by one: what a header claims is checked before it is written
                    for member in archive:
                        total += member.size
                        _check_size(source, folder, total)
                        archive.extract(member, folder, filter="data")
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            zlib.error,
        ) as error:
            raise ReadError(f"{source}: damaged or refused archive ({line(error)})") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_size(source: Path, folder: Path, total: int) -> None:
    """ReadError where the files of an archive are out of all proportion to it, or do not fit on the
    disk.
    """
    if total > max(_MOST[0] * source.stat().st_size, _MOST[1]):
        raise ReadError(
            f"{source}: would unpack to {total:,} bytes, too many for its size; unpack it yourself"
        )
    if total > (free := shutil.disk_usage(folder).free):
        raise ReadError(
            f"{source}: would unpack to {total:,} bytes beside the store, where {free:,} are free"
        )
