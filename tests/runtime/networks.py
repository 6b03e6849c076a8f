"""Small encoders of all families with zeros, in fp32 and in 8 bits."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

from opfa.compression import quant
from opfa.sparsity.layers import mask_layers

ENTRIES = 200
SIZES: dict[str, Any] = {"vocab_size": ENTRIES, "hidden_size": 96, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {  # Any: their configurations share no fields
    "bert": BertConfig(**SIZES, num_hidden_layers=2, intermediate_size=200, hidden_act="gelu_new"),
    "roberta": RobertaConfig(
        **{**SIZES, "num_attention_heads": 6},
        num_hidden_layers=2,
        intermediate_size=256,
        hidden_act="relu",
    ),
    "distilbert": DistilBertConfig(
        vocab_size=ENTRIES, dim=72, n_layers=2, n_heads=3, hidden_dim=130
    ),
    "modernbert": ModernBertConfig(
        **SIZES,
        num_hidden_layers=4,
        intermediate_size=160,
        local_attention=20,
        layer_types=["full_attention", *["sliding_attention"] * 2, "full_attention"],
        max_position_embeddings=600,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
LENGTHS = ([1], [16], [5, 33, 64], [200, 1, 70, 130])


def sparse(cls: Any, config: Any, sparsity: float = 0.9) -> PreTrainedModel:
    """A model with weights of some size, whose encoder has zeros."""
    torch.manual_seed(0)
    model = cls.from_config(copy.deepcopy(config)).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data = torch.randn_like(weight) * 0.1 * (torch.rand_like(weight) >= sparsity)
        elif weight.ndim == 1:
            weight.data += torch.randn_like(weight) * 0.1
    return model


def in_8_bits(
    model: PreTrainedModel, *, only: str = "", embeddings: bool = False
) -> PreTrainedModel:
    """A model whose linear layers, or those whose names have `only`, compute in 8 bits, with ranges
    that it saw; embeddings too if asked.
    """
    layers = model.base_model.named_modules()
    mask_layers(model.base_model, {n for n, m in layers if isinstance(m, nn.Linear) and only in n})
    quant.prepare(model, momentum=0.5, embeddings=embeddings)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model(input_ids=torch.randint(5, ENTRIES, (4, 30)))
    quant.start(model)
    quant.freeze(model)
    return model.eval()


def batch(lengths: list[int], padding: int) -> dict[str, Tensor]:
    """Random tokens, padded to the right."""
    is_real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, ENTRIES, is_real.shape)
    return {"input_ids": ids.where(is_real, padding), "attention_mask": is_real.long()}
