"""8-bit quantization-aware training on masked layers (Q8BERT, Zafrir et al., 2019).

    weights, symmetric:             q = clamp(round(w / s), -127, 127), s = max|w| / 127
    activations, affine per tensor: q = clamp(round(x / s) + z, 0, 255)

The max|w| is by output channel or tensor; an embedding's is always by tensor. Forward passes
compute with rounded values, gradients pass straight through, and zero maps to zero. Ranges of
activations are moving averages over batches.
"""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opfa.errors import ModelError, opening
from opfa.sparsity.layers import MaskedLinear, mask_layers, masked_layers
from opfa.storage.foreign import check_weights

FILE = "quantization.safetensors"
LEVELS = 255  # steps of an 8-bit activation
LIMIT = 127  # largest magnitude of an 8-bit weight
TINY = torch.finfo(torch.float32).tiny
Scheme = Literal["channel", "tensor"]


class QuantLinear(MaskedLinear):
    """A masked layer that computes in 8 bits once `is_quantizing`; before, it only observes."""

    low: Tensor
    high: Tensor
    momentum: float
    percentile: float | None
    scheme: Scheme
    is_observing: bool
    is_quantizing: bool

    def effective_weight(self) -> Tensor:
        """The masked weight, rounded to 8 bits when quantizing."""
        weight = super().effective_weight()
        if not self.is_quantizing:
            return weight
        return rounded(weight, weight_scale(weight.detach(), self.scheme))

    def effective_values(self, values: Tensor, rows: Callable[[], Tensor]) -> Tensor:
        """The same rounding of live weights [live]; no scale depends on zeros."""
        if not self.is_quantizing:
            return values
        return rounded_live(values, rows(), self.out_features, self.scheme)

    def forward(self, input: Tensor) -> Tensor:
        """Observe the input's range in training; round input and weight when quantizing."""
        if self.training and self.is_observing:
            self._observe(input.detach())
        if self.is_quantizing:
            scale, zero_point = activation_scale(self.low, self.high)
            input = torch.fake_quantize_per_tensor_affine(input, scale, zero_point, 0, LEVELS)
        return self.multiply(input)

    @torch.no_grad()
    def _observe(self, input: Tensor) -> None:
        low, high = extremes(input, self.percentile)
        is_first = self.low == self.high
        self.low.copy_(torch.where(is_first, low, self.low.lerp(low, self.momentum)))
        self.high.copy_(torch.where(is_first, high, self.high.lerp(high, self.momentum)))

    def unmask(self) -> None:
        """Become a plain `nn.Linear`, in place."""
        del self.low, self.high, self.momentum, self.percentile, self.scheme
        del self.is_observing, self.is_quantizing
        super().unmask()


class QuantEmbedding(nn.Embedding):
    """An embedding whose vectors are rounded to 8 bits once `is_quantizing`."""

    is_quantizing = False

    def forward(self, input: Tensor) -> Tensor:
        """Look vectors up, then round them by the scale of the whole table: the same, for less."""
        vectors = super().forward(input)
        if not self.is_quantizing:
            return vectors
        return rounded(vectors, weight_scale(self.weight.detach(), "tensor"))


def weight_scale(weight: Tensor, scheme: Scheme = "channel") -> Tensor:
    """The scales of a weight [out, in]: one for each output channel, [out], or one for all, []."""
    largest = weight.abs().amax(dim=1) if scheme == "channel" else weight.abs().amax()
    return _scale_of(largest)


def _scale_of(largest: Tensor) -> Tensor:
    return (largest.float() / LIMIT).clamp(min=TINY)  # 1 / scale must be finite


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """Values that 8 bits can hold; gradients pass straight through."""
    zero_points = torch.zeros_like(scale, dtype=torch.int32)
    if scale.ndim:
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -LIMIT, LIMIT)
    return torch.fake_quantize_per_tensor_affine(weight, scale, zero_points, -LIMIT, LIMIT)


def rounded_live(values: Tensor, rows: Tensor, num_rows: int, scheme: Scheme) -> Tensor:
    """`rounded` of a matrix' live weights [live] in rows [live]: the same numbers, bit for bit."""
    sizes = values.detach().abs()
    if scheme == "channel":
        zeros = torch.zeros(num_rows, dtype=values.dtype)
        scale = _scale_of(zeros.scatter_reduce_(0, rows, sizes, "amax"))[rows]
    else:
        scale = _scale_of(sizes.amax() if len(sizes) else sizes.new_zeros(()))
    steps = (values.detach() * (1 / scale)).round().clamp(-LIMIT, LIMIT)
    return values + (steps * scale - values).detach()


