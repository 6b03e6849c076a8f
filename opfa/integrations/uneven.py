"""Encoders whose layers differ in heads or neurons, in `from_pretrained` and `from_config`.

`config.json` says the numbers by layer in transformers' own `per_layer_config`. The encoders here
don't read it yet and raise, so each class of layers gets a subclass that makes them smaller.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import Transformer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

from opfa.sparsity.units import (
    FAMILIES,
    HEADS,
    NEURONS,
    head_size,
    units_of,
    without_layers_of_their_own,
)


def _smaller(layer: nn.Module, config: Any, number: int) -> None:  # Any: of a family
    """Bring a layer to the size that a configuration says."""
    family, size = FAMILIES[config.model_type], head_size(config)
    own = config.per_layer_config[number]
    units = units_of(layer, family, size)
    for kind, key in zip((HEADS, NEURONS), family.keys, strict=True):
        wanted, most = getattr(own, key), units[kind].count
        if type(wanted) is not int or not 0 <= wanted <= most:
            allowed = f"must be an integer from 0 to {most}"
            raise ValueError(f"per_layer_config[{number}].{key} = {wanted!r}: {allowed}")
        if wanted < most:
            units[kind].keep(torch.arange(wanted))


def _share(config: Any, plain: object, module: nn.Module) -> None:
    """Give modules the model's own configuration back, in which attention may be changed later."""
    for part in module.modules():
        if getattr(part, "config", None) is plain:
            part.config = config


def _alike(base: type) -> type:
    """A metaclass by which layers of the plain class are instances too. transformers records hidden
    states by the class that is registered, of models that were made before as well.
    """

    class Alike(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, base)

    return Alike


def _stack(base: type) -> type:
    """A class that holds all layers, which don't know their numbers."""

    class Uneven(base, metaclass=_alike(base)):
        def __init__(self, config: Any, *args: Any, **options: Any) -> None:
            plain = without_layers_of_their_own(config)
            super().__init__(plain, *args, **options)
            if config.is_heterogeneous:
                for number, layer in enumerate(self.layer):
                    _smaller(layer, config, number)
                _share(config, plain, self)

    return _named_as(base, Uneven)


def _layer(base: type) -> type:
    """A class of one layer, which knows its number."""

    class Uneven(base, metaclass=_alike(base)):
        def __init__(self, config: Any, layer_idx: int | None = None) -> None:
            plain = without_layers_of_their_own(config)
            super().__init__(plain, layer_idx)
            if config.is_heterogeneous:
                _smaller(self, config, layer_idx or 0)
                _share(config, plain, self)

    return _named_as(base, Uneven)


def _named_as(base: type, found: type) -> type:
    found.__name__, found.__qualname__, found.__module__ = (
        base.__name__,
        base.__qualname__,
        base.__module__,
    )
    return found


def register() -> None:
    """Tell transformers."""
    numbered = BertLayer, RobertaLayer, ModernBertEncoderLayer
    classes = {base: _layer(base) for base in numbered} | {Transformer: _stack(Transformer)}
    known = get_patch_mapping()
    names = {f"^{base.__name__}$": found for base, found in classes.items()}  # they are patterns
    register_patch_mapping({name: found for name, found in names.items() if name not in known})
