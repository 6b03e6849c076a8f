"""Compact files in `from_pretrained`, by transformers' own registration of quantizers.

`config.json` of a compact release says `quant_method: "opfa"`. What is loaded is a plain model: its
matrices are unpacked, the entry is gone from its configuration, and it trains and saves as any
other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from opfa.weights.compact import FILE, METHOD, VERSION, CompactFile
from opfa.weights.packing import PARTS, unpack

if TYPE_CHECKING:  # importing models would come back here before this file is whole
    from transformers import PreTrainedConfig, PreTrainedModel


class Unpack(ConversionOps):
    """The parts of one matrix -> the matrix."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        """Transformers' protocol: with a quantizer, parts are loaded without changing types."""
        self.hf_quantizer = hf_quantizer

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride] - as transformers' own ones
        self,
        input_dict: dict[str, list[Tensor]],
        *,
        model: nn.Module,
        full_layer_name: str,
        **_: Any,  # what else transformers gives
    ) -> dict[str, Tensor]:
        """Unpack in the type and on the device that the parameter will have."""
        parts = {name.rpartition(".")[2].removesuffix("$"): t[0] for name, t in input_dict.items()}
        parameter = model.get_parameter(full_layer_name)
        weight = unpack({name: part.cpu() for name, part in parts.items()})
        return {full_layer_name: weight.to(parts["form"].device, parameter.dtype)}


class CompactQuantizer(HfQuantizer):
    """Reads the compact file in place of the usual one."""

    serialized_names = {"weight": [rf"weight\.{part}$" for part in PARTS]}

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """The hook before files are looked for: say which file it is."""
        config.transformers_weights = FILE
        return config

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Plain matrices are what is wanted."""
        return {"dequantize": Unpack}

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", *, checkpoint_files: Sequence[str] = (), **_: Any
    ) -> "PreTrainedModel":
        CompactFile(Path(checkpoint_files[0]))  # verified before anything is loaded
        return model

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **_: Any
    ) -> "PreTrainedModel":
        conversions: Any = model._weight_conversions  # a list that transformers sets, or None
        kept = [conversion for conversion in conversions or () if not _is_ours(conversion)]
        # else saving would look for ours in reverse
        model._weight_conversions = kept or None  # pyright: ignore[reportArgumentType]
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A loaded model is plain."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A loaded model is plain."""
        return True


class CompactConfig(QuantizationConfigMixin):
    """What `config.json` says of a compact file."""

    def __init__(self, version: str = VERSION, **_: Any) -> None:
        """Keep the version; the method is ours."""
        self.quant_method: Any = METHOD  # transformers' type lists its own methods only
        self.version = version
        self.dequantize = True  # else the model would count as quantized, and not be trainable


def _is_ours(conversion: WeightTransform) -> bool:
    is_converter = isinstance(conversion, WeightConverter)
    return is_converter and any(isinstance(op, Unpack) for op in conversion.operations)


def register() -> None:
    """Tell transformers."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(CompactConfig)
    register_quantizer(METHOD)(CompactQuantizer)
