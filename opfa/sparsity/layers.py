"""`MaskedLinear`: a linear layer that computes with `weight * mask`, and how models get it.

The gradient of a masked weight is zero by the chain rule, so norms, clipping and moments are right
in any loop. `weight` keeps its name and identity; the mask is a buffer that is not saved.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from opfa.errors import ModelError
from opfa.sparsity import masks as mask_functions
from opfa.sparsity.anatomy import is_matrix, is_pruned, layer_of
from opfa.sparsity.masks import Masks
from opfa.sparsity.product import Product

SPARSE_FROM = 0.01  # a model with fewer zeros than this has none to speak of: rounding leaves a few


class _Masked(torch.autograd.Function):
    """weight * mask; the backward pass keeps the mask, one byte a weight, and no weights."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, known: Tensor | None) -> Tensor:  # noqa: D102 - torch's protocol
        ctx.save_for_backward(mask)
        return _product(weight, mask) if known is None else known.detach()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102 - torch's protocol
        return _product(grads[0], *ctx.saved_tensors), None, None


INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _product(values: Tensor, mask: Tensor) -> Tensor:
    """values * mask, as integers: bits times 1 are the same bits, and times 0 are +0.0."""
    if values.is_cuda:
        return torch.where(mask, values, 0.0)  # the same bits, by one kernel
    integer = INTEGERS[values.element_size()]
    if not torch.compiler.is_compiling():  # on CUDA its compiler can't view a mask as integers
        mask = mask.view(torch.int8)
    return (values.view(integer) * mask.to(integer)).view(values.dtype)


class MaskedLinear(nn.Linear):
    """`nn.Linear` whose masked weights take no part in the forward or the backward pass."""

    mask: Tensor
    is_pruned = True  # not a layer that keeps all weights and is only to be quantized
    is_held = False  # inside of `hold_weights`
    keeps_gradient = False  # of the effective weight, where masked weights have one too
    product: Product | None = None  # instead of `functional.linear` with the effective weight
    _known: Tensor | None = None
    _gradient: Tensor | None = None

    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with: zero wherever the mask is False."""
        if self.is_held and self._known is None:
            self._known = _product(self.weight.detach(), self.mask)
        weight = _Masked.apply(self.weight, self.mask, self._known)
        if self.keeps_gradient and weight.requires_grad:
            weight.register_hook(self._add_gradient)
        return weight

    def keep_gradient(self, keeps: bool) -> None:
        """From now on keep the gradient of the effective weight, for `take_gradient`, or don't."""
        self.keeps_gradient = keeps
        if not keeps:
            self._gradient = None

    def _add_gradient(self, gradient: Tensor) -> None:
        if self._gradient is None:
            self._gradient = torch.zeros_like(gradient, dtype=torch.float32)
        self._gradient += gradient

    def take_gradient(self) -> Tensor:
        """The fp32 sum [out, in] of gradients of the effective weight since the last call."""
        assert self.keeps_gradient, "the gradient before masking was not kept"
        gradient, self._gradient = self._gradient, None  # None: the layer took no part
        return torch.zeros_like(self.mask, dtype=torch.float32) if gradient is None else gradient

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its masked weight."""
        return self.multiply(input)

    def multiply(self, input: Tensor) -> Tensor:
        """W x + b, by the `product` if there is one that takes this input."""
        if self.product is not None and not self.keeps_gradient:
            found = self.product(self, input)
            if found is not None:
                return found
        return functional.linear(input, self.effective_weight(), self.bias)

    def effective_values(self, values: Tensor, rows: Callable[[], Tensor]) -> Tensor:
        """What `effective_weight` makes of live weights [live]; `rows` gives their rows [live]."""
        return values

    def unmask(self) -> None:
        """Become a plain `nn.Linear`, in place; the weight stays as it is."""
        del self.mask
        for name in ("is_pruned", "keeps_gradient", "_gradient", "product"):
            self.__dict__.pop(name, None)
        object.__setattr__(self, "__class__", nn.Linear)


def mask_layers(
    model: nn.Module, names: Iterable[str], *, is_pruned: bool = True
) -> dict[str, MaskedLinear]:
    """Make the named linear layers `MaskedLinear`, in place, with all weights kept for now; without
    `is_pruned` for good, so that `masks_of` leaves them out.
    """
    layers = []
    for name in names:
        layer = model.get_submodule(name)
        _check_whole(name, layer)
        if type(layer) is not nn.Linear:
            kind = type(layer).__name__
            raise ModelError(f"{name}: is a {kind}; only a plain nn.Linear can be masked")
        layers.append(layer)
    for layer in layers:
        layer.__class__ = MaskedLinear  # keeps parameters, hooks and whoever holds the module
        mask = torch.ones_like(layer.weight, dtype=torch.bool)
        layer.register_buffer("mask", mask, persistent=False)
        if not is_pruned:
            layer.is_pruned = False
    return masked_layers(model)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLinear)}


@contextlib.contextmanager
def hold_weights(model: nn.Module) -> Iterator[None]:
    """Compute each effective weight once for all forward passes inside, where none may change."""
    layers = masked_layers(model).values()
    for layer in layers:
        layer.is_held = True
    try:
        yield
    finally:
        for layer in layers:
            for name in ("is_held", "_known"):
                layer.__dict__.pop(name, None)


def masks_of(model: nn.Module) -> Masks:
    """The masks in force, by the name of the weight that each belongs to."""
    return {f"{name}.weight": m.mask for name, m in masked_layers(model).items() if m.is_pruned}


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Copy masks into the masked layers; names and shapes must fit exactly."""
    own = masks_of(model)
    if {n: mask.shape for n, mask in own.items()} != {n: mask.shape for n, mask in masks.items()}:
        raise ModelError("the masks and this model's masked layers have different names or shapes")
    held = any(layer.is_held for layer in masked_layers(model).values())
    assert not held, "masks change while effective weights are held"
    for name, mask in own.items():
        mask.copy_(masks[name])


