"""Commands in processes of their own, forked from one that has imported jepa3d already."""

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
    """A command that runs: its words, what it prints, and how it ends.

    `before` is a function of a test's module, called in the process before the command.
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
        """What the command has printed on "out" or "err"."""
        file = Path(f"{self.log}.{stream}")
        return file.read_text() if file.exists() else ""

    def wait_for(self, text: str) -> None:
        """Until the command has printed a text."""
        while text not in self.printed() and self.process.is_alive():
            time.sleep(0.01)

    def end(self) -> int | None:
        """Wait for the command's end; returns its exit status, or minus the signal it died of."""
        self.process.join(120)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _run(
    words: list[str], log: str, before: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    # Ignored in a job in the background, blocked where data/parallel.py started the fork server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    if before:
        before()
    main(words)


def two_processes(*words: object, log: Path) -> str:
    """What a command prints that runs on two processes, joined by gloo as torchrun joins them."""
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
