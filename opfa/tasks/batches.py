"""What is in a batch: inputs, targets, and how many predictions it asks for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opfa.tasks.features import NO_LABEL, NOWHERE, TARGETS, Batch
from opfa.tasks.recipe import Task


def inputs_of(batch: Batch) -> Batch:
    """What the model is called with: everything but the targets."""
    return {name: tensor for name, tensor in batch.items() if name not in TARGETS}


def targets_of(batch: Batch) -> list[Tensor]:
    """The targets, in the order of the outputs."""
    return [batch[name] for name in TARGETS if name in batch]


def num_targets(batch: Batch) -> int:
    """How many predictions a batch asks for: examples, windows, or words with a tag."""
    return int(is_target(batch).sum())


def is_target(batch: Batch) -> Tensor:
    """Where a batch asks for a prediction; numbers are all asked for."""
    targets = targets_of(batch)[0]
    return (targets != NO_LABEL) | torch.tensor(targets.is_floating_point(), device=targets.device)


def in_context(task: Task, logits: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Logits in fp32; no answer is in padding, so the loss doesn't depend on how a batch is cut."""
    logits = [tensor.float() for tensor in logits]
    if task.kind != "question-answering" or "attention_mask" not in batch:
        return logits
    padding = batch["attention_mask"] == 0
    return [tensor.masked_fill(padding, NOWHERE) for tensor in logits]
