"""Distillation: loss = hard * CE(labels) + soft * T^2 * KL(teacher || student).

After Hinton et al. (2015) and Prune Once for All, section 3. The vocabulary projection runs over
chunks of tokens, once (as in Liger Kernel, Hsu et al., 2024). All sums are scaled by counts of the
whole global batch, so micro-batches and ranks don't change the result. Shape letters: N tokens, H
hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_LOGITS = 1 << 24  # logits of one chunk, in the model's precision: 32 MiB in bf16
PART_LOGITS = 1 << 19  # of which a CPU takes so many at a time to fp32: they stay in its cache


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) summed over rows of logits [N, V], in fp32."""
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2


class Scales(NamedTuple):
    """What each of the two sums is multiplied by, and the softening temperature."""

    hard: float
    soft: float = 0.0
    temperature: float = 1.0


Part = Callable[[Tensor, Tensor, Scales, Tensor | None], Tensor]


class Sums(NamedTuple):
    """The scaled loss, to differentiate; and its two sums unscaled, for the log."""

    total: Tensor
    hard: Tensor
    soft: Tensor


class VocabularyLoss(nn.Module):
    """The loss over the vocabulary: a module, so that engines gather its sharded parameters."""

    def __init__(self, projection: nn.Linear, is_compiled: bool = False) -> None:
        """Share a projection's weight [V, H], and bias [V] if it has one."""
        super().__init__()
        self.weight, self.bias = projection.weight, projection.bias
        self._part = torch.compile(_part, dynamic=True) if is_compiled else _part

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        scales: Scales,
        teacher: tuple[Tensor, nn.Linear] | None = None,
    ) -> Sums:
        """Cross-entropy of the first rows, as many as there are labels; soft loss over all rows.

        `features` are [N, H]; `teacher` has its own features [N, H] and projection.
        """
        targets = None if teacher is None else (teacher[0], teacher[1].weight, teacher[1].bias)
        settings = scales, targets, self._part, torch.is_grad_enabled()
        return Sums(*_Loss.apply(features, self.weight, self.bias, labels, *settings))


