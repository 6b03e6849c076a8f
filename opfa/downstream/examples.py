"""What training examples say: Fisher information of gates, and measurements for scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from opfa.compression.calibration import ROWS, Calibration, Call, Text, check_enough
from opfa.downstream.evaluate import Ready
from opfa.models.gates import Gates
from opfa.report.bars import Bar
from opfa.tasks import kinds as tasks
from opfa.tasks.batches import in_context, is_target, num_targets
from opfa.tasks.features import Batch, Split
from opfa.tasks.kinds import logits_of
from opfa.tasks.recipe import Task

BATCH = 32
MOST_TOKENS = 1 << 18  # that scores see


def batches_of(ready: Ready) -> list[Batch]:
    """The training examples, short ones first; as many as hold `MOST_TOKENS`."""
    split, lengths = ready.training, ready.training.lengths()
    lengths = lengths[: max(1, int((lengths.cumsum() <= MOST_TOKENS).sum()))]
    rows = Subset(split.features, lengths.argsort(kind="stable").tolist())
    loader = DataLoader(rows, batch_size=BATCH, collate_fn=split.collate)
    return [{name: t.to(ready.device) for name, t in batch.items()} for batch in loader]


def calibration_of(
    model: nn.Module, task: Task, split: Split, device: torch.device, seed: int
) -> Calibration:
    """Measures scores on a sample of the training examples, by a model's logits or vectors."""

    def batches(sequences: int) -> Iterator[Batch]:
        size = len(split.features)
        check_enough("pruning.pattern.score.sequences", sequences, size)
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:sequences]
        rows = Subset(split.features, drawn.tolist())
        for batch in DataLoader(rows, batch_size=ROWS, collate_fn=split.collate):
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def outputs(model: Call, batch: Mapping[str, Tensor]) -> list[Tensor]:
        given = dict(batch)
        found = in_context(task, logits_of(task, tasks.call(task, model, given)), given)
        if task.kind == "token-classification":  # padding and rests of words have no tag
            return [logits[is_target(given)] for logits in found]
        return found

    return Calibration(model, Text(batches, outputs))


def _loss(task: Task, outputs: Any, batch: Batch) -> Tensor:  # Any: of transformers
    """The sum of the losses of all targets. Where there is only a teacher to learn from, which the
    model itself would be, a random projection of the vectors (Gauss-Newton instead of Fisher).
    """
    if task.kind == "embedding" and task.loss == "teacher":
        (vectors,) = tasks.logits_of(task, outputs)
        return (vectors * torch.randn_like(vectors)).sum()
    return tasks.task_loss(task, outputs, batch) * num_targets(batch)


def fisher_of(
    gates: Gates, model: PreTrainedModel, task: Task, batches: Sequence[Batch]
) -> list[Tensor]:
    """The Fisher information of gates, summed over sequences: fp64 [units, units] for each group,
    or one [layers, layers].
    """
    found: list[list[Tensor]] = []
    torch.manual_seed(0)
    with gates, Bar("scores", len(batches)) as bar:
        for batch in batches:
            outputs = tasks.call(task, model, batch)
            found.append([each.cpu() for each in gates.gradients(_loss(task, outputs, batch))])
            bar.advance(1)
    whole = (torch.cat(each).double() for each in zip(*found, strict=True))
    return [gradient.T @ gradient for gradient in whole]


def num_rows(batches: Sequence[Batch]) -> int:
    """How many examples are in all of them."""
    return sum(len(batch["input_ids"]) for batch in batches)
