"""Distillation losses against formulas by hand and against the whole batch at once."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from opfa import distill
from opfa.distill import hidden_loss, soft_loss, vocabulary_losses

NUM_TOKENS, HIDDEN, VOCABULARY = 11, 4, 7


def rows(seed: int, width: int) -> Tensor:
    return torch.randn(NUM_TOKENS, width, generator=torch.Generator().manual_seed(seed))


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(HIDDEN, VOCABULARY)


LABELS = torch.tensor([3, -100, 0, 6, -100, -100, 2, 2, 5, -100, 1])


def test_the_soft_loss_is_the_sum_of_p_log_p_over_q_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[1.0, 3.0]]).log()  # probabilities 1/4 and 3/4 against 1/2 and 1/2
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    torch.testing.assert_close(soft_loss(student, teacher, 1.0), expected)


def test_the_soft_loss_is_t_squared_times_the_divergence_of_softened_logits() -> None:
    student, teacher = rows(0, VOCABULARY), rows(1, VOCABULARY)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(soft_loss(student, teacher, 2.0), expected)


def test_the_soft_loss_of_equal_logits_is_zero() -> None:
    logits = rows(0, VOCABULARY)
    torch.testing.assert_close(soft_loss(logits, logits + 3.0, 2.0), torch.tensor(0.0))


def test_the_soft_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    student, teacher = rows(0, VOCABULARY).bfloat16(), rows(1, VOCABULARY).bfloat16()
    found = soft_loss(student, teacher, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, soft_loss(student.float(), teacher.float(), 2.0))


@pytest.mark.parametrize("chunk_rows", [1, 3, 11, 100])
def test_chunks_give_the_value_and_the_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    monkeypatch.setattr(distill, "CHUNK_LOGITS", chunk_rows * VOCABULARY)
    teacher, teacher_rows = linear(1), rows(1, HIDDEN)
    results = []
    for is_chunked in (True, False):
        student, features = linear(0), rows(0, HIDDEN).requires_grad_()
        if is_chunked:
            hard, soft = vocabulary_losses(
                features,
                student,
                LABELS,
                teacher=(teacher_rows, teacher),
                temperature=2.0,
                vocabulary=VOCABULARY,
            )
        else:
            logits = student(features)
            hard = functional.cross_entropy(logits, LABELS, reduction="sum")
            targets = (teacher(teacher_rows).detach() / 2).softmax(-1)
            soft = 4 * functional.kl_div(
                (logits / 2).log_softmax(-1), targets, reduction="batchmean"
            )
            soft = soft * NUM_TOKENS
        (0.3 * hard + 0.7 * soft).backward()
        results.append([hard, soft, features.grad, student.weight.grad, student.bias.grad])
    torch.testing.assert_close(results[0], results[1])


def test_no_projection_sees_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK_LOGITS", 4 * VOCABULARY + 1)
    seen: list[int] = []

    def project(features: Tensor) -> Tensor:
        seen.append(len(features))
        return functional.pad(features, (0, VOCABULARY - HIDDEN))

    teacher = (rows(1, HIDDEN), project)
    features = rows(0, HIDDEN).requires_grad_()
    losses = vocabulary_losses(features, project, LABELS, teacher=teacher, vocabulary=VOCABULARY)
    assert seen == [4, 4, 4, 4, 3, 3]
    sum(losses, torch.tensor(0.0)).backward()
    assert max(seen) == 4


def test_nothing_flows_into_the_teacher() -> None:
    teacher, teacher_rows = linear(1), rows(1, HIDDEN).requires_grad_()
    losses = vocabulary_losses(
        rows(0, HIDDEN).requires_grad_(),
        linear(0),
        LABELS,
        teacher=(teacher_rows, teacher),
        vocabulary=VOCABULARY,
    )
    sum(losses, torch.tensor(0.0)).backward()
    assert (teacher.weight.grad, teacher_rows.grad) == (None, None)


def test_without_a_teacher_the_soft_loss_is_zero() -> None:
    features, student = rows(0, HIDDEN), linear(0)
    hard, soft = vocabulary_losses(features, student, LABELS, vocabulary=VOCABULARY)
    expected = functional.cross_entropy(student(features), LABELS, reduction="sum")
    torch.testing.assert_close(hard, expected)
    assert soft.item() == 0.0


def test_ignored_labels_count_for_the_soft_loss_only() -> None:
    ignored = torch.full_like(LABELS, -100)
    features, teacher = rows(0, HIDDEN), (rows(1, HIDDEN), linear(1))
    hard, soft = vocabulary_losses(
        features, linear(0), ignored, teacher=teacher, temperature=2.0, vocabulary=VOCABULARY
    )
    assert hard.item() == 0.0
    expected = soft_loss(linear(0)(features), linear(1)(teacher[0]), 2.0)
    torch.testing.assert_close(soft, expected)


def test_a_batch_without_rows_has_no_loss() -> None:
    losses = vocabulary_losses(torch.zeros(0, HIDDEN), linear(0), LABELS[:0], vocabulary=VOCABULARY)
    assert [loss.item() for loss in losses] == [0.0, 0.0]


# hidden states [B, T, H]


def states(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.full((1, 2, 3), value) for value in values)


def test_hidden_states_are_a_mean_over_layers_and_width_and_a_sum_over_tokens() -> None:
    kept = torch.tensor([[True, True]])
    # squared distances 1, 4, 9 for each of two tokens
    found = hidden_loss(states(1, 2, 3), states(0, 0, 0), kept)
    torch.testing.assert_close(found, torch.tensor(2 * (1 + 4 + 9) / 3))


def test_padding_does_not_count() -> None:
    kept = torch.tensor([[True, False]])
    torch.testing.assert_close(hidden_loss(states(2, 2), states(0, 0), kept), torch.tensor(4.0))


def test_a_shallow_student_is_matched_at_the_same_relative_depth() -> None:
    kept = torch.tensor([[True, True]])
    teacher = states(0, 1, 2, 3, 4, 5, 6)
    assert hidden_loss(states(0, 2, 4, 6), teacher, kept).item() == 0.0


def test_hidden_states_teach_every_layer() -> None:
    student = tuple(state.requires_grad_() for state in states(1.0, 2.0))
    hidden_loss(student, states(0, 0), torch.tensor([[True, False]])).backward()
    # d/ds of mean over 2 layers and 3 of (s - t)^2 = 2 (s - t) / 6
    expected = [torch.tensor([[[v / 3] * 3, [0.0] * 3]]) for v in (1.0, 2.0)]
    torch.testing.assert_close([state.grad for state in student], expected)