class _Loss(torch.autograd.Function):
    """Gradients are computed beside the loss, in units that keep them of order one in fp16."""

    @staticmethod
    def forward(  # noqa: D102 - torch's protocol
        ctx: Any,  # Any: torch gives it no type
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scales: Scales,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        part: Part,
        is_training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        unit = 2.0 ** math.frexp(max(scales.hard, scales.soft))[1]  # exact in any precision
        units = Scales(scales.hard / unit, scales.soft / unit, scales.temperature)
        sums = torch.zeros(2, device=features.device)
        chunk = rows_of_a_chunk(len(features), features.shape[1], len(weight))
        has_several = len(features) > chunk
        gradients = _Gradients(features, weight, bias, has_several) if is_training else None
        room = [weight.new_empty(chunk, len(weight)) for _ in range(1 if teacher is None else 2)]
        for start in range(0, len(features), max(1, chunk)):
            rows = slice(start, start + chunk)
            logits, targets = _project(room[0], features[rows], weight, bias), None
            if teacher is not None:
                targets = _project(room[1], teacher[0][rows], *teacher[1:])
            sums += _to_gradients(logits, labels[rows], units, targets, part)
            if gradients is not None:
                gradients.add(rows, logits)
        ctx.unit, ctx.gradients = unit, gradients
        hard, soft = sums.unbind()
        ctx.mark_non_differentiable(hard, soft)
        return scales.hard * hard + scales.soft * soft, hard, soft

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102 - protocol
        assert ctx.gradients is not None, "a second backward pass through the same loss"
        found, ctx.gradients = ctx.gradients.tensors(grads[0] * ctx.unit), None
        return *found, *[None] * 5


def rows_of_a_chunk(tokens: int, hidden: int, vocabulary: int) -> int:
    """How many tokens a chunk has: all, if their logits fit into the memory that chunks need."""
    rows = max(1, CHUNK_LOGITS // vocabulary)
    return tokens if tokens <= rows + hidden else rows


def _project(room: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [N, V] of features [N, H], in `room`: fresh memory would cost a CPU much time."""
    logits = room[: len(features)]
    if bias is None:
        return torch.mm(features, weight.t(), out=logits)
    return torch.addmm(bias, features, weight.t(), out=logits)


class _Gradients:
    """Gradients of features, weight and bias, added up chunk by chunk; in fp32 if several."""

    def __init__(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, has_several: bool
    ) -> None:
        self._inputs, self._weight = features, weight
        self._features, self._product = torch.empty_like(features), torch.zeros_like(weight)
        self._bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        self._sum = torch.zeros_like(weight, dtype=torch.float32) if has_several else None

    def add(self, rows: slice, gradient: Tensor) -> None:
        """`gradient` of these rows' logits."""
        torch.mm(gradient, self._weight, out=self._features[rows])
        torch.mm(gradient.t(), self._inputs[rows], out=self._product)
        if self._sum is not None:
            self._sum += self._product
        if self._bias is not None:
            self._bias += gradient.sum(0, dtype=torch.float32)

    def tensors(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Times a factor, in the model's precision, which fp32 sums take after it."""
        if self._sum is None:
            weight = self._product.mul_(factor)
        else:
            weight = self._product.copy_(self._sum.mul_(factor))
        bias = None if self._bias is None else self._bias.mul_(factor).to(weight.dtype)
        return self._features.mul_(factor), weight, bias


def _to_gradients(
    logits: Tensor, labels: Tensor, units: Scales, targets: Tensor | None, part: Part
) -> Tensor:
    """Both sums [2] of a chunk; its logits become their gradient."""
    num_rows = len(logits) if logits.is_cuda else max(1, PART_LOGITS // logits.shape[1])
    sums = torch.zeros(2, device=logits.device)
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        target = None if targets is None else targets[rows]
        sums += part(logits[rows], labels[rows], units, target)
    return sums


def _part(logits: Tensor, labels: Tensor, units: Scales, targets: Tensor | None) -> Tensor:
    temperature, num_labels = units.temperature, len(labels)
    scores = logits.float()
    hard = soft = of_hard = scores.new_zeros(())
    if num_labels:
        log_student = scores[:num_labels].log_softmax(-1)
        places = torch.arange(num_labels, device=labels.device), labels
        hard = -log_student[places].sum()
        of_hard = log_student.exp_()
        of_hard[places] -= 1
        of_hard.mul_(units.hard)
    if targets is not None:
        log_teacher = targets.float().div_(temperature).log_softmax(-1)
        log_student = scores.div_(temperature).log_softmax(-1)
        teacher = log_teacher.exp()
        soft = torch.dot(teacher.view(-1), log_teacher.sub_(log_student).view(-1))
        gradient = log_student.exp_().sub_(teacher).mul_(temperature * units.soft)
    else:
        gradient = scores.zero_()
    gradient[:num_labels] += of_hard
    logits.copy_(gradient)
    return torch.stack([hard, soft * temperature**2])


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Squared distance of hidden states [B, T, H] at flat positions [N]: mean over H and layers,
    summed over tokens. A student's layer is matched with the teacher's at the same relative depth.
    """
    ratio = (len(teacher) - 1) / (len(student) - 1)
    matched = [teacher[round(index * ratio)] for index in range(len(student))]
    # Without padding nothing is gathered: on a GPU its gradient is a sort for each layer.
    is_whole = rows.is_cuda and len(rows) == student[0][..., 0].numel() and rows.dtype != torch.bool

    def pick(states: Tensor) -> Tensor:
        flat = states.flatten(0, 1)
        return (flat if is_whole else flat[rows]).float()

    distances = [
        (pick(s) - pick(t)).square().mean(-1).sum() for s, t in zip(student, matched, strict=True)
    ]
    return torch.stack(distances).mean()
