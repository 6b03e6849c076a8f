"""What the runtime does with a model: by layer the kernel, its density and its speed."""

import time
from collections.abc import Iterable

import numpy as np
from torch import nn

from opfa.errors import RunError
from opfa.report.tables import Result, Row, Table
from opfa.runtime.encoder import KernelEncoder
from opfa.runtime.library import DTYPES, KINDS, level, library
from opfa.runtime.packing import MOST_DENSITY, Packed
from opfa.runtime.program import Program, Runner

ROUNDS = 5
GIGA = 1e9


class LayerExplained(Row):
    """One matrix product of the encoder."""

    layer: str
    kernel: str
    density: float
    gflops: float  # of live weights
    peak_share: float  # of the multiply-adds that the threads could do


class Explanation(Result):
    """How the runtime computes a model."""

    level: str
    threads: int
    tokens: int
    peak_gflops: float  # of one core
    layers: list[LayerExplained]

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """A line about all, and a row for each layer."""
        peak = f"peak of a core {self.peak_gflops:.0f} GFLOP/s"
        yield f"{self.level}, {self.threads} threads, {self.tokens} tokens, {peak}"
        rows = [
            (x.layer, x.kernel, f"{x.density:.3f}", f"{x.gflops:.0f}", f"{x.peak_share:.0%}")
            for x in self.layers
        ]
        yield Table(("layer", "kernel", "density", "GFLOP/s", "of peak"), rows)


def explain(model: nn.Module, *, tokens: int = 128) -> Explanation:
    """Measure each layer of a model from `opfa.runtime.load` on one sequence of `tokens`.

    GFLOP/s count live weights only. Raises `RunError` for any other model.
    """
    encoder = getattr(model, "base_model", model)
    if not isinstance(encoder, KernelEncoder):
        raise RunError("explain: the model must come from opfa.runtime.load")
    built, pool = encoder.built, encoder.runner.pool
    steps = [step for step in built.program.steps if KINDS[step.kind] == "linear"]
    peak = max(library().opfa_peak() for _ in range(ROUNDS))
    layers = []
    for step, (name, matrix) in zip(steps, built.matrices.items(), strict=True):
        alone = Program([step], built.program.buffers, built.program.channels, built.program.group)
        seconds = _seconds(Runner(alone, pool), tokens)
        gflops = 2 * matrix.num_live * tokens / seconds / GIGA
        share = gflops / (peak * pool.threads)
        kernel = kernel_of(matrix)
        layers.append(
            LayerExplained(
                layer=name, kernel=kernel, density=matrix.density, gflops=gflops, peak_share=share
            )
        )
    return Explanation(
        level=level(), threads=pool.threads, tokens=tokens, peak_gflops=peak, layers=layers
    )


def kernel_of(matrix: Packed) -> str:
    """The kernel that multiplies by a matrix, and why if it isn't a sparse one."""
    if matrix.block:
        return f"sparse {DTYPES[matrix.dtype]}"
    return f"dense fp32: more than {MOST_DENSITY:.0%} lives"


def _seconds(runner: Runner, tokens: int) -> float:
    starts, target = np.array([0, tokens], np.int32), np.zeros((0, 0), np.float32)
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        runner.run(starts, target=target)
        found.append(time.perf_counter() - began)
    return min(found)
