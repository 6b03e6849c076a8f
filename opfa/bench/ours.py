"""The runtime and torch as contestants of `opfa bench inference`."""

import functools
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from opfa import runtime
from opfa.bench.worker import Engine, timed
from opfa.models import trained
from opfa.releases.rounding import DTYPES
from opfa.runtime.library import KINDS, library
from opfa.runtime.program import Runner

LINEAR, ATTENTION, REST, STEPS = "linear layers", "attention", "rest", "all steps"
PARTS = {"linear": LINEAR, "attention": ATTENTION}  # by kinds of steps; the others are the rest


class Torch(Engine):
    """Plain transformers with torch's fused attention; `dtype` is fp32 or bf16."""

    def load(self, path: str) -> Any:
        """A model of transformers."""
        torch.set_num_threads(self.threads)
        model = trained.load(path, exact=False)
        model.set_attn_implementation("sdpa")
        return nn.Module.to(model, DTYPES[self.options["dtype"]])

    def batch(self, lengths: list[int]) -> tuple[Any, Any]:
        """Tensors; no mask where all have the same length."""
        ids, mask = (torch.from_numpy(each) for each in super().batch(lengths))
        return ids, None if mask.all() else mask

    def run(self, model: Any, ids: Any, mask: Any) -> object:
        """The outputs of transformers."""
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)


class Swapped(Torch):
    """transformers with the kernels under its linear layers; fp32."""

    def load(self, path: str) -> Any:
        """A model of transformers, whose products run in the kernels."""
        return runtime.swap(super().load(path), threads=self.threads)


class Ours(Torch):
    """The runtime; `dtype` is fp32, bf16 or int8."""

    def load(self, path: str) -> Any:
        """A model whose encoder runs in the kernels."""
        torch.set_num_threads(self.threads)
        return runtime.load(path, threads=self.threads, dtype=self.options["dtype"])

    def bytes_a_weight(self) -> float:
        """Packed bytes of the layers in the kernels for each live weight."""
        matrices = self._built.matrices.values()
        num_bytes = sum(matrix.num_bytes for matrix in matrices)
        return num_bytes / sum(matrix.num_live for matrix in matrices)

    def sparsity(self) -> float:
        """Of the layers in the kernels."""
        matrices = self._built.matrices.values()
        size = sum(matrix.rows * matrix.columns for matrix in matrices)
        return 1 - sum(matrix.num_live for matrix in matrices) / size

    @property
    def _built(self) -> Any:
        return self.models[""].base_model.built

    def work(self, tokens: int) -> dict[str, float]:
        """Floating-point operations with one sequence: of live weights, and of attention."""
        live = sum(matrix.num_live for matrix in self._built.matrices.values())
        steps = [each for each in self._built.program.steps if KINDS[each.kind] == "attention"]
        products = 4 * tokens**2 * sum(step.channels for step in steps)  # windows aside
        return {LINEAR: 2 * tokens * live, ATTENTION: products}

    def part(self, name: str, tokens: int, calls: int) -> list[float]:
        """Seconds of the steps of one kind alone, or of all, with one sequence."""
        runners = self._runners()
        runner = runners[name]
        starts, rows = np.array([0, tokens], np.int32), np.arange(tokens, dtype=np.int32)
        ids = [np.zeros(tokens, np.int32) for _ in self._built.table_sizes]
        target = np.empty((tokens, self._built.channels), np.float32)
        runners[STEPS].run(starts, ids, rows=rows, target=target)
        return timed(lambda: runner.run(starts, ids, rows=rows, target=target), calls)

    @functools.cache  # noqa: B019 - a process has one
    def _runners(self) -> dict[str, Runner]:
        """Runners that share the workspace, so that each part finds there what a call left."""
        program = self._built.program
        steps: dict[str, list[Any]] = {LINEAR: [], ATTENTION: [], REST: [], STEPS: program.steps}
        for step in program.steps:
            steps[PARTS.get(KINDS[step.kind], REST)].append(step)
        pool = self.models[""].base_model.runner.pool
        found = {name: Runner(replace(program, steps=each), pool) for name, each in steps.items()}
        for runner in found.values():
            runner.workspaces = found[STEPS].workspaces
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
    """GFLOP/s of fp32 multiply-adds that a core can do now: each core's best, and their mean."""
    cores, found = os.sched_getaffinity(0), []
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            found.append(max(library().opfa_peak() for _ in range(calls)))
    finally:
        os.sched_setaffinity(0, cores)
    return sum(found) / len(found)
