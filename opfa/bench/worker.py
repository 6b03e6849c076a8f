"""One contestant of `opfa bench inference` in a process of its own; asked over pipes.

    python worker.py CLASS '{"paths": {"": FILE}, "threads": 2, ...}'

Reads one JSON request a line, {"do": METHOD, ...}, and answers with one line. It runs under the
peers' Python too, so it imports nothing of opfa unless CLASS, such as opfa.bench.ours:Ours, says
so. An engine is imported by name when it is asked for. Libraries' prints go to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
FIRST_ID, LAST_ID = 5, 1000  # random tokens, within every vocabulary that is tried
SETTLED, WATCHED = 0.1, 0.4  # seconds after a call, and how long the process is watched then


class Engine:
    """Models of one library, by name; the first is "". Requests call its methods."""

    model: Any  # of the library

    def __init__(self, paths: dict[str, str], threads: int, **options: Any) -> None:
        """Load the models and measure what loading takes."""
        self.threads, self.options = threads, options
        before, start = resident(), time.perf_counter()
        self.models = {name: self.load(path) for name, path in paths.items()}
        self.seconds = time.perf_counter() - start
        self.before = before

    def load(self, path: str) -> Any:
        """A model of the library."""
        raise NotImplementedError

    def run(self, model: Any, ids: np.ndarray, mask: np.ndarray) -> object:
        """One forward pass."""
        raise NotImplementedError

    def batch(self, lengths: list[int]) -> tuple[Any, Any]:
        """Random tokens and their mask, [batch, the longest]."""
        random = np.random.default_rng(0)
        ids = random.integers(FIRST_ID, LAST_ID, (len(lengths), max(lengths)), dtype=np.int64)
        mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
        return ids, mask.astype(np.int64)

    def call(self, lengths: list[int], calls: int, model: str = "") -> list[float]:
        """Seconds of so many calls, after one that isn't counted."""
        ids, mask = self.batch(lengths)
        return timed(lambda: self.run(self.models[model], ids, mask), calls)

    def loading(self) -> dict[str, float]:
        """Seconds that loading took; bytes resident now, and of it since the models were loaded."""
        return {"seconds": self.seconds, "bytes": resident(), "grown": resident() - self.before}

    def idle(self, lengths: list[int]) -> float:
        """The share of one core that the process uses from 0.1 s after a call on."""
        self.call(lengths, 1)
        time.sleep(SETTLED)
        start, used = time.perf_counter(), time.process_time()
        time.sleep(WATCHED)
        return (time.process_time() - used) / (time.perf_counter() - start)


class OnnxRuntime(Engine):
    """ONNX Runtime with its default optimizations."""

    def load(self, path: str) -> Any:
        """A session."""
        onnxruntime = importlib.import_module("onnxruntime")

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, model: Any, ids: np.ndarray, mask: np.ndarray) -> object:
        """All outputs."""
        return model.run(None, by_name([each.name for each in model.get_inputs()], ids, mask))


class OpenVino(Engine):
    """OpenVINO, compiled for latency; `precision` is its hint, by default its own choice."""

    def load(self, path: str) -> Any:
        """A request of a compiled model."""
        openvino = importlib.import_module("openvino")

        wanted = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        if "precision" in self.options:
            wanted["INFERENCE_PRECISION_HINT"] = self.options["precision"]
        return openvino.Core().compile_model(path, "CPU", wanted).create_infer_request()

    def run(self, model: Any, ids: np.ndarray, mask: np.ndarray) -> object:
        """All outputs."""
        names = [each.get_any_name() for each in model.model_inputs]
        return model.infer(by_name(names, ids, mask))


class DeepSparse(Engine):
    """DeepSparse, compiled for the one shape of its file."""

    def load(self, path: str) -> Any:
        """An engine."""
        deepsparse = importlib.import_module("deepsparse")

        return deepsparse.Engine(path, batch_size=1, num_cores=self.threads)

    def run(self, model: Any, ids: np.ndarray, mask: np.ndarray) -> object:
        """All outputs."""
        inputs = by_name(model.input_names, ids, mask)
        return model.run(list(inputs.values()), val_inp=False)


def timed(do: Callable[[], object], calls: int) -> list[float]:
    """Seconds of so many calls, after one that isn't counted."""
    found = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        do()
        found.append(time.perf_counter() - start)
    return found[1:]


def by_name(names: list[str], ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """What a model asks for, in its order."""
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: given[name] for name in names}


def resident() -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def serve(engine: str, options: str) -> None:
    """Load the contestant, say so, and answer until the requests end."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)  # a stopped process would stay for ever
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = engine.rpartition(":")
    cls = getattr(importlib.import_module(module or __name__), name)
    contestant = cls(**json.loads(options))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(contestant, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
