"""Speed of an encoder that lost heads and neurons, against its multiply-adds: one thread, MiniLM's
shape, random weights. A ratio is the median over rounds of two times of the same round.
"""

import copy
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opfa.bench.contest import Task, Turns
from opfa.bench.contestants import MINILM
from opfa.bench.forms import in_8_bits
from opfa.bench.worker import FIRST_ID, LAST_ID, timed
from opfa.extras import importing
from opfa.models.configs import new_config
from opfa.models.costs import macs
from opfa.models.encoders import HEADS as TASKS
from opfa.models.removal import layers_of, matrices_of
from opfa.report.tables import Result, Row, Table, column
from opfa.runtime.encoder import with_kernels
from opfa.sparsity.units import HEADS, NEURONS

DENSE, SMALL, LEAST = (12, 1536), (6, 512), (3, 256)  # heads, neurons
SHAPES = (DENSE, (12, 768), (12, 512), (6, 1536), SMALL, LEAST)
INPUTS = {"large": (8, 128), "one": (1, 32)}  # sequences, tokens
ZEROS = 0.7
TORCH, COMPILED, ONNX, OURS = "torch", "torch, compiled", "ONNX Runtime", "ours, fp32"
INT8 = f"ours, int8, {ZEROS:.0%} zeros"
CALLS = 3  # of a turn, after one that isn't counted


@dataclass(frozen=True)
class Point:
    """What is timed: an engine with a shape, and which input."""

    engine: str
    shape: tuple[int, int]
    size: str

    def __str__(self) -> str:
        """Its name in the turns."""
        return f"{self.engine} {self.shape} {self.size}"


Tasks = Iterator[tuple[Point, Task]]


class Shape(Row):
    """How many times as fast as the dense shape, predicted by multiply-adds and measured."""

    heads: int
    neurons: int
    macs_large: float = column("8 x 128: MACs", ".2f")
    large: float = column("time", ".2f")
    macs_one: float = column("1 x 32: MACs", ".2f")
    one: float = column("time", ".2f")


class Engine(Row):
    """How many times as fast as the dense shape in torch, and in the same engine."""

    engine: str
    heads: int
    neurons: int
    large: float = column("8 x 128: torch", ".2f")
    own_large: float = column("the engine", ".2f")
    one: float = column("1 x 32: torch", ".2f")
    own_one: float = column("the engine", ".2f")


class Shapes(Result):
    """What `opfa bench shapes` finds."""

    threads: int
    rounds: int
    milliseconds: dict[str, float]  # of the dense shape in torch, by input
    rows: list[Shape]
    engines: list[Engine]

    def parts(self, *, is_long: bool = False) -> Iterator[Table]:
        """One line for each shape in torch, and one for each engine with a shape."""
        yield Table.of("heads, neurons", {f"{r.heads}, {r.neurons}": r for r in self.rows})
        lines = {f"{r.engine}: {r.heads}, {r.neurons}": r for r in self.engines}
        yield Table.of("times as fast as the dense one in", lines)


def bench_shapes(rounds: int = 25) -> Shapes:
    """Measure shapes in torch, and three of them in other engines and in the CPU runtime."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {shape: shaped(*shape) for shape in SHAPES}
        tasks = dict(_tasks(models))
        with torch.inference_mode():
            turns = Turns().take({str(point): each for point, each in tasks.items()}, rounds)
    finally:
        torch.set_num_threads(threads)

    def faster(engine: str, shape: tuple[int, int], size: str, than: str = TORCH) -> float:
        return turns.ratio(str(Point(than, DENSE, size)), str(Point(engine, shape, size)))

    def fewer(shape: tuple[int, int], size: str) -> float:
        whole, left = (macs(models[each], *INPUTS[size]).whole for each in (DENSE, shape))
        return whole / left

    rows = [
        Shape(
            heads=shape[0],
            neurons=shape[1],
            macs_large=fewer(shape, "large"),
            large=faster(TORCH, shape, "large"),
            macs_one=fewer(shape, "one"),
            one=faster(TORCH, shape, "one"),
        )
        for shape in SHAPES
    ]
    engines = [
        Engine(
            engine=engine,
            heads=shape[0],
            neurons=shape[1],
            large=faster(engine, shape, "large"),
            own_large=faster(engine, shape, "large", engine),
            one=faster(engine, shape, "one"),
            own_one=faster(engine, shape, "one", engine),
        )
        for engine, shape in dict.fromkeys((p.engine, p.shape) for p in tasks)
        if engine != TORCH
    ]
    medians = {size: turns.median(str(Point(TORCH, DENSE, size))) for size in INPUTS}
    return Shapes(threads=1, rounds=rounds, milliseconds=medians, rows=rows, engines=engines)


def shaped(heads: int, neurons: int) -> PreTrainedModel:
    """A random classifier whose layers have so many heads and neurons."""
    torch.manual_seed(0)
    model = TASKS["SequenceClassification"].from_config(new_config(MINILM)).eval()
    for _, units in layers_of(model):
        units[HEADS].keep(torch.arange(heads))
        units[NEURONS].keep(torch.arange(neurons))
    model.config.architectures = [type(model).__name__]  # an export asks for it
    return model.requires_grad_(False)


def _tasks(models: dict[tuple[int, int], PreTrainedModel]) -> Tasks:
    """Everything that is timed."""
    ids = {size: torch.randint(FIRST_ID, LAST_ID, shape) for size, shape in INPUTS.items()}
    for shape, model in models.items():
        yield from _by_input(TORCH, shape, model, ids)
    for shape in (DENSE, SMALL, LEAST):
        model = models[shape]
        if shutil.which("g++"):
            compiled = cast(PreTrainedModel, torch.compile(copy.deepcopy(model), dynamic=False))
            yield from _by_input(COMPILED, shape, compiled, ids)
        yield from _onnx(shape, model, ids)
        yield from _by_input(OURS, shape, with_kernels(copy.deepcopy(model), 1), ids)
        sparse = copy.deepcopy(model)
        for linear in matrices_of(sparse):
            linear.weight.masked_fill_(torch.rand_like(linear.weight) < ZEROS, 0.0)
        yield from _by_input(INT8, shape, with_kernels(in_8_bits(sparse), 1, "int8"), ids)


def _by_input(
    engine: str, shape: tuple[int, int], model: PreTrainedModel, ids: dict[str, Tensor]
) -> Tasks:
    for size, each in ids.items():
        call = functools.partial(model, input_ids=each)
        yield Point(engine, shape, size), functools.partial(timed, call, CALLS)


def _onnx(shape: tuple[int, int], model: PreTrainedModel, ids: dict[str, Tensor]) -> Tasks:
    with importing("a comparison with ONNX Runtime", "opfa[export]"):
        import onnxruntime
    from opfa.inference import onnx_graph

    graph = onnx_graph.trace(model, ["input_ids", "attention_mask"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    for size, each in ids.items():
        inputs = {"input_ids": each.numpy(), "attention_mask": torch.ones_like(each).numpy()}
        call = functools.partial(session.run, None, inputs)
        yield Point(ONNX, shape, size), functools.partial(timed, call, CALLS)