def zero_masks(model: nn.Module) -> Masks:
    """Masks from the zeros of a model's matrices, where these are pruned (`anatomy.is_pruned`)."""
    masks = {}
    for name, weight in _matrices(model).items():
        mask = mask_functions.nonzero(weight)
        if is_pruned(name, mask.shape, mask.numel() - int(mask.count_nonzero())):
            masks[name] = mask
    return masks


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Weights in which zeros are pruned ones: linear layers anywhere, but none that shares an
    embedding's weight, and every other matrix of a numbered layer.
    """
    modules = dict(model.named_modules())
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    found = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            _check_whole(name, module)
            if id(module.weight) not in embeddings:
                found[f"{name}.weight"] = whole_weight(name, module).detach()
        elif not isinstance(module, nn.Embedding):
            for key, parameter in module.named_parameters(name, recurse=False):
                if layer_of(key) and is_matrix(key, parameter.shape):
                    found[key] = parameter.detach()
    return found


def _check_whole(name: str, layer: nn.Module) -> None:
    """Refuse a linear layer whose weight is made of other tensors in every pass."""
    if not isinstance(layer, nn.Linear) or "weight" in layer._parameters:
        return
    is_new = hasattr(layer, "parametrizations")
    function = "parametrize.remove_parametrizations" if is_new else "prune.remove"
    if layer_of(f"{name}.weight") or bool((layer.weight == 0).any()):
        raise ModelError(
            f"{name}.weight: is made of other tensors in every pass, as by torch.nn.utils.prune; "
            f"call torch.nn.utils.{function}(layer, 'weight') for each such layer first"
        )


def whole_weight(name: str, layer: nn.Linear) -> Tensor:
    """A layer's weight. Raises `ModelError` where this process sees only a part of it."""
    if layer.weight.ndim != 2:
        raise ModelError(
            f"{name}.weight: is partitioned (ZeRO 3?), and whole weights are needed here. Lock a "
            "model before TrainingArguments or an engine are made; or call this, on every rank, "
            "inside `with deepspeed.zero.GatheredParameters(list(model.parameters()), "
            "modifier_rank=0):`"
        )
    return layer.weight


def lock(model: nn.Module, names: Iterable[str] | None = None) -> dict:
    """Hold the zeros that a model's linear layers have now, through any training.

    Swaps each sparse `nn.Linear` in place for a `MaskedLinear`. Call it before an optimizer, a
    Trainer or an engine is made. `names` are the weights to lock, whatever number of zeros each
    has. Without it a matrix of zeros alone is locked in the encoder, and counts as new in a head or
    an adapter. Returns the sparsity report. Raises `ModelError` for a model without zeros, one that
    is locked or partitioned, and where zeros are in no `nn.Linear`.
    """
    if masked_layers(model):
        raise ModelError("this model is locked already; opfa.fuse(model) unlocks it")
    if names is None:
        masks = _lockable(model, zero_masks(model))
    else:
        weights, names = _matrices(model), list(names)
        unknown = [name for name in names if name not in weights]
        if unknown:
            raise ModelError(f"{unknown[0]}: this model has no linear layer with this weight")
        masks = mask_functions.nonzero_masks({name: weights[name] for name in names})
    result = mask_functions.report(masks)
    if result["total"]["sparsity"] < SPARSE_FROM:
        raise ModelError(
            f"nothing to lock: this model's linear layers have {result['total']['zeros']} zeros; "
            "a sparse checkpoint has at least 1 %. Was a dense model loaded?"
        )
    mask_layers(model, [name.rpartition(".")[0] for name in masks])
    set_masks(model, masks)
    return result


def _lockable(model: nn.Module, masks: Masks) -> Masks:
    """Without the few zeros that rounding leaves in layers of other kinds."""
    return {
        name: mask
        for name, mask in masks.items()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        or float((~mask).float().mean()) >= SPARSE_FROM
    }


@torch.no_grad()
def fuse(model: nn.Module) -> dict:
    """Turn every masked layer back into a plain `nn.Linear` whose masked weights are exactly +0.0.

    A kept weight that is zero becomes the smallest normal number of its type, so that zeros and
    mask say the same. Returns the sparsity report. Raises `ModelError` on a model without masked
    layers, and on non-finite and partitioned weights.
    """
    layers, masks = masked_layers(model), masks_of(model)
    if not layers:
        raise ModelError(
            "nothing to fuse: this model is not locked (or was fused already), so nothing held its "
            "zeros. Load the sparse model again and call opfa.lock(model) before it is trained"
        )
    for name, layer in layers.items():  # all of them, before any is changed
        if not torch.isfinite(whole_weight(name, layer)).all():
            raise ModelError(f"{name}.weight: holds a non-finite value; this model can't be saved")
        if layer.product is not None:
            layer.product.check(layer, name)
    for layer in layers.values():
        weight, mask = layer.weight, layer.mask
        if layer.is_pruned:
            weight.masked_fill_((weight == 0) & mask, torch.finfo(weight.dtype).tiny)
            weight.masked_fill_(~mask, 0.0)
        layer.unmask()
    return mask_functions.report(masks)
