"""Calibration: 8 bits without training. Ranges of activations are means over training examples."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.downstream.evaluate import Ready
from opfa.downstream.recipe import FinetuneRecipe, Quantization
from opfa.downstream.results import CalibrateResult
from opfa.downstream.student import hold_zeros, prepare_8_bits
from opfa.sparsity.layers import SPARSE_FROM
from opfa.storage import seal
from opfa.storage.files import check_new, new_directory
from opfa.tasks import kinds as tasks
from opfa.tasks.features import Batch
from opfa.tasks.recipe import Task
from opfa.training.checkpoint import model_digest
from opfa.weights.inspection import inspect

log = logging.getLogger(__name__)


def calibrate(
    name: str, recipe: FinetuneRecipe, output: Path, *, num_examples: int = 512
) -> CalibrateResult:
    """Write the model with ranges beside it; its metrics before and after.

    The examples are the first of a shuffle with the recipe's seed. What `[quantization]` says of
    training (`start`, `freeze`, `momentum`) has no meaning here.
    """
    check_new(output)
    with new_directory(output) as work:
        found = _calibrated(name, recipe, work, num_examples)
    return CalibrateResult(
        directory=output,
        **found,
        model_sha256=model_digest(output),
        model_files_sha256=seal.one_digest(seal.model_files(output)),
    )


def _calibrated(
    name: str, recipe: FinetuneRecipe, directory: Path, num_examples: int
) -> dict[str, Any]:
    ready = Ready.load(name, recipe, num_examples)
    task, model, device = ready.task, ready.model, ready.device
    is_sparse = inspect(name)["total"]["sparsity"] >= SPARSE_FROM
    chosen_by = hold_zeros(model, name) if is_sparse else []
    before = ready.evaluate()
    prepare_8_bits(model, recipe.quantization or Quantization())
    num_seen = len(ready.training.examples.labels)
    log.info("%s: calibrating on %d examples", name, num_seen)
    loader = DataLoader(
        ready.training.features,
        batch_size=recipe.training.batch,
        collate_fn=ready.training.collate,
    )
    observe(task, model, loader, device)
    quant.start(model)
    after = ready.evaluate()
    report = ready.write(
        model, directory, lambda path: quant.save(model, path / quant.FILE), chosen_by
    )
    metrics = {"task": recipe.name, "fp32": before, "int8": after}
    return {**metrics, "examples": num_seen, "sparsity": report["total"]["sparsity"]}


@torch.no_grad()
def observe(
    task: Task, model: PreTrainedModel, batches: Iterable[Batch], device: torch.device
) -> None:
    """Let the ranges become the mean over all batches; dropout is off."""
    model.eval()
    layers = quant.quant_layers(model).values()
    for layer in layers:
        layer.train()  # they observe in training only; `evaluate` ends that
    for index, batch in enumerate(batches):
        for layer in layers:
            layer.momentum = 1 / (index + 1)
        tasks.call(task, model, {name: tensor.to(device) for name, tensor in batch.items()})
