"""Whole layers of an encoder: what each is worth, and an encoder without some of them.

A gate multiplies what a layer adds to its hidden states. A layer whose gate is zero is gone: its
hidden states pass unchanged.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.models.removal import family_of, layers_of


class LayerGates:
    """A gate for each layer and each row of a batch; a context, while which they are in the model.

    The parameters of the model should need no gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Prepare gates for all layers."""
        self._layers, self._ending = [layer for layer, _ in layers_of(model)], ExitStack()
        self._gates: list[Tensor] = []

    def __enter__(self) -> "LayerGates":
        """Put the gates in."""
        for layer in self._layers:
            self._ending.callback(layer.register_forward_hook(self._gate).remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Take them out."""
        self._ending.close()

    def _gate(self, _: nn.Module, args: tuple[Any, ...], found: Any) -> Any:
        before, after = args[0], found[0] if isinstance(found, tuple) else found
        gate = after.new_ones(len(after), requires_grad=True)
        self._gates.append(gate)
        gated = before + gate[:, None, None] * (after - before)
        return (gated, *found[1:]) if isinstance(found, tuple) else gated

    def gradients(self, loss: Tensor) -> Tensor:
        """The gradient of a sum of losses by the gates, [B, layers]."""
        gates, self._gates = self._gates, []
        return torch.stack(torch.autograd.grad(loss, gates), 1)


def first_stays(model: PreTrainedModel) -> bool:
    """Whether the first layer differs from the others: ModernBERT's has no norm before it."""
    names = [{name for name, _ in layer.named_parameters()} for layer, _ in layers_of(model)]
    return any(names[0] != others for others in names[1:])


def drop_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep the layers whose numbers are given, in this order; the configuration says so too."""
    config: Any = model.config  # of a family
    stack = cast(nn.ModuleList, model.base_model.get_submodule(family_of(model).stack))
    own = {int(key): each for key, each in (config.to_dict().get("per_layer_config") or {}).items()}
    types = getattr(config, "layer_types", None)
    config.per_layer_config = None
    for number, layer in enumerate([stack[old] for old in kept]):
        stack[number] = layer
    del stack[len(kept) :]
    config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = [types[old] for old in kept]
    if moved := {new: own[old] for new, old in enumerate(kept) if old in own}:
        config.per_layer_config = moved
