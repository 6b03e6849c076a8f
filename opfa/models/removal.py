"""Dead heads and neurons of an encoder, removed exactly: what they still add goes into biases.

    dead columns of the output matrix     nothing comes out of the unit
    dead rows of values                   a head gives its values' bias: softmax weights sum to one
    a dead row of the first matrix        a neuron gives activation(bias)

A constant c that a unit gives becomes `bias += W[:, unit] c` of the next matrix. A head whose
queries or keys alone are dead still averages its values, so it is alive.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.errors import ModelError
from opfa.sparsity.units import (
    FAMILIES,
    HEADS,
    NEURONS,
    Family,
    Units,
    head_size,
    units_of,
    without_layers_of_their_own,
)


@dataclass(frozen=True)
class Dead:
    """The units of one layer by kind, which of them are dead (True in [units]), and what each gives
    whatever its input is, [units, size], fp64; NaN where it depends. `averaging` are heads whose
    queries or keys alone are dead.
    """

    units: dict[str, Units]
    dead: dict[str, Tensor]
    constants: dict[str, Tensor]
    averaging: Tensor


def family_of(model: PreTrainedModel) -> Family:
    """The names of a model's parts; raises `ModelError` for a family that isn't known."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"model_type {kind!r}: heads and neurons are known of {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def layers_of(model: PreTrainedModel) -> Iterator[tuple[nn.Module, dict[str, Units]]]:
    """The layers of an encoder, or of the encoder below a head, with their units."""
    family, size = family_of(model), head_size(model.config)
    stack = model.base_model.get_submodule(family.stack)
    for layer in stack.children():
        yield layer, units_of(layer, family, size)


def groups_of(model: PreTrainedModel) -> list[Units]:
    """The heads and the neurons of layer 0, those of layer 1, ..."""
    return [units for _, by_kind in layers_of(model) for units in by_kind.values()]


def matrices_of(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers that heads and neurons are lines of."""
    return [linear for units in groups_of(model) for linear in units.linears()]


@torch.no_grad()
def find_dead(model: PreTrainedModel) -> list[Dead]:
    """The dead units of each layer; those whose constant has no bias to go into are alive, and so
    are heads that average.

    Raises `ModelError` where such heads are all that could be meant.
    """
    family, found = family_of(model), list[Dead]()
    for layer, units in layers_of(model):
        constants = {kind: _constant(kind, layer, family, units) for kind in units}
        dead = {kind: _dead(units[kind], constants[kind]) for kind in units}
        queries, keys = (units[HEADS].weight(number).any(2).any(1) for number in range(2))
        found.append(Dead(units, dead, constants, ~(queries & keys) & ~dead[HEADS]))
    if not any(bool(dead.any()) for each in found for dead in each.dead.values()):
        _refuse_averaging(found)
    return found


def _refuse_averaging(found: list[Dead]) -> None:
    for number, each in enumerate(found):
        if each.averaging.any():
            head = int(each.averaging.nonzero()[0])
            what = "its queries or its keys are dead, but it still averages its values"
            raise ModelError(f"layer {number}, head {head}: can't be removed: {what}")


def _constant(kind: str, layer: nn.Module, family: Family, units: dict[str, Units]) -> Tensor:
    if kind == HEADS:
        values = units[HEADS]
        is_constant = ~values.weight(2).any(2).any(1, keepdim=True)
        return values.bias(2).double().where(is_constant, torch.nan)
    neurons, activation = units[NEURONS], layer.get_submodule(family.activation)
    given = _row_constants(neurons, 0, activation)
    if len(neurons.rows) == 1:
        return given
    gate = _row_constants(neurons, 1, lambda bias: bias)
    product = given * gate  # NaN where one of them depends on the input, unless the other is 0
    return product.where((given != 0) & (gate != 0), 0.0)


def _row_constants(neurons: Units, number: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    is_constant = ~neurons.weight(number).any(2)
    return function(neurons.bias(number).double()).where(is_constant, torch.nan)


def _dead(units: Units, constant: Tensor) -> Tensor:
    columns = ~units.columns().any(2).any(0)
    is_known = ~constant.isnan().any(1)
    can_be_folded = is_known if units.out.bias is not None else (constant == 0).all(1)
    return columns | can_be_folded


@torch.no_grad()
def fold(found: list[Dead]) -> None:
    """Add what dead units give to the biases behind them, and make all of their weights zero."""
    for each in found:
        for kind, dead in each.dead.items():
            units = each.units[kind]
            constant = each.constants[kind].nan_to_num()
            given = torch.einsum("ous,us->o", units.columns().double(), constant * dead[:, None])
            if units.out.bias is not None:
                units.out.bias.copy_(units.out.bias.double() + given)
            units.erase(dead)


@torch.no_grad()
def remove(found: list[Dead], least_neurons: int = 0) -> None:
    """Make the matrices smaller, after `fold`. Each layer keeps `least_neurons`, dead ones too."""
    for each in found:
        for kind, dead in each.dead.items():
            order = dead.sort(stable=True).indices  # the living first
            num_kept = int((~dead).sum())
            if kind == NEURONS:
                num_kept = max(num_kept, min(least_neurons, len(dead)))
            each.units[kind].keep(order[:num_kept].sort().values)


def tell_shapes(model: PreTrainedModel) -> None:
    """Make the configuration say how many heads and neurons each layer has."""
    family, size = family_of(model), head_size(model.config)
    config: Any = model.config  # of a family
    plain = without_layers_of_their_own(config)
    counts = [{kind: units[kind].count for kind in units} for _, units in layers_of(model)]
    heads_key, neurons_key = family.keys
    if len({count[NEURONS] for count in counts}) == 1:
        setattr(plain, neurons_key, counts[0][NEURONS])
    own: dict[int, dict[str, int]] = {}
    for number, count in enumerate(counts):
        wanted = {heads_key: count[HEADS], neurons_key: count[NEURONS]}
        own[number] = {key: n for key, n in wanted.items() if n != getattr(plain, key)}
    config.per_layer_config = None
    setattr(config, neurons_key, getattr(plain, neurons_key))
    if any(heads_key in each for each in own.values()):
        config.head_dim = size
    if any(own.values()):
        config.per_layer_config = own
