"""Speed of an encoder that lost heads and neurons, against its multiply-adds: one thread, MiniLM's
shape, random weights. A ratio is the median over rounds of two times of the same round.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opfa.bench.forms import in_8_bits
from opfa.bench.measure import timed
from opfa.bench.worker import FIRST_ID, LAST_ID
from opfa.extras import importing
from opfa.models.configs import new_config
from opfa.models.encoders import HEADS as TASKS
from opfa.models.removal import family_of, layers_of
from opfa.report.bars import Bar
from opfa.report.tables import Result, Row, Table, column
from opfa.runtime.encoder import with_kernels
from opfa.sparsity.units import HEADS, NEURONS, head_size, note_heads

CONFIG: dict[str, Any] = {  # of all-MiniLM-L6-v2; Any: as JSON has it
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
DENSE, SMALL = (12, 1536), (6, 512)
SHAPES = (DENSE, (12, 768), (12, 512), (6, 1536), SMALL, (3, 256))
INPUTS = {"large": (8, 128), "one": (1, 32)}  # sequences, tokens
ZEROS = 0.7
Call = Callable[[], object]


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


class Timed(NamedTuple):
    """What is timed with one input."""

    name: str
    size: str
    call: Call


def bench_shapes(rounds: int = 25) -> Shapes:
    """Measure shapes in torch, and the small one in ONNX Runtime and in the CPU runtime."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {shape: shaped(*shape) for shape in SHAPES}
        calls = [*_calls(models)]
        times = _times(calls, rounds)
    finally:
        torch.set_num_threads(threads)
    macs = {
        shape: {size: _macs(model, *INPUTS[size]) for size in INPUTS}
        for shape, model in models.items()
    }
    dense = _name("torch, fp32", DENSE)

    def faster(name: str, size: str) -> float:
        pairs = zip(times[dense, size], times[name, size], strict=True)
        return statistics.median(before / after for before, after in pairs)

    rows = [
        Shape(
            heads=shape[0],
            neurons=shape[1],
            macs_large=macs[DENSE]["large"] / macs[shape]["large"],
            large=faster(_name("torch, fp32", shape), "large"),
            macs_one=macs[DENSE]["one"] / macs[shape]["one"],
            one=faster(_name("torch, fp32", shape), "one"),
        )
        for shape in SHAPES
    ]
    names = dict.fromkeys(call.name for call in calls if not call.name.startswith("torch"))
    engines = [Engine(engine=n, large=faster(n, "large"), one=faster(n, "one")) for n in names]
    fastest = {size: 1e3 * statistics.median(times[dense, size]) for size in INPUTS}
    return Shapes(threads=1, rounds=rounds, milliseconds=fastest, rows=rows, engines=engines)


def shaped(heads: int, neurons: int) -> PreTrainedModel:
    """A random classifier whose layers have so many heads and neurons."""
    torch.manual_seed(0)
    model = TASKS["SequenceClassification"].from_config(new_config(CONFIG)).eval()
    for layer, units in layers_of(model):
        units[HEADS].keep(torch.arange(heads))
        units[NEURONS].keep(torch.arange(neurons))
        note_heads(layer, family_of(model), heads, head_size(model.config))
    model.config.architectures = [type(model).__name__]  # an export asks for it
    return model.requires_grad_(False)


def _name(engine: str, shape: tuple[int, int]) -> str:
    return f"{engine}: {shape[0]} heads, {shape[1]} neurons"


def _macs(model: PreTrainedModel, sequences: int, tokens: int) -> int:
    """Multiply-adds of the layers: of the matrices, and of attention."""
    found = 0
    for _, units in layers_of(model):
        matrices = [linear for each in units.values() for linear in each.linears()]
        width = units[HEADS].out.in_features
        found += sum(each.weight.numel() for each in matrices) + 2 * tokens * width
    return sequences * tokens * found


def _calls(models: dict[tuple[int, int], PreTrainedModel]) -> Iterator[Timed]:
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
    for _, units in layers_of(sparse):
        for each in units.values():
            for linear in each.linears():
                linear.weight.masked_fill_(torch.rand_like(linear.weight) < ZEROS, 0.0)
    kernels = with_kernels(in_8_bits(sparse), 1, "int8")
    yield from _by_input(f"{_name('ours, int8', SMALL)}, {ZEROS:.0%} zeros", kernels, ids)


def _by_input(name: str, model: PreTrainedModel, ids: dict[str, Tensor]) -> Iterator[Timed]:
    for size, each in ids.items():
        yield Timed(name, size, lambda each=each: model(input_ids=each))


def _onnx(name: str, model: PreTrainedModel, ids: dict[str, Tensor]) -> Iterator[Timed]:
    with importing("a comparison with ONNX Runtime", "opfa[export]"):
        import onnxruntime
    from opfa.inference import onnx_graph

    graph = onnx_graph.trace(model, ["input_ids", "attention_mask"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    for size, each in ids.items():
        inputs = {"input_ids": each.numpy(), "attention_mask": torch.ones_like(each).numpy()}
        yield Timed(name, size, lambda inputs=inputs: session.run(None, inputs))


def _times(calls: list[Timed], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call in each round, after one that isn't counted."""
    found: dict[tuple[str, str], list[float]] = {}
    with Bar("rounds", rounds) as bar, torch.inference_mode():
        for _ in range(rounds):
            for name, size, call in calls:
                call()
                found.setdefault((name, size), []).append(timed(call))
            bar.advance(1)
    return found
