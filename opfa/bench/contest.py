"""Contestants take turns: a process each, which is stopped while another one computes.

Between turns the machine's peak of multiply-adds is measured, since a virtual machine's neighbours
slow it down within seconds. Ratios are of two contestants in the same round.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opfa.bench.ours import peak
from opfa.errors import RunError
from opfa.runtime.library import LEVEL

WORKER = Path(__file__).with_name("worker.py")
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}  # the most that oneDNN may use
QUIET = {"NM_DISABLE_ANALYTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
CALLS = 3  # of a turn, whose median counts; one before them isn't counted


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A library with its options."""

    engine: str  # a class of worker.py, or module:class
    package: str  # what it needs
    form: str = ""  # the ONNX file that it reads; "": the model's directory
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


def _ours(dtype: str, **variables: str) -> Contestant:
    engine = "opfa.bench.ours:Ours"
    return Contestant(engine=engine, package="torch", options={"dtype": dtype}, variables=variables)


def _torch(dtype: str, **variables: str) -> Contestant:
    engine = "opfa.bench.ours:Torch"
    return Contestant(engine=engine, package="torch", options={"dtype": dtype}, variables=variables)


def _onnx_runtime(form: str) -> Contestant:
    return Contestant(engine="OnnxRuntime", package="onnxruntime", form=form)


def _openvino(form: str, precision: str, **variables: str) -> Contestant:
    return Contestant(
        engine="OpenVino",
        package="openvino",
        form=form,
        options={"precision": precision},
        variables=variables,
    )


OURS = "ours, fp32"
TORCH = "torch, fp32"
CONTESTANTS = {
    OURS: _ours("fp32"),
    "ours, bf16": _ours("bf16"),
    "ours, int8": _ours("int8"),
    "ours, fp32, AVX2": _ours("fp32", **{LEVEL: "avx2"}),
    TORCH: _torch("fp32"),
    "torch, bf16": _torch("bf16"),
    "torch, bf16, no AMX": _torch("bf16", **WITHOUT_AMX),
    "ONNX Runtime, fp32": _onnx_runtime("fp32"),
    "ONNX Runtime, int8": _onnx_runtime("int8"),
    "OpenVINO, fp32": _openvino("fp32", "f32"),
    "OpenVINO, bf16": _openvino("fp32", "bf16"),
    "OpenVINO, bf16, no AMX": _openvino("fp32", "bf16", **WITHOUT_AMX),
    "OpenVINO, int8": _openvino("int8", "bf16"),
    "OpenVINO, int8, no AMX": _openvino("int8", "bf16", **WITHOUT_AMX),
    "DeepSparse, fp32": Contestant(engine="DeepSparse", package="deepsparse", form="fixed"),
}


class Worker:
    """A contestant's process. It is stopped, but for its turns."""

    def __init__(
        self, python: str, contestant: Contestant, paths: Mapping[str, Path], threads: int
    ) -> None:
        """Start it and let it load the models; raises `RunError` with its last words."""
        self._log = tempfile.TemporaryFile("w+")
        is_ours = ":" in contestant.engine
        how = ["-m", "opfa.bench.worker"] if is_ours else [str(WORKER)]
        chosen = {name: str(path) for name, path in paths.items()}
        options = json.dumps({"paths": chosen, "threads": threads, **contestant.options})
        variables = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), **contestant.variables}
        if not is_ours:  # opfa/bench is not for imports
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
            raise RunError(said[-1][:300] if said else f"ended ({self._process.returncode})")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def workers() -> Iterator[Callable[..., Worker]]:
    """What makes workers, which end with this block."""
    with contextlib.ExitStack() as ending:

        def start(*arguments: Any) -> Worker:
            worker = Worker(*arguments)
            ending.callback(worker.end)
            return worker

        yield start


def python_with(package: str, pythons: Sequence[str]) -> str | None:
    """The first of several Pythons that has a package, or this one."""
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    for python in (*pythons, sys.executable):
        try:
            if subprocess.run([python, "-c", look], check=False).returncode == 0:
                return python
        except OSError as error:
            raise RunError(f"--peers {python}: can't be run: {error}") from error
    return None


class Turns:
    """Milliseconds of each contestant by round, and the peak around each turn."""

    def __init__(self) -> None:
        """Nothing was measured yet."""
        self.milliseconds: dict[str, list[float]] = {}
        self.fastest: dict[str, float] = {}
        self.peaks: list[float] = []  # GFLOP/s of a core

    def take(self, tasks: Mapping[str, Callable[[], Sequence[float]]], rounds: int) -> None:
        """Let each contestant compute once a round, in another order each time."""
        names = list(tasks)
        self.milliseconds = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                self.peaks.append(peak())
                found = [1e3 * seconds for seconds in tasks[name]()]
                self.milliseconds[name].append(round(statistics.median(found), 3))
                best = min(*found, self.fastest.get(name, found[0]))
                self.fastest[name] = round(best, 3)
        self.peaks.append(peak())

    def median(self, name: str) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The median over rounds of how much longer the first one takes."""
        return self.quartiles(name, other)[1]

    def quartiles(self, name: str, other: str) -> tuple[float, float, float]:
        """Of the ratios, by round."""
        pairs = zip(self.milliseconds[name], self.milliseconds[other], strict=True)
        ratios = [first / second for first, second in pairs]
        if len(ratios) == 1:
            return (ratios[0],) * 3
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high
