"""Pre-training models in parts, so that the vocabulary projection can run in chunks: backbone, the
head's transform, projection. `FAMILIES` says where they are; a new family is one more row.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertForPreTraining,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opfa.errors import ModelError, RunError, opening
from opfa.models.configs import load_config, loading, new_config
from opfa.models.encoders import FEW_TOKENS, load_weights, of_encoder, skeleton
from opfa.models.skeleton import SPECIAL, try_out


class Family(NamedTuple):
    """Where a family's masked-language head is, and what its configuration calls dropout."""

    transform: Callable[[Any, Tensor], Tensor]  # Any: the family's own model class
    dropouts: tuple[str, ...]


BERTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
FAMILIES = {
    "bert": Family(lambda m, h: m.cls.predictions.transform(h), BERTS),
    "distilbert": Family(
        lambda m, h: m.vocab_layer_norm(m.activation(m.vocab_transform(h))),
        ("dropout", "attention_dropout"),
    ),
    "roberta": Family(
        lambda m, h: m.lm_head.layer_norm(nn.functional.gelu(m.lm_head.dense(h))), BERTS
    ),
    "modernbert": Family(
        lambda m, h: m.head(h), ("embedding_dropout", "attention_dropout", "mlp_dropout")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """A forward pass before the vocabulary projection: B batch, T tokens, N of them, H hidden."""

    mlm: Tensor  # [N, H]
    nsp_logits: Tensor | None  # [B, 2]
    hidden_states: tuple[Tensor, ...]  # embeddings and every layer, [B, T, H]; empty unless asked


def load_pretraining_model(
    name: str, objective: str, dropout: float | None = None, *, needs_head: bool = False
) -> PreTrainedModel:
    """A model with its pre-training head, fp32. The checkpoint may lack the head, unless
    `needs_head`; `ModelError` if it lacks tensors of the encoder.
    """
    config = load_config(name)
    cls = _pretraining_class(config, objective)
    changed = dropouts(config, dropout)
    model, new = load_weights(cls, name, config, attn_implementation=_attention(), **changed)
    if lost := new if needs_head else of_encoder(model, new):
        raise ModelError(f"model {name!r}: {len(lost)} tensors are missing, first {lost[0]}")
    try_out(model, name, (1, FEW_TOKENS))
    keep_values(model, config, changed)
    return model


def new_pretraining_model(
    values: dict[str, Any],
    objective: str,
    tokenizer: PreTrainedTokenizerBase,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A model from scratch, by the values of its configuration; the others are the tokenizer's."""
    known, names = new_config(values).to_dict(), [f"{name}_token_id" for name in SPECIAL]
    special = {name: getattr(tokenizer, name) for name in names if name in known}
    ids = {name: value for name, value in special.items() if value is not None}
    config = new_config({"vocab_size": len(tokenizer), **ids, **values})
    cls = _pretraining_class(config, objective)
    changed = dropouts(config, dropout)
    trained = copy.deepcopy(config)
    trained.update(changed)
    with loading("model.config", config.model_type):
        model = cls.from_config(trained)
    model.set_attn_implementation(_attention())
    keep_values(model, config, changed)
    return model


def pretraining_skeleton(config: PretrainedConfig, objective: str) -> PreTrainedModel:
    """A model with its pre-training head that has shapes and no memory (on torch's meta device)."""
    return skeleton(config, _pretraining_class(config, objective))


def _pretraining_class(config: PretrainedConfig, objective: str) -> Any:  # Auto classes: no base
    _family(config)
    if objective == "mlm":
        return AutoModelForMaskedLM
    if config.model_type != "bert":
        what = f"{config.model_type} has no next-sentence head; use 'mlm'"
        raise ModelError(f"objective 'mlm+nsp': {what}")
    return AutoModelForPreTraining


def _family(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise ModelError(f"model type {config.model_type!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def _attention() -> str:
    """On a CPU, torch's fused attention takes longer than the plain products in training."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def dropouts(config: PretrainedConfig, probability: float | None) -> dict[str, float]:
    """This probability under each name that the family has for dropout; nothing if it is None."""
    return {} if probability is None else dict.fromkeys(_family(config).dropouts, probability)


def keep_values(model: PreTrainedModel, config: PretrainedConfig, changed: Iterable[str]) -> None:
    """Save the model with its original dropout. It was changed for this run only."""
    for name in changed:
        setattr(model.config, name, getattr(config, name))


def pretraining_features(
    model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor, hidden_states: bool = False
) -> Features:
    """Run the backbone, and the head's transform for the tokens at these flat positions [N]."""
    outputs = model.base_model(**inputs, output_hidden_states=hidden_states)
    last = outputs.last_hidden_state.flatten(0, 1)[rows]
    has_nsp = isinstance(model, BertForPreTraining)
    return Features(
        mlm=_family(model.config).transform(model, last),
        nsp_logits=model.cls.seq_relationship(outputs.pooler_output) if has_nsp else None,
        hidden_states=outputs.hidden_states if hidden_states else (),
    )


def projection(model: PreTrainedModel) -> nn.Linear:
    """The layer from features to vocabulary logits."""
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear), f"{type(model).__name__} has no output embeddings"
    return layer


def compile_models(*models: PreTrainedModel) -> None:
    """Run their backbones through torch.compile, in place; raises `RunError` where it can't."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with opening("launch.compile = true", RunError, "torch can't compile here"):
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    for model in models:
        model.base_model.compile(dynamic=True)  # batches differ in length


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: no decay for biases and norms, that is, for vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
