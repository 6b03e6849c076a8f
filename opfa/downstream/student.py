"""The model that is fine-tuned, made ready: its zeros are held, its layers observe for 8 bits."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.downstream.recipe import Quantization
from opfa.errors import ModelError
from opfa.sparsity.anatomy import layer_of, part_of
from opfa.sparsity.chosen import KEY, Chosen
from opfa.sparsity.layers import lock, mask_layers, masked_layers
from opfa.training.loop import Concern, Progress
from opfa.weights.inspection import inspect, stated_report
from opfa.weights.sources import directory_of

RANGES = "ranges.safetensors"  # in a resume point

log = logging.getLogger(__name__)


def prepare_8_bits(model: nn.Module, settings: Quantization) -> dict[str, quant.QuantLinear]:
    """Make all linear layers of the encoder observe, sparse or dense, and what else is masked."""
    masked = masked_layers(model)
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name not in masked
        and module.weight.numel()  # a layer may have lost all of its heads or neurons
        and part_of(f"{name}.weight", module.weight.shape) == "encoder"
    ]
    mask_layers(model, dense, is_pruned=False)
    return quant.prepare(
        model,
        settings.momentum,
        weights=settings.weights,
        percentile=settings.percentile,
        embeddings=settings.embeddings,
    )


class Quantizing(Concern):
    """Computes in 8 bits from `first_step` on; ranges move until `freeze_step`."""

    def __init__(self, settings: Quantization, model: nn.Module, steps: int) -> None:
        """`steps` is the length of the run; `prepare_8_bits` has made its layers."""
        self._model = model
        self.first_step = max(1, int(settings.start * steps))
        self.freeze_step = max(1, int(settings.freeze * steps))

    def before_step(self, at: Progress) -> None:
        """Start or freeze when it is time."""
        if at.step >= self.first_step:
            quant.start(self._model)
        if at.step >= self.freeze_step:
            quant.freeze(self._model)

    def save(self, at: Progress, directory: Path) -> None:
        """Write the ranges."""
        save_file(quant.ranges(self._model), directory / RANGES)

    def load(self, at: Progress, directory: Path) -> None:
        """Read the ranges, and compute as then."""
        quant.set_ranges(self._model, load_file(directory / RANGES))
        self.before_step(at)


def hold_zeros(model: PreTrainedModel, init: str) -> list[Chosen]:
    """Lock a model's zeros: exactly those that its sparsity.json names, if it has one; returns what
    that says of how they were chosen.

    Of layers outside the encoder, such as the pooler, the task's model may lack some.
    """
    directory = directory_of(init)
    stated = stated_report(directory)
    if stated is None or not stated["tensors"]:
        inspect(directory)  # refuses masks that lie beside their weights
        total = _lock(model, init, None)["total"]
        log.info("locked %d zeros, sparsity %.4f", total["zeros"], total["sparsity"])
        return []
    names = _names_in(model, stated["tensors"])
    lost = [name for name in stated["tensors"] if name not in names]
    if layers := [name for name in lost if layer_of(name)]:
        what = f"its sparsity.json names {layers[0]}, and the model has no such layer"
        raise ModelError(f"{init}: {what}")
    if lost:
        kind = type(model).__name__
        log.warning("%s: left out, since %s has no such layer: %s", init, kind, ", ".join(lost))
    found = _lock(model, init, list(names.values()))
    is_same = list(found["tensors"].values()) == [stated["tensors"][name] for name in names]
    if not lost:
        is_same &= all(found[key] == stated[key] for key in ("total", "fingerprint"))
    if not is_same:
        what = "its zeros are not where its sparsity.json says; was it changed afterwards?"
        raise ModelError(f"{init}: {what}")
    return stated.get(KEY, [])


def _names_in(model: PreTrainedModel, stated: Mapping[str, Any]) -> dict[str, str]:
    """What stated tensors are called in the model, where linear layers have their shape."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    shapes = {f"{name}.weight": list(layer.weight.shape) for name, layer in linear.items()}
    prefix = f"{model.base_model_prefix}."  # a bare encoder's tensors have no such beginning
    return {
        name: place
        for name, tensor in stated.items()
        for place in (name, prefix + name.removeprefix(prefix), name.removeprefix(prefix))
        if shapes.get(place) == tensor["shape"]
    }


def _lock(model: PreTrainedModel, init: str, names: list[str] | None) -> dict[str, Any]:
    try:
        return lock(model, names)
    except ModelError as error:  # there is nothing to lock
        raise ModelError(
            f"model.init = {init!r}: {error} For a dense one: model.zeros=free"
        ) from None
