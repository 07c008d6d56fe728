"""One writer at a time: a lock beside what a command writes, which ends with the process, even a
killed one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Hold the lock of a file or folder that this process writes; readers need none.

    The lock is `.NAME.lock` beside it, and gone afterwards, as are folders made for it that are
    still empty. Raises ValueError where another command holds it.
    """
    real = Path(os.path.realpath(path))  # whatever link or spelling leads there
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
            os.unlink(
                lock.lock_file
            )  # while it is held: whoever opened it before sees that it has no name any more
        lock.release()
        with suppress(OSError):  # the first that is not empty
            for folder in made:
                folder.rmdir()
