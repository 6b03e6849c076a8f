"""What dies together in an encoder's layer, by names and shapes: heads and neurons.

head    its rows of queries, keys and values, and its columns of the output matrix
neuron  its row of the feed-forward's first matrix, in gated layers its rows of input and gate,
        and its column of the second matrix
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

HEADS, NEURONS = "heads", "neurons"


class Rows(NamedTuple):
    """One of several equal pieces of a matrix' rows."""

    path: str
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of encoders calls the parts of a layer, and their numbers in its config."""

    stack: str
    attention: str  # the module that may know how many heads it has
    heads: tuple[Rows, Rows, Rows]  # queries, keys, values
    heads_out: str
    neurons: tuple[Rows, ...]  # of the first matrix, or of input and gate
    neurons_out: str
    residual: str  # its input is what the output of neurons is added to
    activation: str
    keys: tuple[str, str]  # of heads and neurons in the configuration

    def matrices(self, kind: str) -> str:
        """A regular expression for the names of the layers that heads, or neurons, are lines of."""
        rows, out = {HEADS: (self.heads, self.heads_out)}.get(
            kind, (self.neurons, self.neurons_out)
        )
        paths = dict.fromkeys([*(row.path for row in rows), out])
        return rf"{re.escape(self.stack)}\.\d+\.({'|'.join(map(re.escape, paths))})$"


_BERT = Family(
    stack="encoder.layer",
    attention="attention.self",
    heads=(
        Rows("attention.self.query"),
        Rows("attention.self.key"),
        Rows("attention.self.value"),
    ),
    heads_out="attention.output.dense",
    neurons=(Rows("intermediate.dense"),),
    neurons_out="output.dense",
    residual="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    keys=("num_attention_heads", "intermediate_size"),
)
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Family(
        stack="transformer.layer",
        attention="attention",
        heads=(Rows("attention.q_lin"), Rows("attention.k_lin"), Rows("attention.v_lin")),
        heads_out="attention.out_lin",
        neurons=(Rows("ffn.lin1"),),
        neurons_out="ffn.lin2",
        residual="ffn.lin1",
        activation="ffn.activation",
        keys=("n_heads", "hidden_dim"),
    ),
    "modernbert": Family(
        stack="layers",
        attention="attn",
        heads=(Rows("attn.Wqkv", 0, 3), Rows("attn.Wqkv", 1, 3), Rows("attn.Wqkv", 2, 3)),
        heads_out="attn.Wo",
        neurons=(Rows("mlp.Wi", 0, 2), Rows("mlp.Wi", 1, 2)),
        neurons_out="mlp.Wo",
        residual="mlp_norm",
        activation="mlp.act",
        keys=("num_attention_heads", "intermediate_size"),
    ),
}


class Units:
    """The heads, or the neurons, of one layer; `size` is how many lines a unit has."""

    def __init__(
        self, layer: nn.Module, rows: Sequence[Rows], out: str, size: int, counted_by: str = ""
    ) -> None:
        """Look at a layer; nothing is copied. `counted_by` is a module that notes their number."""
        self.layer, self.rows, self.size, self.counted_by = layer, rows, size, counted_by
        self.out_path, self.out = out, self._linear(out)

    def of(self, layer: nn.Module) -> "Units":
        """The same units of another layer."""
        return Units(layer, self.rows, self.out_path, self.size, self.counted_by)

    def _linear(self, path: str) -> nn.Linear:
        return cast(nn.Linear, self.layer.get_submodule(path))

    def shape(self, path: str) -> list[int]:
        """The shape of a matrix that they are lines of."""
        return list(self._linear(path).weight.shape)

    def linears(self) -> list[nn.Linear]:
        """The layers that they are lines of."""
        return [*(self._linear(path) for path in {row.path: None for row in self.rows}), self.out]

    @property
    def count(self) -> int:
        """How many there are."""
        return self.out.in_features // self.size

    def weight(self, number: int) -> Tensor:
        """The rows of `self.rows[number]`, [units, size, in]."""
        return self._piece(number, self._linear(self.rows[number].path).weight)

    def bias(self, number: int) -> Tensor:
        """Their biases [units, size], zeros where there are none."""
        if (bias := self._linear(self.rows[number].path).bias) is None:
            return self.weight(number).new_zeros(self.count, self.size)
        return self._piece(number, bias)

    def _piece(self, number: int, lines: Tensor) -> Tensor:
        start = self.rows[number].piece * self.out.in_features
        return lines[start : start + self.out.in_features].unflatten(0, (self.count, self.size))

    def columns(self) -> Tensor:
        """What they are multiplied with, [out, units, size]."""
        return self.out.weight.unflatten(1, (self.count, self.size))

    def squares(self) -> Tensor:
        """The sum of squares of each unit's weights, [units], fp64."""
        rows = [
            self.weight(number).double().square().sum((1, 2)) for number in range(len(self.rows))
        ]
        return sum(rows, self.columns().double().square().sum((0, 2)))

    def erase(self, is_gone: Tensor) -> None:
        """Make all weights and biases of units zero, True in [units]."""
        self.columns()[:, is_gone] = 0
        for number, row in enumerate(self.rows):
            self.weight(number)[is_gone] = 0
            if self._linear(row.path).bias is not None:
                self.bias(number)[is_gone] = 0

    def keep(self, units: Tensor) -> None:
        """Keep the units whose numbers are given, in that order."""
        lines = (units[:, None] * self.size + units.new_tensor(range(self.size))).flatten()
        width = self.out.in_features
        for path, pieces in {row.path: row.pieces for row in self.rows}.items():
            linear = self._linear(path)
            kept = (lines + lines.new_tensor(range(pieces))[:, None] * width).flatten()
            linear.weight = nn.Parameter(linear.weight.detach()[kept])
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[kept])
            linear.out_features = len(kept)
        self.out.weight = nn.Parameter(self.out.weight.detach()[:, lines].contiguous())
        self.out.in_features = len(lines)
        if self.counted_by:
            module: Any = self.layer.get_submodule(self.counted_by)  # of transformers
            numbers = dict.fromkeys(("num_attention_heads", "n_heads"), len(units))
            for name, number in {**numbers, "all_head_size": len(lines)}.items():
                if hasattr(module, name):
                    setattr(module, name, number)


