"""An encoder without some of its layers."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from opfa.models.removal import family_of, layers_of


def first_stays(model: PreTrainedModel) -> bool:
    """Whether the first layer differs from the others: ModernBERT's has no norm before it."""
    names = [{name for name, _ in layer.named_parameters()} for layer, _ in layers_of(model)]
    return any(names[0] != others for others in names[1:])


def drop_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep the layers whose numbers are given, in this order; the configuration says so too."""
    config: Any = model.config  # of a family
    stack = cast(nn.ModuleList, model.base_model.get_submodule(family_of(model).stack))
    own = {int(key): each for key, each in (config.to_dict().get("per_layer_config") or {}).items()}
    types = getattr(config, "layer_types", None)
    config.per_layer_config = None
    for number, layer in enumerate([stack[old] for old in kept]):
        stack[number] = layer
    del stack[len(kept) :]
    config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = [types[old] for old in kept]
    if moved := {new: own[old] for new, old in enumerate(kept) if old in own}:
        config.per_layer_config = moved
