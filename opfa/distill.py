"""Distillation: a frozen teacher's soft targets, and losses that never hold tokens x vocabulary for
a whole batch.

    loss = hard * CE(labels) + soft * T^2 * KL(teacher || student)

after Hinton et al. (2015) and Prune Once for All, section 3.

The vocabulary projection, student's and teacher's, runs over chunks of tokens. If there are
several, each chunk's logits are recomputed in the backward pass, so only one chunk's exist at any
time. All sums are divided by counts of the whole global batch, so the result does not depend on how
the batch is cut into micro-batches and ranks. Shape letters: N tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24  # logits in one chunk: 64 MiB in fp32

Projection = Callable[[Tensor], Tensor]


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) summed over rows of logits [N, V], in fp32."""
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return (
        functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        * temperature**2
    )


def vocabulary_losses(
    features: Tensor,
    project: Projection,
    labels: Tensor,
    *,
    teacher: tuple[Tensor, Projection] | None = None,
    temperature: float = 1.0,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over labels that aren't ignored, and summed soft loss over all rows
    given.

    `teacher` is its features [N, H] and its projection; without one the soft loss is zero.
    """
    hard = features.new_zeros((), dtype=torch.float32)
    soft = hard
    chunk = max(1, CHUNK_LOGITS // vocabulary)
    if len(labels) <= chunk:
        return _chunk_losses(features, project, labels, teacher, temperature)
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        targets = (teacher[0][rows], teacher[1]) if teacher else None
        chunk_hard, chunk_soft = checkpoint(
            _chunk_losses,
            features[rows],
            project,
            labels[rows],
            targets,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        hard, soft = hard + chunk_hard, soft + chunk_soft
    return hard, soft


def _chunk_losses(
    features: Tensor,
    project: Projection,
    labels: Tensor,
    teacher: tuple[Tensor, Projection] | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits = project(features)
    hard = functional.cross_entropy(logits.float(), labels, reduction="sum")
    if teacher is None:
        return hard, torch.zeros_like(hard)
    with torch.no_grad():
        targets = teacher[1](teacher[0])
    return hard, soft_loss(logits, targets, temperature)


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], kept: Tensor) -> Tensor:
    """Squared distance of hidden states at kept positions: mean over H and layers, summed over
    tokens.

    Each student layer is matched with the teacher layer at the same relative depth.
    """
    ratio = (len(teacher) - 1) / (len(student) - 1)
    matched = [teacher[round(index * ratio)] for index in range(len(student))]
    distances = [
        (s[kept].float() - t[kept].float()).square().mean(-1).sum()
        for s, t in zip(student, matched, strict=True)
    ]
    return torch.stack(distances).mean()
