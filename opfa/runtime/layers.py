"""Linear layers as the kernels take them, and where they come from: here a model's modules.

Layers with the same input become one matrix. In int8 each is what it was trained to compute:
W x = s_w s_x (Q_w q_x - z Q_w 1), so the zero of the input goes into the bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.runtime.packing import Floats, Packed, pack
from opfa.runtime.program import Form


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Layers with the same input as one matrix."""

    matrix: Packed
    bias: Floats  # [rows]
    scales: Floats | None  # [rows], those of int8 weights times that of the input
    form: Form | None  # of the input; None for fp32


class Layers(Protocol):
    """The linear layers of an encoder, by their paths."""

    def form(self, path: str) -> Form | None:
        """The form of a layer's input; None for fp32."""
        ...

    def linear(self, paths: Sequence[str]) -> Linear:
        """Layers whose inputs have the same form, one below the other."""
        ...


class ModelLayers:
    """Those of an encoder that has its weights, in "fp32", "bf16" or "int8".

    In int8 the layers that are `QuantLinear` compute in 8 bits, the others in fp32.
    """

    def __init__(self, encoder: PreTrainedModel, dtype: str) -> None:
        """Nothing is packed yet."""
        self.encoder, self.dtype = encoder, dtype

    def form(self, path: str) -> Form | None:
        """The form of a layer's input."""
        layer: Any = self.encoder.get_submodule(path)
        if self.dtype == "fp32" or not layer.in_features:
            return None
        if self.dtype == "bf16":
            return Form(self.dtype)
        if not isinstance(layer, quant.QuantLinear):
            return None
        scale, zero = quant.activation_scale(layer.low, layer.high)
        return Form("int8", float(scale), int(zero))

    def linear(self, paths: Sequence[str]) -> Linear:
        """Pack layers."""
        form = self.form(paths[0])
        parts = [_weights(self.encoder.get_submodule(path), form) for path in paths]
        weights, scales, biases = zip(*parts, strict=True)
        is_int8 = form is not None and form.dtype == "int8"
        return Linear(
            matrix=pack(np.concatenate(weights)),
            bias=np.concatenate(biases),
            scales=np.concatenate(scales) if is_int8 else None,
            form=form,
        )


def _weights(layer: Any, form: Form | None) -> tuple[NDArray, NDArray, Floats]:
    """A layer's weights as they are stored, scales of its rows, and bias."""
    bias = np.zeros(layer.out_features, np.float32) if layer.bias is None else array_of(layer.bias)
    if not layer.in_features:  # it lost its heads or neurons; the kernels want a column
        return np.zeros((layer.out_features, 1), np.float32), np.ones(0, np.float32), bias
    if form is None:
        return array_of(layer.weight), np.ones(0, np.float32), bias
    if form.dtype == "bf16":
        values = layer.weight.detach().bfloat16().contiguous() + 0.0  # -0.0 becomes 0.0, no bits
        return values.view(torch.uint16).numpy(), np.ones(0, np.float32), bias
    steps, scale = quant.int8_weight(layer)
    steps, scale = steps.numpy(), scale.double().numpy() * form.scale
    scales = np.broadcast_to(scale, len(steps))
    offset = scales * form.zero * steps.sum(1, dtype=np.int64)
    return steps, scales.astype(np.float32), (bias - offset).astype(np.float32)


def array_of(parameter: Tensor | None) -> Any:  # Any: None for None
    """A parameter as fp32 numbers, which share its memory if it is fp32."""
    return None if parameter is None else parameter.detach().float().contiguous().numpy()


def table_of(embedding: nn.Embedding) -> Floats:
    """The vectors [entries, channels] that an embedding gives; in 8 bits they are rounded."""
    weight = embedding.weight.detach()
    if isinstance(embedding, quant.QuantEmbedding) and embedding.is_quantizing:
        weight = quant.rounded(weight, quant.weight_scale(weight, "tensor"))
    return array_of(weight)
