"""A tiny random encoder of each family, with live biases."""

from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)
from words import WORDS

SIZES: dict[str, Any] = {"vocab_size": len(WORDS) + 10, "hidden_size": 24}
LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4}
PLACES: dict[str, Any] = {"max_position_embeddings": 40}
IDS: dict[str, Any] = {
    f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))
}
CONFIGS: dict[str, Any] = {  # their configurations share no fields
    "bert": BertConfig(**SIZES, **LAYERS, **PLACES, intermediate_size=20),
    "roberta": RobertaConfig(**SIZES, **LAYERS, **PLACES, intermediate_size=20, hidden_act="relu"),
    "distilbert": DistilBertConfig(
        vocab_size=SIZES["vocab_size"], dim=24, n_layers=3, n_heads=4, hidden_dim=20, **PLACES
    ),
    "modernbert": ModernBertConfig(
        **SIZES, **LAYERS, **PLACES, **IDS, intermediate_size=20, local_attention=8
    ),
    "modernbert, biases": ModernBertConfig(
        **SIZES, **LAYERS, **PLACES, **IDS, intermediate_size=20, attention_bias=True, mlp_bias=True
    ),
}


def model_of(family: str, cls: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    """Random weights, live biases too."""
    torch.manual_seed(0)
    model = cls.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model
