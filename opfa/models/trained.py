"""A model as it was trained: with its head, and in 8 bits where it learnt to compute so.

`from_pretrained` reads the weights of an 8-bit model and computes with them in fp32, because plain
transformers doesn't know its ranges. Here its layers round as they did in training.
"""

import logging
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from opfa.compression import quant
from opfa.errors import ModelError
from opfa.models.configs import load_config
from opfa.models.encoders import ENCODER, FEW_TOKENS, HEADS, load_weights, of_encoder
from opfa.models.sentences import is_sentence_encoder
from opfa.models.skeleton import try_out
from opfa.weights.sources import directory_of

BEFORE_TASKS: dict[str, Any] = {  # Any: Auto classes share no base
    "PreTraining": transformers.AutoModelForPreTraining,
    "MaskedLM": transformers.AutoModelForMaskedLM,
}
log = logging.getLogger(__name__)


def load(model: str | Path, *, exact: bool = True) -> PreTrainedModel:
    """A model that computes as it was trained, in evaluation mode, fp32, on the CPU.

    `model` is a run, a directory in any form that opfa writes (plain, compact, with ranges of 8
    bits), or a Hub name. It has the head that it was saved with: of a task, of pre-training, or
    none. A sentence encoder is the encoder: it gives hidden states, and `opfa.predict` its vectors.
    A model in 8 bits rounds weights and inputs of its layers to 8 bits, in fp32 arithmetic, as in
    its training; with `exact=False` it computes in fp32, as after `from_pretrained`.
    Raises `ModelError`. No code that comes with a model is run.
    """
    name = str(model)
    config = load_config(name)
    head, cls = ("", ENCODER) if is_sentence_encoder(name, config) else class_of(config)
    found, missing = load_weights(cls, name, config)
    if lost := missing if head else of_encoder(found, missing):
        raise ModelError(f"model {name!r}: {lost[0]} is missing")
    if missing:
        log.warning("%s: %s is not in its files, and was made anew", name, missing[0])
    try_out(found, name, (1, 2, FEW_TOKENS) if head == "MultipleChoice" else (1, FEW_TOKENS))
    if exact:
        as_trained(found, name)
    return found.eval()


def ranges_of(name: str) -> Path | None:
    """The file of ranges that a model in 8 bits has beside it; None for any other model."""
    path = directory_of(name) / quant.FILE
    return path if path.is_file() else None


def as_trained(model: nn.Module, name: str) -> None:
    """Make the loaded model `name` round as in its training, if it is in 8 bits."""
    if (ranges := ranges_of(name)) is not None:
        quant.load(model, ranges)


def class_of(config: PretrainedConfig) -> tuple[str, Any]:
    """The head that a checkpoint was saved with, and one of transformers' Auto classes for it."""
    (made_for, *_) = config.architectures or ("",)
    for head, cls in {**HEADS, **BEFORE_TASKS}.items():
        if made_for.endswith(f"For{head}"):
            return head, cls
    return "", ENCODER