def extremes(input: Tensor, percentile: float | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum, or by percentile (99.9: the 0.1th and the 99.9th); zero is between."""
    if percentile is None:
        low, high = input.amin(), input.amax()
    else:
        values, k = input.flatten(), 1 + int(input.numel() * (1 - percentile / 100))
        low, high = (values.topk(k, largest=is_high).values[-1] for is_high in (False, True))
    return low.float().clamp(max=0), high.float().clamp(min=0)


def activation_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (int32) of a range that includes zero."""
    scale = ((high - low) / LEVELS).clamp(min=TINY)
    return scale, (-low / scale).round().clamp(0, LEVELS).to(torch.int32)


def prepare(
    model: nn.Module,
    momentum: float,
    *,
    weights: Scheme = "channel",
    percentile: float | None = None,
    embeddings: bool = False,
) -> dict[str, QuantLinear]:
    """Make masked layers `QuantLinear` that observe, and with `embeddings` embeddings too. One
    without any weight stays as it is.
    """
    for layer in masked_layers(model).values():
        if not layer.weight.numel():
            continue
        layer.__class__ = QuantLinear
        assert isinstance(layer, QuantLinear)
        layer.momentum, layer.percentile, layer.scheme = momentum, percentile, weights
        layer.is_observing, layer.is_quantizing = True, False
        for name in ("low", "high"):
            zero = torch.zeros((), device=layer.weight.device)
            layer.register_buffer(name, zero, persistent=False)
    layers = quant_layers(model)
    if not layers:
        raise ModelError("no layer to quantize: mask or lock the model's layers first")
    for module in model.modules():
        if embeddings and type(module) is nn.Embedding:
            module.__class__ = QuantEmbedding
    return layers


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def quant_embeddings(model: nn.Module) -> dict[str, QuantEmbedding]:
    """The quantized embeddings of a model by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantEmbedding)}


def start(model: nn.Module) -> None:
    """From now on compute with 8 bits."""
    for module in (*quant_layers(model).values(), *quant_embeddings(model).values()):
        module.is_quantizing = True


def freeze(model: nn.Module) -> None:
    """From now on ranges stay as they are."""
    for layer in quant_layers(model).values():
        layer.is_observing = False


@torch.no_grad()
def int8_weight(layer: QuantLinear | QuantEmbedding) -> tuple[Tensor, Tensor]:
    """The weight as int8 with its scales; masked weights are 0."""
    if isinstance(layer, QuantLinear):
        return to_int8(layer.weight * layer.mask, layer.scheme)
    return to_int8(layer.weight, "tensor")


def to_int8(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8 with its scales."""
    scale = weight_scale(weight, scheme)
    # By `rounded`, as the layer computes: torch multiplies by 1 / scale where others divide.
    steps = rounded(weight, scale) / (scale[:, None] if scale.ndim else scale)
    return steps.round().to(torch.int8), scale


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """The observed ranges of all quantized layers."""
    layers = quant_layers(model).items()
    ends = [(f"{name}.input_", m, end) for name, m in layers for end in ("low", "high")]
    return {prefix + end: getattr(m, end).clone() for prefix, m, end in ends}


def set_ranges(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Put back what `ranges` gave."""
    for name, layer in quant_layers(model).items():
        layer.low.copy_(values[f"{name}.input_low"])
        layer.high.copy_(values[f"{name}.input_high"])


def save(model: nn.Module, path: Path, only: Container[str] | None = None) -> None:
    """Write ranges and weight scales, of some layers or of all. Call it before they are fused."""
    layers = {**quant_layers(model), **quant_embeddings(model)}
    scales = {f"{name}.weight_scale": int8_weight(m)[1] for name, m in layers.items()}
    found = {**ranges(model), **scales}
    if only is not None:
        found = {name: value for name, value in found.items() if name.rpartition(".")[0] in only}
    save_file(found, path, metadata={"format": "opfa-quantization/1"})


def load(model: nn.Module, path: Path) -> None:
    """Make a plain model compute as it did when its ranges were saved."""
    check_weights(path)
    with opening(path, ModelError, "doesn't fit the model"):
        values = load_file(path)
        names = {name.rpartition(".")[0] for name in values}
        if missing := names - {name for name, _ in model.named_modules()}:
            raise ModelError(f"{path}: the model has no layer {min(missing)}")
        linear = {name for name in names if f"{name}.input_low" in values}
        mask_layers(model, linear)  # its zeros are in its weights
        for name in sorted(linear):
            low, high = values[f"{name}.input_low"], values[f"{name}.input_high"]
            if not bool(((low <= 0) & (high >= 0) & (high - low).isfinite()).all()):
                raise ModelError(f"{path}: {name}: its inputs have no range with zero in it")
        for name, layer in prepare(model, momentum=0.0, embeddings=names > linear).items():
            layer.scheme = "channel" if values[f"{name}.weight_scale"].ndim else "tensor"
        set_ranges(model, values)
    start(model)
    freeze(model)
