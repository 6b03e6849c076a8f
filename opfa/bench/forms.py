"""The models of `opfa bench inference`, in every form that a contestant reads.

A form is made once and kept, so that a bench that is started again needs only to measure. Zeros of
random models are at random places. Ranges of 8 bits are those of random tokens: speed doesn't
depend on them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from opfa.bench.worker import FIRST_ID, LAST_ID
from opfa.compression import quant
from opfa.compression.pattern import Pattern
from opfa.downstream.recipe import Quantization
from opfa.downstream.student import prepare_8_bits
from opfa.models.configs import load_config, new_config
from opfa.models.encoders import HEADS, load_weights, save_model
from opfa.storage.files import new_directory, new_file

SEEN = (4, 64)  # random tokens for the ranges of 8 bits


def write_random(root: Path, config: Mapping[str, Any], sparsities: Sequence[float]) -> None:
    """Write classifiers with random weights to `root`, each in a directory named as its sparsity.

    A weight that is zero in one is zero in all with more zeros.
    """
    wanted = [each for each in sorted({*sparsities}) if not (root / f"{each:g}").exists()]
    if not wanted:
        return
    torch.manual_seed(0)
    model = HEADS["SequenceClassification"].from_config(new_config(dict(config)))
    layers = Pattern().layers(model).values()
    chances = [torch.rand(layer.weight.shape) for layer in layers]
    for sparsity in wanted:
        with torch.no_grad():
            for layer, chance in zip(layers, chances, strict=True):
                layer.weight.masked_fill_(chance < sparsity, 0.0)
        _write(model, root / f"{sparsity:g}")


def write_given(model: str, directory: Path) -> None:
    """Write the encoder of a model under a new classifier."""
    if directory.exists():
        return
    config = load_config(model)
    found, _ = load_weights(HEADS["SequenceClassification"], model, config)
    _write(found, directory)


def _write(model: PreTrainedModel, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(directory) as work:
        save_model(model, work)


def write_ranges(directory: Path) -> None:
    """Write ranges of 8 bits beside a model."""
    if not (directory / quant.FILE).exists():
        with new_file(directory / quant.FILE) as work:
            quant.save(in_8_bits(load(directory)), work)


def load(directory: Path) -> PreTrainedModel:
    """The classifier, with attention written out."""
    config = load_config(str(directory))
    head = HEADS["SequenceClassification"]
    return load_weights(head, str(directory), config, attn_implementation="eager")[0].eval()


def in_8_bits(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which computes in 8 bits from now on."""
    prepare_8_bits(model, Quantization())
    for layer in quant.quant_layers(model).values():
        layer.train()  # it observes in training only
    with torch.no_grad():
        model(input_ids=torch.randint(FIRST_ID, LAST_ID, SEEN))
    quant.start(model)
    quant.freeze(model)
    return model.eval()
