"""Gates of heads and neurons: how much the loss would feel that a unit goes.

A gate multiplies what a unit gives to the matrix behind it. It is one, and a unit whose gate is
zero is gone. The empirical Fisher information of gates is the mean of products of their gradients,
one gradient for each sequence (Kwon et al. 2022, "A Fast Post-Training Pruning Framework for
Transformers", section 4.1).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from opfa.sparsity.units import Units


class Gates:
    """A gate for each unit and each row of a batch; a context, while which they are in the model.

    The parameters of the model should need no gradients: those of gates are all that is wanted.
    """

    def __init__(self, groups: Sequence[Units]) -> None:
        """Prepare gates for groups of units."""
        self._groups, self._ending = groups, ExitStack()
        self._open: list[Tensor | None] = [None] * len(groups)

    def __enter__(self) -> "Gates":
        """Put the gates in."""
        for number, units in enumerate(self._groups):
            handle = units.out.register_forward_pre_hook(partial(self._gate, number))
            self._ending.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Take them out."""
        self._ending.close()

    def _gate(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        units, (given,) = self._groups[number], args  # [B, T, units * size]
        gate = given.new_ones(given.shape[0], units.count, requires_grad=True)
        self._open[number] = gate
        return (given * gate.repeat_interleave(units.size, 1)[:, None],)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of a sum of losses by the gates of each group, [B, units]."""
        loss.backward()
        gates = [gate for gate in self._open if gate is not None]
        return [gate.new_zeros(gate.shape) if gate.grad is None else gate.grad for gate in gates]
