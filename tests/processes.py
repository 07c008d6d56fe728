"""Commands in separate processes, forked from a process that has already imported jepa3d."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from jepa3d.cli import main

PRELOADED = ["jepa3d.cli", "jepa3d.training.pretrain", "jepa3d.inference.embedding"]


class Command:
    """A command that runs in a separate process.

    words: the words of the command. log: what the command prints goes to LOG.out and LOG.err.
    before: a function of a test's module, which is called in the process before the command.
    environment: environment variables of the process.
    """

    def __init__(
        self, *words: object, log: Path, before: Callable[[], None] | None = None, **environment
    ):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(PRELOADED)
        given = [str(word) for word in words], str(log), before, environment
        self.process: BaseProcess = context.Process(target=_run, args=given)
        self.process.start()

    def printed(self, stream: str = "out") -> str:
        """Return what the command has printed to "out" or "err" so far."""
        file = Path(f"{self.log}.{stream}")
        return file.read_text() if file.exists() else ""

    def wait_for(self, text: str) -> None:
        """Wait until the command has printed a text, or has ended."""
        while text not in self.printed() and self.process.is_alive():
            time.sleep(0.01)

    def end(self) -> int | None:
        """Wait for the end of the command. Returns its exit status, or minus the signal that killed
        it.
        """
        self.process.join(120)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _run(
    words: list[str], log: str, before: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    # SIGINT is ignored in background jobs, and blocked if data/parallel.py started the fork server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    if before:
        before()
    main(words)


def two_processes(*words: object, log: Path) -> str:
    """Run a command in two processes, joined by gloo as torchrun joins them. Returns what it
    prints.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [
        Command(*words, log=log.with_name(f"{log.name}-{i}"), RANK=i, LOCAL_RANK=i, **shared)
        for i in "01"
    ]
    for command in both:
        assert command.end() == 0, command.printed("err")
    return "".join(command.printed() for command in both)
