"""8-bit quantization-aware training on masked layers (Zafrir et al., 2019, Q8BERT; Jacob et al.,
2018).

    weights, symmetric per output channel:  q = clamp(round(w / s), -127, 127), s = max|w| / 127
    activations, affine per tensor:         q = clamp(round(x / s) + z, 0, 255)

Forward passes compute with the rounded values, gradients pass straight through. Zero maps to zero:
symmetric weights have no offset, and an activation's range always includes it. The ranges of
activations are moving averages of the minima and maxima seen in training. Saved beside a model are
its ranges and scales; its weights stay in fp32, so the masks stay what they are.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from opfa.recipe import ModelError
from opfa.sparsity.layers import MaskedLinear, mask_layers, masked_layers

FILE = "quantization.safetensors"
LEVELS = 255  # steps of an 8-bit activation
LIMIT = 127  # largest magnitude of an 8-bit weight
TINY = torch.finfo(torch.float32).tiny


class QuantLinear(MaskedLinear):
    """A masked layer that computes with 8-bit weights and inputs once `is_quantizing`; before, it
    only observes.
    """

    low: Tensor
    high: Tensor
    momentum: float
    is_quantizing: bool

    def effective_weight(self) -> Tensor:
        """The masked weight, rounded to 8 bits when quantizing."""
        weight = super().effective_weight()
        if not self.is_quantizing:
            return weight
        zero_points = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        scale = weight_scale(weight.detach())
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -LIMIT, LIMIT)

    def forward(self, input: Tensor) -> Tensor:
        """Observe the input's range in training; round input and weight when quantizing."""
        if self.training:
            self._observe(input.detach())
        if self.is_quantizing:
            scale, zero_point = activation_scale(self.low, self.high)
            input = torch.fake_quantize_per_tensor_affine(input, scale, zero_point, 0, LEVELS)
        return functional.linear(input, self.effective_weight(), self.bias)

    @torch.no_grad()
    def _observe(self, input: Tensor) -> None:
        low, high = input.amin().float().clamp(max=0), input.amax().float().clamp(min=0)
        is_first = self.low == self.high
        self.low.copy_(torch.where(is_first, low, self.low.lerp(low, self.momentum)))
        self.high.copy_(torch.where(is_first, high, self.high.lerp(high, self.momentum)))

    def unmask(self) -> None:
        """Become a plain `nn.Linear`, in place."""
        del self.low, self.high, self.momentum, self.is_quantizing
        super().unmask()


def weight_scale(weight: Tensor) -> Tensor:
    """The scale of each output channel of a weight [out, in]; [out]."""
    return (weight.abs().amax(dim=1).float() / LIMIT).clamp(min=TINY)  # 1 / scale must be finite


def activation_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (int32) of a range that includes zero."""
    scale = ((high - low) / LEVELS).clamp(min=TINY)
    return scale, (-low / scale).round().clamp(0, LEVELS).to(torch.int32)


def prepare(model: nn.Module, momentum: float) -> dict[str, QuantLinear]:
    """Make every masked layer a `QuantLinear` that observes.

    Raises `ModelError` when none is masked.
    """
    for layer in masked_layers(model).values():
        layer.__class__ = QuantLinear
        assert isinstance(layer, QuantLinear)
        layer.momentum, layer.is_quantizing = momentum, False
        for name in ("low", "high"):
            layer.register_buffer(
                name, torch.zeros((), device=layer.weight.device), persistent=False
            )
    layers = quant_layers(model)
    if not layers:
        raise ModelError("no layer to quantize: mask or lock the model's layers first")
    return layers


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def start(layers: Iterable[QuantLinear]) -> None:
    """From now on compute with 8 bits."""
    for layer in layers:
        layer.is_quantizing = True


def int8_weight(layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """The weight as int8 [out, in] with its scales [out]; masked weights are 0."""
    weight = (layer.weight * layer.mask).detach()
    scale = weight_scale(weight)
    return (weight / scale[:, None]).round().clamp(-LIMIT, LIMIT).to(torch.int8), scale


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """The observed ranges of all quantized layers."""
    layers = quant_layers(model).items()
    return {
        f"{name}.input_{end}": getattr(m, end).clone()
        for name, m in layers
        for end in ("low", "high")
    }


def set_ranges(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Put back what `ranges` gave."""
    for name, layer in quant_layers(model).items():
        layer.low.copy_(values[f"{name}.input_low"])
        layer.high.copy_(values[f"{name}.input_high"])


def save(model: nn.Module, path: Path) -> None:
    """Write ranges and weight scales. Call it before the layers are fused."""
    scales = {f"{name}.weight_scale": int8_weight(m)[1] for name, m in quant_layers(model).items()}
    save_file({**ranges(model), **scales}, path, metadata={"format": "opfa-quantization/1"})


def load(model: nn.Module, path: Path) -> None:
    """Make a plain model compute as it did at the end of its quantization-aware training.

    Raises `ModelError` when file and model don't fit.
    """
    values = load_file(path)
    names = {name.rpartition(".")[0] for name in values}
    missing = names - {name for name, _ in model.named_modules()}
    if missing:
        raise ModelError(f"{path}: the model has no layer {min(missing)}")
    mask_layers(model, names)  # its zeros are in its weights
    layers = prepare(model, momentum=0.0)
    set_ranges(model, values)
    start(layers.values())