def units_of(layer: nn.Module, family: Family, head_size: int) -> dict[str, Units]:
    """The heads and the neurons of a layer."""
    return {
        HEADS: Units(layer, family.heads, family.heads_out, head_size, family.attention),
        NEURONS: Units(layer, family.neurons, family.neurons_out, 1),
    }


def layers_with_units(model: nn.Module) -> Iterator[tuple[str, dict[str, Units]]]:
    """The layers of the first encoder in a model, by path, with their heads and neurons; none where
    its family isn't known.
    """
    for path, module in model.named_modules():
        config = getattr(module, "config", None)  # any module of any model is asked
        family = FAMILIES.get(getattr(config, "model_type", ""))
        stack = dict(module.named_modules()).get(family.stack) if family else None
        if family and stack is not None:
            for name, layer in stack.named_children():
                inner = f"{path}.{family.stack}.{name}".lstrip(".")
                yield inner, units_of(layer, family, head_size(config))
            return


def without_layers_of_their_own(config: Any) -> Any:  # Any: a configuration of transformers
    """A configuration as it is for a layer that `per_layer_config` says nothing of."""
    if not config.is_heterogeneous:
        return config
    found = copy.copy(config)
    found.per_layer_config = None
    return found


def head_size(config: Any) -> int:  # Any: a configuration of transformers
    """Channels of a head, which don't change when heads go."""
    config = without_layers_of_their_own(config)
    return config.hidden_size // config.num_attention_heads
