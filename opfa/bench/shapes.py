"""Speed of an encoder that lost heads and neurons, against its multiply-adds: one thread, MiniLM's
shape, random weights. A ratio is the median over rounds of two times of the same round.
"""

import copy
from collections.abc import Iterator

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

DENSE, SMALL = (12, 1536), (6, 512)
SHAPES = (DENSE, (12, 768), (12, 512), (6, 1536), SMALL, (3, 256))
INPUTS = {"large": (8, 128), "one": (1, 32)}  # sequences, tokens
ZEROS = 0.7
Point = tuple[str, str]  # what computes, and which input
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
    """How many times as fast as dense fp32 in torch, for 8 x 128 tokens and for 1 x 32."""

    engine: str
    large: float = column("8 x 128", ".2f")
    one: float = column("1 x 32", ".2f")


class Shapes(Result):
    """What `opfa bench shapes` finds."""

    threads: int
    rounds: int
    milliseconds: dict[str, float]  # of the dense shape in torch, by input
    rows: list[Shape]
    engines: list[Engine]

    def parts(self, *, is_long: bool = False) -> Iterator[Table]:
        """One line for each shape in torch, and one for each engine."""
        yield Table.of("heads, neurons", {f"{r.heads}, {r.neurons}": r for r in self.rows})
        yield Table.of("engine", {row.engine: row for row in self.engines})


def bench_shapes(rounds: int = 25) -> Shapes:
    """Measure shapes in torch, and the small one in ONNX Runtime and in the CPU runtime."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {shape: shaped(*shape) for shape in SHAPES}
        tasks: dict[Point, Task] = dict(_tasks(models))
        with torch.inference_mode():
            turns = Turns().take({" ".join(point): each for point, each in tasks.items()}, rounds)
    finally:
        torch.set_num_threads(threads)
    counts = {
        shape: {size: macs(model, *INPUTS[size]).whole for size in INPUTS}
        for shape, model in models.items()
    }
    dense = _name("torch, fp32", DENSE)

    def faster(name: str, size: str) -> float:
        return turns.ratio(f"{dense} {size}", f"{name} {size}")

    rows = [
        Shape(
            heads=shape[0],
            neurons=shape[1],
            macs_large=counts[DENSE]["large"] / counts[shape]["large"],
            large=faster(_name("torch, fp32", shape), "large"),
            macs_one=counts[DENSE]["one"] / counts[shape]["one"],
            one=faster(_name("torch, fp32", shape), "one"),
        )
        for shape in SHAPES
    ]
    names = dict.fromkeys(name for name, _ in tasks if not name.startswith("torch"))
    engines = [Engine(engine=n, large=faster(n, "large"), one=faster(n, "one")) for n in names]
    medians = {size: turns.median(f"{dense} {size}") for size in INPUTS}
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


def _name(engine: str, shape: tuple[int, int]) -> str:
    return f"{engine}: {shape[0]} heads, {shape[1]} neurons"


def _tasks(models: dict[tuple[int, int], PreTrainedModel]) -> Tasks:
    """Everything that is timed, by its name."""
    ids = {size: torch.randint(FIRST_ID, LAST_ID, shape) for size, shape in INPUTS.items()}
    for shape, model in models.items():
        yield from _by_input(_name("torch, fp32", shape), model, ids)
    for shape in (DENSE, SMALL):
        yield from _onnx(_name("ONNX Runtime, fp32", shape), models[shape], ids)
    for shape in (DENSE, SMALL):
        kernels = with_kernels(copy.deepcopy(models[shape]), 1)
        yield from _by_input(_name("ours, fp32", shape), kernels, ids)
    sparse = copy.deepcopy(models[SMALL])
    for linear in matrices_of(sparse):
        linear.weight.masked_fill_(torch.rand_like(linear.weight) < ZEROS, 0.0)
    kernels = with_kernels(in_8_bits(sparse), 1, "int8")
    yield from _by_input(f"{_name('ours, int8', SMALL)}, {ZEROS:.0%} zeros", kernels, ids)


def _by_input(name: str, model: PreTrainedModel, ids: dict[str, Tensor]) -> Tasks:
    for size, each in ids.items():
        yield (name, size), lambda each=each: timed(lambda: model(input_ids=each), 1)


def _onnx(name: str, model: PreTrainedModel, ids: dict[str, Tensor]) -> Tasks:
    with importing("a comparison with ONNX Runtime", "opfa[export]"):
        import onnxruntime
    from opfa.inference import onnx_graph

    graph = onnx_graph.trace(model, ["input_ids", "attention_mask"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    for size, each in ids.items():
        inputs = {"input_ids": each.numpy(), "attention_mask": torch.ones_like(each).numpy()}
        yield (name, size), lambda inputs=inputs: timed(lambda: session.run(None, inputs), 1)
