"""LoRA (Hu et al., 2021) on a locked model: a merge keeps the zeros and changes no answer.

PEFT adds a dense B A to a weight. Here the update is masked, in training and in the merge alike:

    y = (W * mask) x + scale * ((B A) * mask) dropout(x)

    opfa.lock(model)
    model = get_peft_model(model, masked_lora(LoraConfig(target_modules=["query", "value"])))
    ...                              # any training
    opfa.fuse(model.merge_and_unload())
"""

from typing import Any

from torch import Tensor
from torch.nn import functional

from opfa.errors import ModelError
from opfa.extras import importing
from opfa.sparsity.layers import MaskedLinear

with importing("opfa.masked_lora", "peft"):
    from peft import LoraConfig
    from peft.tuners.lora import Linear


class MaskedLora(Linear):
    """PEFT's LoRA layer over a `MaskedLinear`, with the update masked."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The masked update, [out, in], which PEFT also adds when it merges."""
        layer = self.get_base_layer()
        assert isinstance(layer, MaskedLinear)
        return super().get_delta_weight(adapter) * layer.mask

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Apply the layer and its active adapters."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        if options.get("adapter_names") is not None:
            raise ModelError("adapter_names: batches that mix adapters can't be masked")
        for name in self.active_adapters:
            if name in self.lora_variant:
                raise ModelError(f"adapter {name!r}: is a variant of LoRA that can't be masked")
        result = self.base_layer(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                update = self.get_delta_weight(name).to(x.dtype)
                result = result + functional.linear(self.lora_dropout[name](x), update)
        return result


def masked_lora(config: LoraConfig) -> LoraConfig:
    """The same configuration, for a locked model: its masked layers get masked updates.

    Use it again when an adapter is loaded: `PeftModel.from_pretrained(locked, directory,
    config=masked_lora(LoraConfig.from_pretrained(directory)))`.
    """
    for key in ("use_dora", "lora_bias"):
        if getattr(config, key):
            raise ModelError(f"{key} = True: not with masked updates; leave it off")
    config._register_custom_module({MaskedLinear: MaskedLora})
    return config
