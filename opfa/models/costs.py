"""What heads and neurons cost: parameters, multiply-adds, or milliseconds on this machine.

A cost is a curve for each group, which is the heads or the neurons of one layer: what the group
costs if 0, 1, ... of its units are kept.
"""

import contextlib
import copy
import logging
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from opfa.compression.budget import Curve
from opfa.models.removal import groups_of, layers_of
from opfa.models.stepping import calls_of
from opfa.sparsity.units import HEADS, Units

ROUNDS = 15  # of timing, whose median counts
WIDTHS = 16  # that are timed; between two of them the larger one's time is taken
FIRST_ID = 5  # of random tokens; those before may be special
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Costs:
    """Curves of all groups, and what the model costs beside them; of this rest, what each layer has
    without any unit, where that is known.
    """

    curves: list[Curve]
    rest: float = 0.0
    layers: tuple[float, ...] = ()

    def of(self, kept: Sequence[int], gone: Collection[int] = ()) -> float:
        """The cost of keeping so many units of each group, without the layers that are gone."""
        units = sum(float(c[k]) for c, k in zip(self.curves, kept, strict=True))
        return self.rest + units - sum(self.layers[n] for n in gone if self.layers)

    @property
    def whole(self) -> float:
        """With all units."""
        return self.of([len(curve) - 1 for curve in self.curves])


def parameters(model: PreTrainedModel) -> Costs:
    """Weights and biases of the units."""
    return Costs([_line(units, weights(units) + _biases(units)) for units in groups_of(model)])


def macs(model: PreTrainedModel, batch: int, tokens: int) -> Costs:
    """Multiply-adds for a batch of sequences without padding: of the matrices, and of attention."""
    curves = []
    for _, by_kind in layers_of(model):
        for kind, units in by_kind.items():
            attention = 2 * tokens * units.size if kind == HEADS else 0
            curves.append(_line(units, batch * tokens * (weights(units) + attention)))
    return Costs(curves)


def _line(units: Units, each: int) -> Curve:
    return np.arange(units.count + 1, dtype=np.float64) * each


def weights(units: Units) -> int:
    """How many weights a unit has."""
    return sum(linear.weight.numel() for linear in units.linears()) // max(units.count, 1)


def _biases(units: Units) -> int:
    rows = [units.layer.get_submodule(row.path) for row in units.rows]
    return sum(units.size for linear in rows if linear.bias is not None)


@torch.inference_mode()
def milliseconds(model: PreTrainedModel, batch: int, tokens: int) -> Costs:
    """Time in torch for a batch of sequences without padding, by as many threads as torch has.

    Each shape of layer is timed with fewer heads and all neurons, and with all heads and fewer
    neurons; all of them and the whole model take turns.
    """
    config: Any = model.config  # of a family
    ids = torch.randint(FIRST_ID, config.vocab_size, (batch, tokens))
    whole = partial(model.base_model, input_ids=ids)
    layers = list(layers_of(model))
    states, calls = calls_of([layer for layer, _ in layers], whole)
    shapes = [tuple(units.count for units in by_kind.values()) for _, by_kind in layers]
    tasks: dict[Any, Callable[[], Any]] = {"model": whole}
    for shape in set(shapes):
        number = shapes.index(shape)
        call, (layer, by_kind) = calls[number], layers[number]
        for kind, units in by_kind.items():
            for width in _widths(units.count):
                narrow = copy.deepcopy(layer)
                units.of(narrow).keep(torch.arange(width))
                tasks[shape, kind, width] = partial(call.again, narrow, states)
    found = medians(tasks)
    curves, empty = [], []
    for shape, (_, by_kind) in zip(shapes, layers, strict=True):
        whole_layer = statistics.fmean(found[shape, kind, u.count] for kind, u in by_kind.items())
        for kind, units in by_kind.items():
            widths = _widths(units.count)
            times = np.array([found[shape, kind, width] for width in widths])
            curve = times[np.searchsorted(widths, np.arange(units.count + 1))] - times[0]
            curves.append(np.maximum.accumulate(curve))
        empty.append(max(0.0, whole_layer - sum(float(curve[-1]) for curve in curves[-2:])))
    parts = sum(empty) + sum(float(curve[-1]) for curve in curves)
    if (share := found["model"] / parts) < 1:
        log.warning("layers took %.0f %% longer apart than together", 100 / share - 100)
        curves, empty = [share * curve for curve in curves], [share * each for each in empty]
    rest = found["model"] - sum(float(curve[-1]) for curve in curves)
    return Costs(curves, rest, tuple(empty))


@contextlib.contextmanager
def threads(num: int) -> Iterator[None]:
    """Let torch compute in so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _widths(count: int) -> list[int]:
    """Numbers of units that are timed."""
    return sorted({-(-count * part // WIDTHS) for part in range(WIDTHS + 1)})


def medians(tasks: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Milliseconds of each task, which take turns. Of one thread it is the time that it computes,
    so that other programs of the machine count less.
    """
    found: dict[Any, list[float]] = {name: [] for name in tasks}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(ROUNDS + 1):
        for name, run in tasks.items():
            before = clock()
            run()
            if number:  # the first round warms up
                found[name].append(1e3 * (clock() - before))
    return {name: statistics.median(times) for name, times in found.items()}
