"""Locks files and folders so that only one command writes them; a lock ends with its process, even
if it is killed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context manager: hold the lock of a file or folder while this process writes it.

    The lock is the file `.NAME.lock` beside it. Afterwards it is deleted, and so are folders made
    for it that are still empty. Readers need no lock. Raises ValueError if another command holds
    it.
    """
    real = Path(os.path.realpath(path))  # the same for all links and spellings
    made = [folder for folder in real.parents if not folder.exists()]
    real.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(real.with_name(f".{real.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{path}: another command is writing there; wait for it to end, or choose another"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open; the folder may be gone
            # while the lock is held: a process that opened the file before sees that it is gone
            os.unlink(lock.lock_file)
        lock.release()
        with suppress(OSError):  # stops at the first folder that is not empty
            for folder in made:
                folder.rmdir()
