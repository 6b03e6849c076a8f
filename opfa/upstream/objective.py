"""The upstream loss of one micro-batch: masked tokens, next sentence, and the distance to a frozen
teacher.

    with a teacher:  hard * (CE_mlm + CE_nsp) + soft * (KD_mlm + KD_nsp) + hidden * MSE
    without:         CE_mlm + CE_nsp

after Prune Once for All, section 3.

Each term is a sum divided by a count of the whole global batch (predicted tokens, real tokens,
sequences), so micro-batches and ranks don't change the result. The vocabulary projection runs only
over the tokens that a term needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from opfa.distill import Projection, hidden_loss, soft_loss, vocabulary_losses
from opfa.models import Features, pretraining_features, projection
from opfa.recipe import ModelError
from opfa.upstream.batches import Batch
from opfa.upstream.masking import IGNORED
from opfa.upstream.recipe import Distillation


class Counts(NamedTuple):
    """What the whole global batch holds: predicted tokens, real tokens, sequences."""

    masked: float
    real: float
    sequences: float


class Targets(NamedTuple):
    """A teacher's answer to one micro-batch."""

    features: Features
    project: Projection


class Losses(NamedTuple):
    """This micro-batch's share of the global batch's loss, and its parts for the log."""

    total: Tensor
    mlm: Tensor
    nsp: Tensor
    distill: Tensor


class Objective(nn.Module):
    """A model and its losses in one forward pass, which is what an engine wraps: sharded
    parameters are there in it.
    """

    def __init__(self, model: PreTrainedModel, distillation: Distillation | None) -> None:
        """`distillation` weighs the terms; the teacher itself stays outside."""
        super().__init__()
        self.model = model
        self.distillation = distillation

    def forward(self, batch: Batch, targets: Targets | None, counts: Counts) -> Losses:
        """The losses of one micro-batch, with or without a teacher's targets for it."""
        settings = self.distillation if targets else None
        features = pretraining_features(
            self.model, batch.inputs, bool(settings and settings.hidden_weight)
        )
        real = batch.inputs["attention_mask"].bool()
        all_tokens = settings is not None and settings.tokens == "all"
        rows = real if all_tokens else batch.labels != IGNORED
        hard, soft = vocabulary_losses(
            features.mlm[rows],
            projection(self.model),
            batch.labels[rows],
            teacher=(targets.features.mlm[rows], targets.project) if targets else None,
            temperature=settings.temperature if settings else 1.0,
            vocabulary=self.model.config.vocab_size,
        )
        mlm = hard / counts.masked
        nsp = torch.zeros_like(mlm)
        if features.nsp_logits is not None:
            nsp = functional.cross_entropy(
                features.nsp_logits.float(), batch.next_sentence, reduction="sum"
            )
            nsp = nsp / counts.sequences
        if settings is None or targets is None:
            return Losses(mlm + nsp, mlm.detach(), nsp.detach(), torch.zeros_like(mlm))
        distill = soft / (counts.real if all_tokens else counts.masked)
        if features.nsp_logits is not None and targets.features.nsp_logits is not None:
            nsp_logits = features.nsp_logits, targets.features.nsp_logits
            distill = distill + soft_loss(*nsp_logits, settings.temperature) / counts.sequences
        total = settings.hard_weight * (mlm + nsp) + settings.soft_weight * distill
        if settings.hidden_weight:
            states = features.hidden_states, targets.features.hidden_states
            total = total + settings.hidden_weight * hidden_loss(*states, real) / counts.real
        return Losses(total, mlm.detach(), nsp.detach(), distill.detach())


class Teacher:
    """A frozen model beside the student."""

    def __init__(
        self, model: PreTrainedModel, student: PreTrainedModel, settings: Distillation
    ) -> None:
        """Freeze `model`; raises `ModelError` if it can't teach this student."""
        for key in ("vocab_size", *(["hidden_size"] if settings.hidden_weight else [])):
            ours, theirs = getattr(student.config, key), getattr(model.config, key)
            if ours != theirs:
                raise ModelError(
                    f"distillation.teacher = {settings.teacher!r}: its {key} is {theirs}, "
                    f"the student's {ours}"
                )
        self.model = model.eval().requires_grad_(False)
        self._wants_hidden = settings.hidden_weight > 0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        """The teacher's features for one micro-batch."""
        features = pretraining_features(self.model, batch.inputs, self._wants_hidden)
        return Targets(features, projection(self.model))
