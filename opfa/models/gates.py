"""Gates: how much the loss would feel that a head, a neuron or a layer goes.

A gate is one. It multiplies what a unit gives to the matrix behind it, or what a layer adds to its
hidden states; where it is zero, the unit or the layer is gone. The empirical Fisher information of
gates is the mean of products of their gradients, one gradient for each sequence (Kwon et al. 2022,
"A Fast Post-Training Pruning Framework for Transformers", section 4.1).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opfa.sparsity.units import Units


class Gates:
    """Base of gates, each with a value for each row of a batch; a context, while which they are in
    the model. The parameters of the model should need no gradients.
    """

    def __init__(self) -> None:
        """No gate is in a model yet."""
        self._ending = ExitStack()
        self._gates: list[Tensor] = []  # of one forward pass, in its order

    def _hooks(self) -> Iterator[RemovableHandle]:
        """Put the gates in."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Put the gates in."""
        for handle in self._hooks():
            self._ending.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Take them out."""
        self._ending.close()

    def _new(self, states: Tensor, num: int) -> Tensor:
        """A gate [B, num] for states [B, ...]."""
        gate = states.new_ones(len(states), num, requires_grad=True)
        self._gates.append(gate)
        return gate

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of a sum of losses by the gates of each group, [B, units]."""
        gates, self._gates = self._gates, []
        return list(torch.autograd.grad(loss, gates, materialize_grads=True))


class UnitGates(Gates):
    """A gate for the units of each group."""

    def __init__(self, groups: Sequence[Units]) -> None:
        """Of these groups, in the order in which a model computes them."""
        super().__init__()
        self._groups = groups

    def _hooks(self) -> Iterator[RemovableHandle]:
        for units in self._groups:
            yield units.out.register_forward_pre_hook(partial(self._gate, units))

    def _gate(self, units: Units, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        (given,) = args  # [B, T, units * size]
        return (given * self._new(given, units.count).repeat_interleave(units.size, 1)[:, None],)


class LayerGates(Gates):
    """A gate for each layer."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Of these layers, in the order in which a model computes them."""
        super().__init__()
        self._layers = layers

    def _hooks(self) -> Iterator[RemovableHandle]:
        for layer in self._layers:
            yield layer.register_forward_hook(self._gate)

    def _gate(self, _: nn.Module, args: tuple[Any, ...], found: Any) -> Any:
        before, after = args[0], found[0] if isinstance(found, tuple) else found
        gated = before + self._new(after, 1)[:, None] * (after - before)
        return (gated, *found[1:]) if isinstance(found, tuple) else gated

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """All of them as one, [B, layers]: layers are one group."""
        return [torch.cat(super().gradients(loss), 1)]
