"""Training that costs what lives: sparse kernels under the masked layers of any model.

    use_kernels(model)  # "auto": where they gain; True: wherever they can

A layer keeps its dense weight and mask. In each pass its live weights become one vector, which the
kernels multiply with, and the gradient goes back to its places: an optimizer, hooks, accumulation
and ZeRO see what they saw before. A mask that changed gets a new pattern at the next pass.
"""

import logging
from collections.abc import Iterable
from typing import Any, Literal

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
MANY = 1024  # tokens of a step, if nobody says how many
MOVED = "a mask changed while only the live weights are trained; opfa.fuse the model first"
_said: set[str] = set()  # each reason is told once in a process


class SparseProduct:
    """Multiplies by a masked layer's live weights (`sparsity.layers.Product`)."""

    def __init__(self, *, is_free: bool) -> None:
        """Nothing is built yet; with `is_free` only what gains is computed here."""
        self.is_free = is_free
        self._pattern: Pattern | None = None
        self._rows: Tensor | None = None
        self._held: tuple[Tensor, int] | None = None  # a mask, and its version then
        self._num_live = 0  # of that mask
        self.live: nn.Parameter | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the pattern, which a copy builds anew from its own mask."""
        return {**vars(self), "_pattern": None, "_rows": None, "_held": None}

    def train_live(self, layer: MaskedLinear) -> None:
        """From now on the live weights are what is trained; the mask may not change any more."""
        self.live = nn.Parameter(self.take(layer, layer.weight.detach()))

    def suits(self, layer: MaskedLinear) -> bool:
        """Whether batches of some size gain."""
        is_fit = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
        return is_fit and (not self.is_free or self._gains(layer, MANY, torch.float32))

    def take(self, layer: MaskedLinear, whole: Tensor) -> Tensor:
        """The numbers [live] of a tensor like the weight, in the order of `live`."""
        return self.pattern(layer).take(whole)

    def put(self, layer: MaskedLinear, values: Tensor, whole: Tensor) -> None:
        """Write numbers [live] to their places in a tensor like the weight."""
        self.pattern(layer).put(values, whole)

    def __call__(self, layer: MaskedLinear, input: Tensor) -> Tensor | None:
        """The layer's output; None for what the kernels can't do, or with `is_free` don't gain."""
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        if problem := _problem(layer, input):
            if self.live is not None and torch.is_grad_enabled():
                raise ModelError(f"{problem}; only the live weights are trained, in the kernels")
            return _say(problem)
        if not input.shape or input.shape[-1] != layer.in_features:
            return None  # torch says what is wrong
        num_tokens = input.numel() // max(1, layer.in_features)
        is_asked = self.is_free and self.live is None
        if is_asked and not self._gains(layer, num_tokens, input.dtype):
            return None
        return self._multiply(layer, input, self.pattern(layer))

    def _multiply(self, layer: MaskedLinear, input: Tensor, pattern: Pattern) -> Tensor:
        exact = torch.float64 if input.dtype == torch.float64 else torch.float32
        values = live_of(layer.weight, pattern) if self.live is None else self.live
        values = values.to(exact)
        values = layer.effective_values(values, self._rows_of)
        bias = None if layer.bias is None else layer.bias.to(exact)
        return sparse_linear(input, values, bias, pattern)

    def _gains(self, layer: MaskedLinear, num_tokens: int, dtype: torch.dtype) -> bool:
        """Whether so many tokens gain; no pattern is built for that."""
        self._look_at(layer.mask)
        size = layer.mask.numel()
        return gains(size, self._num_live / max(1, size), num_tokens, dtype)

    def pattern(self, layer: MaskedLinear) -> Pattern:
        """The pattern of the layer's mask, built anew if that is another one than before."""
        self._look_at(layer.mask)
        if self._pattern is None:
            self._pattern = Pattern.of(layer.mask)
        return self._pattern

    def _look_at(self, mask: Tensor) -> None:
        """Count what lives in a mask that changed, and forget the pattern of another one."""
        version = 0 if mask.is_inference() else mask._version
        if self._held is not None and self._held[0] is mask and self._held[1] == version:
            return
        if self._pattern is not None and not self._fits(mask):
            if self.live is not None:
                raise ModelError(MOVED)
            self._pattern = self._rows = None
        self._held, self._num_live = (mask, version), int(mask.count_nonzero())

    def _fits(self, mask: Tensor) -> bool:
        """Whether the pattern is that of a mask, weight by weight."""
        assert self._pattern is not None
        places = self._pattern.places.long()
        is_in = mask.shape == (self._pattern.rows, self._pattern.columns)
        is_all = is_in and int(mask.count_nonzero()) == len(places)
        return is_all and bool(mask.reshape(-1)[places].all())

    def _rows_of(self) -> Tensor:
        assert self._pattern is not None
        if self._rows is None:
            self._rows = self._pattern.places.long() // max(1, self._pattern.columns)
        return self._rows

    def check(self, layer: MaskedLinear, name: str) -> None:
        """Raise `ModelError` if the mask was changed in a way that torch doesn't count."""
        if self._pattern is not None and not self._fits(layer.mask):
            raise ModelError(
                f"{name}.mask: was changed behind torch's back (.data?) while the sparse kernels "
                "multiplied by another one; change masks by mask.copy_(...)"
            )


def use_kernels(
    model: nn.Module, kernels: Kernels = "auto", *, train_live: bool = False
) -> list[str]:
    """Put sparse kernels under a model's masked layers, or with False take them away.

    "auto" computes in them what gains, by a measured table, and on a machine without kernels
    nothing. With `train_live` an engine that knows `Product.live` trains live weights alone. Gives
    the names of the layers. Raises `ModelError` for a model without masked layers, and with True
    `RunError` where the kernels can't run.
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
        layer.product = product = SparseProduct(is_free=kernels == "auto") if kernels else None
        if product is not None and train_live and product.suits(layer):
            product.train_live(layer)
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


def _problem(layer: MaskedLinear, input: Tensor) -> str | None:
    """Why the kernels can't compute with such an input."""
    if input.device.type != "cpu" or layer.weight.device.type != "cpu":
        return f"on {input.device.type} models compute without the sparse kernels"
    if torch.compiler.is_compiling():
        return "compiled models compute without the sparse kernels"
    if input.dtype not in DTYPES:
        return f"models in {input.dtype} compute without the sparse kernels"
    return None


def _say(what: str) -> None:
    if what not in _said:
        _said.add(what)
        log.warning("%s", what)
