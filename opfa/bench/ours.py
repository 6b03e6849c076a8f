"""The runtime and torch as contestants of `opfa bench inference`."""

import os
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opfa import runtime
from opfa.bench.worker import Engine
from opfa.models import trained
from opfa.releases.rounding import DTYPES
from opfa.runtime.library import KINDS
from opfa.runtime.program import Program, Runner

PARTS = {"linear": "linear layers", "attention": "attention"}  # by kinds of steps
REST = "rest"  # norms, embeddings, activations' gates, transfers
EVERYTHING, WHOLE = "all steps", "a call"


class Torch(Engine):
    """Plain transformers with torch's fused attention; `dtype` is fp32 or bf16."""

    def load(self, path: str) -> Any:
        """A model of transformers."""
        torch.set_num_threads(self.threads)
        model = trained.load(path, exact=False)
        model.set_attn_implementation("sdpa")
        return model.to(DTYPES[self.options["dtype"]])

    def batch(self, lengths: list[int]) -> tuple[Any, Any]:
        """Tensors; no mask where all have the same length."""
        ids, mask = (torch.from_numpy(each) for each in super().batch(lengths))
        return ids, None if mask.all() else mask

    def run(self, model: Any, ids: Any, mask: Any) -> object:
        """The outputs of transformers."""
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)


class Ours(Torch):
    """The runtime; `dtype` is fp32, bf16 or int8."""

    def load(self, path: str) -> Any:
        """A model whose encoder runs in the kernels."""
        torch.set_num_threads(self.threads)
        dtype = self.options["dtype"]
        return runtime.load(
            path, threads=self.threads, **({} if dtype == "fp32" else {"dtype": dtype})
        )

    def sizes(self) -> dict[str, float]:
        """Live weights of the layers in the kernels, and the bytes that they are packed in."""
        matrices = self._built().matrices.values()
        arrays = [array for matrix in matrices for array in matrix.arrays.values()]
        live = sum(matrix.num_live for matrix in matrices)
        return {"live": live, "bytes": sum(array.nbytes for array in arrays)}

    def _built(self, model: str = "") -> Any:
        return self.models[model].base_model.built

    def parts(self, tokens: int, calls: int) -> dict[str, list[float]]:
        """Seconds of the steps of each kind alone, of all, and of a call, taken in turn."""
        program = self._built().program
        steps: dict[str, list[Any]] = {name: [] for name in (*PARTS.values(), REST)}
        for step in program.steps:
            steps[PARTS.get(KINDS[step.kind], REST)].append(step)
        steps[EVERYTHING] = program.steps
        runners = {
            name: Runner(replace(program, steps=chosen), self.threads)
            for name, chosen in steps.items()
        }
        starts, rows = np.array([0, tokens], np.int32), np.arange(tokens, dtype=np.int32)
        ids = [np.zeros(tokens, np.int32) for _ in self._built().table_sizes]
        target = np.empty((tokens, self._built().channels), np.float32)
        found: dict[str, list[float]] = {name: [] for name in (*runners, WHOLE)}
        for _ in range(calls):
            for name, runner in runners.items():
                for is_counted in (False, True):
                    start = time.perf_counter()
                    runner.run(starts, ids, rows=rows, target=target)
                    if is_counted:
                        found[name].append(time.perf_counter() - start)
            found[WHOLE] += self.call([tokens], 1)
        return found

    def streams(self, tokens: int, seconds: float) -> float:
        """Sequences a second, each model called by a thread of its own."""
        ids, mask = self.batch([tokens])
        done: Counter[str] = Counter()
        until = time.perf_counter() + seconds

        def stream(name: str) -> None:
            while time.perf_counter() < until:
                self.run(self.models[name], ids, mask)
                done[name] += 1

        threads = [threading.Thread(target=stream, args=(name,)) for name in self.models]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return done.total() / (time.perf_counter() - start)


def peak(calls: int = 5) -> float:
    """GFLOP/s of multiply-adds that one core can do now: the mean over the cores, each one's best."""
    cores, found = os.sched_getaffinity(0), []
    library = runtime.library.library()
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            found.append(max(library.opfa_peak() for _ in range(calls)))
    finally:
        os.sched_setaffinity(0, cores)
    return sum(found) / len(found)
