"""The upstream loss of one micro-batch, after Prune Once for All, section 3.

    with a teacher:  hard * (CE_mlm + CE_nsp) + soft * (KD_mlm + KD_nsp) + hidden * MSE
    without:         CE_mlm + CE_nsp

Each term is a sum divided by a count of the whole global batch, so micro-batches and ranks don't
change the result. The vocabulary projection runs only over the tokens that a term needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from opfa.compression.distill import Scales, VocabularyLoss, hidden_loss, soft_loss
from opfa.errors import ModelError
from opfa.models.pretraining import Features, pretraining_features, projection
from opfa.training.clock import Clock
from opfa.upstream.batches import Batch
from opfa.upstream.recipe import Distillation


class Counts(NamedTuple):
    """What the whole global batch holds: predicted tokens, real tokens, sequences; at least one."""

    masked: float
    real: float
    sequences: float


class Targets(NamedTuple):
    """A teacher's answer to one micro-batch."""

    features: Features
    projection: nn.Linear


class Losses(NamedTuple):
    """This micro-batch's share of the global batch's loss, and its parts for the log."""

    total: Tensor
    mlm: Tensor
    nsp: Tensor
    distill: Tensor
    hidden: Tensor


PLAIN = Distillation(teacher="", hard_weight=1.0, soft_weight=0.0, temperature=1.0, tokens="masked")


class Objective(nn.Module):
    """A model and its losses in one forward pass, in which an engine's shards are whole."""

    def __init__(
        self,
        model: PreTrainedModel,
        distillation: Distillation | None,
        clock: Clock | None = None,
        is_compiled: bool = False,
    ) -> None:
        """`distillation` weighs the terms; the teacher itself stays outside."""
        super().__init__()
        self.model = model
        self.vocabulary_loss = VocabularyLoss(projection(model), is_compiled)
        self.distillation = distillation or PLAIN
        self._clock = clock or Clock()

    def forward(self, batch: Batch, targets: Targets | None, counts: Counts) -> Losses:
        """The losses of one micro-batch, with or without a teacher's targets for it."""
        settings = self.distillation if targets else PLAIN
        rows, wants_states = rows_of(batch, settings), settings.hidden_weight > 0
        with self._clock.part("student forward"):
            features = pretraining_features(self.model, batch.inputs, rows, wants_states)
        with self._clock.part("loss"):
            return self._losses(batch, features, targets, counts)

    def _losses(
        self, batch: Batch, features: Features, targets: Targets | None, counts: Counts
    ) -> Losses:
        settings = self.distillation if targets else PLAIN
        hard, soft = settings.hard_weight, settings.soft_weight
        num_soft = counts.masked if settings.tokens == "masked" else counts.real
        sums = self.vocabulary_loss(
            features.mlm,
            batch.labels[: len(features.mlm)],
            Scales(hard / counts.masked, soft / num_soft, settings.temperature),
            teacher=(targets.features.mlm, targets.projection) if targets else None,
        )
        total, mlm, distill = sums.total, sums.hard / counts.masked, sums.soft / num_soft
        nsp = hidden = torch.zeros_like(mlm)
        if features.nsp_logits is not None:
            logits = features.nsp_logits
            loss = functional.cross_entropy(logits.float(), batch.next_sentence, reduction="sum")
            loss = loss / counts.sequences
            total, nsp = total + hard * loss, loss.detach()
            if targets and targets.features.nsp_logits is not None:
                loss = soft_loss(logits, targets.features.nsp_logits, settings.temperature)
                loss = loss / counts.sequences
                total, distill = total + soft * loss, distill + loss.detach()
        if targets and settings.hidden_weight:
            states = features.hidden_states, targets.features.hidden_states
            real = torch.cat([batch.predicted, batch.others])
            hidden = hidden_loss(*states, real) / counts.real
            total = total + settings.hidden_weight * hidden
        return Losses(total, mlm, nsp, distill, hidden.detach())


def rows_of(batch: Batch, settings: Distillation) -> Tensor:
    """The flat positions [N] that the vocabulary projection runs over, those with labels first."""
    if settings.is_of_states_alone:
        return batch.predicted[:0]
    if settings.tokens == "masked":
        return batch.predicted
    return torch.cat([batch.predicted, batch.others])


class Teacher:
    """A frozen model beside the student."""

    def __init__(
        self, model: PreTrainedModel, student: PreTrainedModel, settings: Distillation
    ) -> None:
        """Freeze `model`; raises `ModelError` if it can't teach this student."""
        for key in ("vocab_size", *(["hidden_size"] if settings.hidden_weight else [])):
            ours, theirs = getattr(student.config, key), getattr(model.config, key)
            if ours != theirs:
                what = f"its {key} is {theirs}, the student's {ours}"
                raise ModelError(f"distillation.teacher = {settings.teacher!r}: {what}")
        self.model = model.eval().requires_grad_(False)
        self._settings = settings

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        """The teacher's features for one micro-batch."""
        rows, settings = rows_of(batch, self._settings), self._settings
        features = pretraining_features(self.model, batch.inputs, rows, settings.hidden_weight > 0)
        return Targets(features, projection(self.model))
