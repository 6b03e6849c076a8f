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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from opfa.bench.ours import peak
from opfa.bench.speed import Steadiness
from opfa.errors import RunError
from opfa.runtime.library import LEVEL

WORKER = Path(__file__).with_name("worker.py")
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}  # the most that oneDNN may use
QUIET = {"NM_DISABLE_ANALYTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
BERT_BASE = {"model_type": "bert"}
MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
CALLS = 3  # of a turn, whose median counts; one before them isn't counted
FEW = 3  # a section of many points takes one round for so many of the race
log = logging.getLogger(__name__)
Task = Callable[[], Sequence[float]]  # a turn, which gives seconds


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A library with its options."""

    engine: str  # a class of worker.py, or module:class
    package: str  # what it needs
    form: str = ""  # the ONNX file that it reads; "": the model's directory
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether it needs opfa."""
        return ":" in self.engine

    def model(self, directory: Path) -> Path:
        """The file or directory that it reads."""
        return directory / f"{self.form}.onnx" if self.form else directory


def _here(name: str, dtype: str, **variables: str) -> Contestant:
    engine, options = f"opfa.bench.ours:{name}", {"dtype": dtype}
    return Contestant(engine=engine, package="torch", options=options, variables=variables)


def _openvino(form: str, precision: str, **variables: str) -> Contestant:
    known = {"engine": "OpenVino", "package": "openvino", "form": form}
    return Contestant(**known, options={"precision": precision}, variables=variables)


OURS, TORCH = "ours, fp32", "torch, fp32"
CONTESTANTS = {
    OURS: _here("Ours", "fp32"),
    "ours, bf16": _here("Ours", "bf16"),
    "ours, int8": _here("Ours", "int8"),
    "ours, fp32, AVX2": _here("Ours", "fp32", **{LEVEL: "avx2"}),
    "drop-in, fp32": _here("Swapped", "fp32"),
    TORCH: _here("Torch", "fp32"),
    "torch, bf16": _here("Torch", "bf16"),
    "torch, bf16, no AMX": _here("Torch", "bf16", **WITHOUT_AMX),
    "ONNX Runtime, fp32": Contestant(engine="OnnxRuntime", package="onnxruntime", form="fp32"),
    "ONNX Runtime, int8": Contestant(engine="OnnxRuntime", package="onnxruntime", form="int8"),
    "OpenVINO, fp32": _openvino("fp32", "f32"),
    "OpenVINO, bf16": _openvino("fp32", "bf16"),
    "OpenVINO, bf16, no AMX": _openvino("fp32", "bf16", **WITHOUT_AMX),
    "OpenVINO, int8": _openvino("int8", "bf16"),
    "OpenVINO, int8, no AMX": _openvino("int8", "bf16", **WITHOUT_AMX),
    "DeepSparse, fp32": Contestant(engine="DeepSparse", package="deepsparse", form="fixed"),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. Tests take less of everything."""

    rounds: int = 25
    threads: int = 2
    sparsity: float = 0.9
    tokens: int = 128
    config: Mapping[str, Any] = field(default_factory=lambda: BERT_BASE)
    small: Mapping[str, Any] = field(default_factory=lambda: MINILM)
    contestants: Sequence[str] = tuple(CONTESTANTS)
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)
    lengths: Sequence[int] = (8, 16, 32, 64, 128, 256, 512)
    batch: Sequence[int] = tuple(range(16, 129, 16))
    peers: Sequence[str] = ()  # Pythons that have other engines

    @property
    def ours(self) -> list[str]:
        """The runtime at its best level, in each type."""
        return [n for n in self.contestants if n.startswith("ours") and "AVX2" not in n]

    @property
    def few_rounds(self) -> int:
        """For sections of many points."""
        return max(1, self.rounds // FEW)

    def on_small(self) -> "Plan":
        """The same on the small shape, without what one number says already."""
        names = [name for name in self.contestants if "AVX2" not in name]
        return replace(self, contestants=names)


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
