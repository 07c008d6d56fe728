"""Locks for files and folders, so that only one command at a time writes them. A lock ends with
its process, even if the process is killed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Hold the lock of a file or folder during a `with` block that writes it.

    The lock is a file `.NAME.lock` beside the file or folder NAME. At the end, the lock file is
    deleted, and so are parent folders that were made for it and are still empty. Readers need no
    lock. Raises ValueError if another command holds the lock.
    """
    real = Path(os.path.realpath(path))  # all links to a path and all its spellings share one lock
    made = [folder for folder in real.parents if not folder.exists()]
    real.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(real.with_name(f".{real.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{path}: another command is writing there; wait until it ends, or choose another path"
        ) from None
    try:
        yield
    finally:
        # Deleting the lock file fails if its folder is gone. On Windows, it also fails while the
        # file is open; the file then stays, and later commands lock it again.
        with suppress(OSError):
            # Delete the file before the release: after it, the file may be locked by another
            # process. A process that opened the file before it was deleted may lock it then. This
            # does no harm, since its FileLock notices that the file is gone and tries again.
            os.unlink(lock.lock_file)
        lock.release()
        # The loop stops, with a suppressed error, at the first folder that is not empty.
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
