"""Apply a function to the entries of a list in several processes, and return results in order.

If an entry crashes a worker process, only the result of this entry is lost. But with one worker,
`mapped` calls the function in this process, so such an entry crashes the whole program.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any

import torch

from jepa3d.plain import progress_bar

CRASHED = "its parser crashed"
# a picklable function from a list of entries to a list with one result per entry; a result of type
# str is an error text
Work = Callable[[list], list]


def mapped(
    work: Work, entries: list, chunk: int, workers: int, doing: str, preload: str
) -> Iterator[tuple[Any, Any]]:
    """Yield each entry with its result, in order, and show a progress bar.

    work: called with up to `chunk` entries at a time. workers: number of processes, 0 for one per
    core; with 1, this process does the work itself. doing: text before the bar. preload: name of a
    module that is imported once, before the processes are forked.
    """
    chunks = [entries[at : at + chunk] for at in range(0, len(entries), chunk)]
    workers = workers or os.cpu_count() or 1
    parallel = isolated(chunks, work, workers, preload)
    results = parallel if workers > 1 else map(work, chunks)
    with progress_bar(doing=doing, total=len(entries)) as bar:
        for inputs, found in zip(chunks, results, strict=True):
            yield from zip(inputs, found, strict=True)
            bar.update(len(inputs))


def isolated(chunks: list, work: Work, workers: int, preload: str) -> Iterator[list]:
    """Yield for each chunk, in order, the list of results of `work`.

    If a process dies, Python ends all processes of the pool. Then the oldest chunk without results
    is tried again entry by entry, each entry alone in a new process. An entry that kills this
    process too has the result CRASHED. The other chunks without results start again in a new pool;
    if one of them kills a process, the same happens again.
    """
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([preload])
    if sys.platform == "win32":
        workers = min(workers, 61)  # the most that Python allows on Windows

    def pool(processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(processes, context, initializer=_start_worker)

    left, executor = iter(chunks), pool(workers)
    # chunks and their future results, oldest first
    running: list[tuple[list, Future]] = []

    def start(chunk: list) -> tuple[list, Future]:
        future = Future()
        # if `submit` fails because an earlier chunk has just broken the pool, this future is
        # returned; the loop below handles its exception
        future.set_exception(BrokenProcessPool())
        with suppress(BrokenProcessPool):
            future = executor.submit(work, chunk)
        return chunk, future

    others = set(multiprocessing.active_children())
    try:
        with _interrupts_later():
            # more chunks than processes, so that no process waits while results are being used
            running += map(start, islice(left, 4 * workers))
        while running:
            chunk, future = running.pop(0)
            try:
                results = future.result()
            except BrokenProcessPool:
                executor.shutdown(cancel_futures=True)
                results = [_alone(pool(1), entry, work) for entry in chunk]
                executor = pool(workers)
                running = [(c, f) if _is_done(f) else start(c) for c, f in running]
            running += map(start, islice(left, 1))
            yield results
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # otherwise, it would finish its chunk after Ctrl-C


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Delay Ctrl-C until the block ends; processes that the block starts never receive Ctrl-C.

    Where signals cannot be blocked (on Windows), this does nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # start Python's resource tracker now: if it started inside the block, it would unblock SIGINT
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_done(future: Future) -> bool:
    """Return True if a future has a result, rather than an exception."""
    return future.done() and not future.cancelled() and future.exception() is None


def _alone(executor: ProcessPoolExecutor, entry: Any, work: Work) -> Any:
    """Return the result of `work` for a single entry, or CRASHED. Closes the executor."""
    with executor:
        try:
            return executor.submit(work, [entry]).result()[0]
        except BrokenProcessPool:
            return CRASHED


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Wait until the parent process ends, for whatever reason; then end this process."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
