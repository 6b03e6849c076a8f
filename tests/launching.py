"""Ranks of a test's launch, forked from a process that has imported what they need already.

To import it takes seconds, which is most of a small test. Signals, exit codes and process groups
are those of ordinary ranks. test_launch.py and test_two_nodes.py use the real launchers.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from conftest import draw, outside
from matplotlib.figure import Figure

from opfa.training.distributed import end_process

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["imported_once"])


class Launch:
    """Processes that run `main` of a module in tests/, ended by process id whatever happens."""

    def __init__(
        self, module: str, arguments: Sequence[object], directory: Path, ranks: int
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.errors = [directory / f"stderr-{rank}" for rank in range(ranks)]
        self.processes = []
        for rank, file in enumerate(self.errors):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            settings = outside(**place, **address, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
            words = [module, *map(str, arguments)]
            process = CONTEXT.Process(target=_run, args=(words, settings, file))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, seconds: float = 240) -> list[int | None]:
        """Exit codes, None where a process still runs."""
        return [self.wait_for(rank, seconds) for rank in range(len(self.processes))]

    def wait_for(self, rank: int, seconds: float) -> int | None:
        self.processes[rank].join(seconds)
        return self.processes[rank].exitcode

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    @property
    def is_over(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def said(self, rank: int) -> str:
        return self.errors[rank].read_text()


def _run(words: list[str], settings: dict[str, str], errors: Path) -> None:
    """What each process does."""
    os.environ.clear()
    os.environ.update(settings)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    Figure.savefig = draw  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = words
    end_process(importlib.import_module(words[0]).main() or 0)
