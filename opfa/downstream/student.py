"""The model that is fine-tuned, made ready: its zeros are held, its layers observe for 8 bits."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from opfa import quant
from opfa.downstream.recipe import Quantization
from opfa.inspection import directory_of, stated_report
from opfa.recipe import ModelError
from opfa.sparsity.layers import lock, mask_layers, masks_of
from opfa.sparsity.masks import fingerprint
from opfa.sparsity.pattern import Pattern

log = logging.getLogger(__name__)


def prepare_8_bits(model: nn.Module, settings: Quantization) -> dict[str, quant.QuantLinear]:
    """Make the masked layers, or those of a dense model that would be pruned, observe."""
    if not masks_of(model):
        mask_layers(model, Pattern().layers(model))
    return quant.prepare(
        model,
        settings.momentum,
        weights=settings.weights,
        percentile=settings.percentile,
        embeddings=settings.embeddings,
    )


def hold_zeros(model: PreTrainedModel, init: str) -> None:
    """Lock a model's zeros: those that its sparsity.json names, if it has one, and then exactly
    those.
    """
    stated = stated_report(directory_of(init))
    if stated is None or not stated["tensors"]:
        report = _lock(model, init, None)
        log.info(
            "locked %d zeros, sparsity %.4f", report["total"]["zeros"], report["total"]["sparsity"]
        )
        return
    prefix = f"{model.base_model_prefix}."  # a bare encoder's tensors are named without it
    names = [prefix + name.removeprefix(prefix) for name in stated["tensors"]]
    found = _lock(model, init, names)
    counts = [(report["total"], list(report["tensors"].values())) for report in (found, stated)]
    if counts[0] != counts[1] or fingerprint(masks_of(model)) != stated["fingerprint"]:
        raise ModelError(
            f"{init}: its zeros are not where its sparsity.json says; "
            "was it changed after it was written?"
        )


def _lock(model: PreTrainedModel, init: str, names: list[str] | None) -> dict[str, Any]:
    try:
        return lock(model, names)
    except ModelError as error:
        raise ModelError(
            f"model.init = {init!r}: {error} For a dense one: model.zeros=free"
        ) from None
