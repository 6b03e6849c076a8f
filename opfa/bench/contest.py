"""Contestants take turns: a process each, which is stopped while another one computes.

Between turns the machine's peak of multiply-adds is measured, since a virtual machine's neighbours
slow it down within seconds. Ratios are of two contestants in the same round.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from opfa.bench.contestants import CONTESTANTS, Contestant, Plan
from opfa.bench.ours import peak
from opfa.bench.speed import Steadiness
from opfa.errors import RunError

WORKER = Path(__file__).with_name("worker.py")
QUIET = {"NM_DISABLE_ANALYTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
CALLS = 3  # of a turn, whose median counts; one before them isn't counted
log = logging.getLogger(__name__)
Task = Callable[[], Sequence[float]]  # a turn, which gives seconds


class Worker:
    """A contestant's process. It is stopped, but for its turns."""

    def __init__(
        self, python: str, contestant: Contestant, paths: Mapping[str, Path], threads: int
    ) -> None:
        """Start it and let it load the models; raises `RunError` with its last words."""
        self._engine = contestant.engine.rpartition(":")[2]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
        how = ["-m", "opfa.bench.worker"] if contestant.is_here else [str(WORKER)]
        chosen = {name: str(path) for name, path in paths.items()}
        options = json.dumps({"paths": chosen, "threads": threads, **contestant.options})
        variables = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), **contestant.variables}
        if not contestant.is_here:  # opfa/bench is not for imports
            variables["PYTHONSAFEPATH"] = "1"
        self._process = subprocess.Popen(
            [python, *how, contestant.engine, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=variables,
        )
        self._answer()

    def ask(self, do: str, **values: Any) -> Any:  # Any: JSON
        """The answer to a request; the process runs only until it has answered."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = [line for line in self._log.read().splitlines() if line.strip()]
            why = said[-1].strip()[:300] if said else f"exit code {self._process.returncode}"
            raise RunError(f"{self._engine} ended: {why}")
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


class Stage:
    """Workers of one section, which end with it."""

    def __init__(self, plan: Plan) -> None:
        """Nobody is there yet."""
        self.plan = plan
        self.left_out: dict[str, str] = {}
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """The stage itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all workers."""
        self._ending.close()

    def add(
        self, name: str, paths: Mapping[str, Path], *, threads: int | None = None
    ) -> Worker | None:
        """Start a contestant on models by name; None, and the reason in `left_out`, if it can't."""
        contestant = CONTESTANTS[name]
        python = python_with(contestant.package, () if contestant.is_here else self.plan.peers)
        if python is None:
            self.left_out[name] = f"{contestant.package} is not installed"
            return None
        log.info("%s: loading", name)
        chosen = {key: contestant.model(path) for key, path in paths.items()}
        try:
            worker = Worker(python, contestant, chosen, threads or self.plan.threads)
            self._ending.callback(worker.end)
            worker.ask("call", lengths=[self.plan.tokens], calls=1, model=next(iter(paths)))
        except RunError as error:
            self.left_out[name] = str(error)
            return None
        return worker

    def need(self, name: str, paths: Mapping[str, Path], *, threads: int | None = None) -> Worker:
        """The same; raises `RunError` if it can't start."""
        worker = self.add(name, paths, threads=threads)
        if worker is None:
            raise RunError(f"{name}: {self.left_out[name]}")
        return worker


def task(
    worker: Worker,
    lengths: Sequence[int] = (),
    *,
    do: str = "call",
    calls: int = CALLS,
    **values: Any,
) -> Task:
    """A turn of a worker: what it does, and how often."""
    if lengths:
        values["lengths"] = list(lengths)
    return lambda: worker.ask(do, calls=calls, **values)


def python_with(package: str, pythons: Sequence[str]) -> str | None:
    """The first of several Pythons that has a package, or this one."""
    return next((python for python in (*pythons, sys.executable) if version(package, python)), None)


@functools.cache
def version(package: str, python: str) -> str:
    """The version that a Python has of a package; empty where it has none."""
    look = f"from importlib.metadata import version as v; print(v({package!r}))"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunError(f"--peers {python}: can't be run: {error}") from error
    return done.stdout.strip()


class Turns:
    """Milliseconds of each contestant by round, and the machine's peak around each turn."""

    def __init__(self) -> None:
        """Nothing was measured yet."""
        self.milliseconds: dict[str, list[float]] = {}  # the median of each turn
        self.fastest: dict[str, float] = {}
        self.peaks: dict[str, list[float]] = {}  # GFLOP/s of a core

    def take(self, tasks: Mapping[str, Task], rounds: int) -> Self:
        """Let each contestant compute once a round, and each be the first in turn."""
        names = list(tasks)
        self.milliseconds = {name: [] for name in names}
        self.peaks = {name: [] for name in names}
        before = peak()
        for number in range(rounds):
            log.info("round %d of %d", number + 1, rounds)
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                found = [1e3 * seconds for seconds in tasks[name]()]
                after = peak()
                self.peaks[name].append((before + after) / 2)
                self.milliseconds[name].append(round(statistics.median(found), 3))
                self.fastest[name] = round(min(*found, self.fastest.get(name, found[0])), 3)
                before = after
        return self

    def median(self, name: str) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The median over rounds of how many times longer the first one takes."""
        return self.quartiles(name, other)[1]

    def quartiles(self, name: str, other: str) -> tuple[float, float, float]:
        """Of these ratios."""
        pairs = zip(self.milliseconds[name], self.milliseconds[other], strict=True)
        ratios = [first / second for first, second in pairs]
        low, middle, high = statistics.quantiles(ratios * 2, n=4, method="inclusive")
        return low, middle, high

    def steadiness(self) -> Steadiness:
        """The peak of a core over all turns."""
        every = [peak for peaks in self.peaks.values() for peak in peaks]
        return Steadiness(slowest=min(every), median=statistics.median(every), fastest=max(every))
