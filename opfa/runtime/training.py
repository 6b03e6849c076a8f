"""Training that costs what lives: sparse kernels under the masked layers of any model.

    use_kernels(model)  # "auto": where they gain; True: wherever they can

A layer keeps its dense weight and mask. In each pass its live weights become one vector, which the
kernels multiply with, and the gradient goes back to its places: an optimizer, hooks, accumulation
and ZeRO see what they saw before. A mask that changed gets a new pattern at the next pass.
"""

import logging
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from opfa.errors import ModelError, RunError
from opfa.runtime.build import why_not
from opfa.runtime.gains import gains
from opfa.runtime.patterns import Pattern
from opfa.runtime.products import DTYPES, live_of, sparse_linear
from opfa.sparsity import layers
from opfa.sparsity.layers import MaskedLinear, masked_layers

Kernels = Literal["auto"] | bool
log = logging.getLogger(__name__)
_said: set[str] = set()  # each reason is told once in a process


class SparseProduct:
    """Multiplies by a masked layer's live weights (`sparsity.layers.Product`)."""

    def __init__(self, *, is_free: bool) -> None:
        """Nothing is built yet; with `is_free` only what gains is computed here."""
        self.is_free = is_free
        self._pattern: Pattern | None = None
        self._rows: Tensor | None = None
        self._held: tuple[Tensor, int] | None = None  # a mask, and its version then

    def __call__(self, layer: MaskedLinear, input: Tensor) -> Tensor | None:
        """The layer's output; None for what the kernels can't do, or with `is_free` don't gain."""
        if input.device.type != "cpu" or layer.weight.device.type != "cpu":
            return _say(f"on {input.device.type} models compute without the sparse kernels")
        if torch.compiler.is_compiling():
            return _say("compiled models compute without the sparse kernels")
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        if input.dtype not in DTYPES or not input.shape or input.shape[-1] != layer.in_features:
            return None  # of a wrong shape too: torch says what is wrong
        pattern = self.pattern(layer)
        num_tokens = input.numel() // max(1, layer.in_features)
        if self.is_free and not gains(pattern, num_tokens, input.dtype):
            return None
        return self._multiply(layer, input, pattern)

    def _multiply(self, layer: MaskedLinear, input: Tensor, pattern: Pattern) -> Tensor:
        exact = torch.float64 if input.dtype == torch.float64 else torch.float32
        values = live_of(layer.weight, pattern).to(exact)
        values = layer.effective_values(values, self._rows_of(pattern))
        bias = None if layer.bias is None else layer.bias.to(exact)
        return sparse_linear(input, values, bias, pattern)

    def pattern(self, layer: MaskedLinear) -> Pattern:
        """The pattern of the layer's mask, built anew if that is another one than before."""
        mask = layer.mask
        version = 0 if mask.is_inference() else mask._version
        if self._pattern is None or self._held != (mask, version):
            self._pattern, self._held, self._rows = Pattern.of(mask), (mask, version), None
        return self._pattern

    def _rows_of(self, pattern: Pattern) -> Tensor:
        if self._rows is None:
            self._rows = pattern.places.long() // max(1, pattern.columns)
        return self._rows

    def check(self, layer: MaskedLinear, name: str) -> None:
        """Raise `ModelError` if the mask was changed in a way that torch doesn't count."""
        if self._pattern is None:
            return
        mask, places = layer.mask.reshape(-1), self.pattern(layer).places
        if int(mask.count_nonzero()) != len(places) or not bool(mask[places.long()].all()):
            raise ModelError(
                f"{name}.mask: was changed behind torch's back (.data?) while the sparse kernels "
                "multiplied by another one; change masks by mask.copy_(...)"
            )


def use_kernels(model: nn.Module, kernels: Kernels = "auto") -> list[str]:
    """Put sparse kernels under a model's masked layers, or with False take them away.

    "auto" computes in them what gains, by a measured table, and on a machine without kernels
    nothing. Gives the names of the layers. Raises `ModelError` for a model without masked layers,
    and with True `RunError` where the kernels can't run.
    """
    if kernels not in ("auto", True, False):
        raise ModelError(f"kernels = {kernels!r}: must be 'auto', True or False")
    found = masked_layers(model)
    if not found:
        raise ModelError("kernels: this model has no masked layers; opfa.lock(model) makes them")
    if kernels and (problem := why_not()):
        if kernels is True:
            raise RunError(f"kernels = True: {problem}")
        _say(f"models train without the sparse kernels: {problem}")
        kernels = False
    for layer in found.values():
        layer.product = SparseProduct(is_free=kernels == "auto") if kernels else None
    return list(found) if kernels else []


def lock(model: nn.Module, names: Iterable[str] | None = None, *, kernels: Kernels = False) -> dict:
    """Hold the zeros that a model's linear layers have now, through any training.

    Swaps each sparse `nn.Linear` in place for a `MaskedLinear`. Call it before an optimizer, a
    Trainer or an engine is made. `names` are the weights to lock, whatever number of zeros each
    has. Without it a matrix of zeros alone is locked in the encoder, and counts as new in a head or
    an adapter. With `kernels="auto"` a step on a CPU computes live weights only, where that is
    faster; True asks for it everywhere. Returns the sparsity report. Raises `ModelError` for a
    model without zeros, one that is locked or partitioned, and where zeros are in no `nn.Linear`.
    """
    result = layers.lock(model, names)
    if kernels:
        use_kernels(model, kernels)
    return result


def _say(what: str) -> None:
    if what not in _said:
        _said.add(what)
        log.warning("%s", what)
