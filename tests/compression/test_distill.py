"""Distillation losses against formulas by hand and against autograd over all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from opfa.compression import distill
from opfa.compression.distill import Scales, Sums, VocabularyLoss, hidden_loss, soft_loss

NUM_TOKENS, HIDDEN, VOCABULARY = 11, 4, 7
SCALES = Scales(hard=0.3, soft=0.7, temperature=2.0)


def rows(seed: int, width: int) -> Tensor:
    return torch.randn(NUM_TOKENS, width, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(HIDDEN, VOCABULARY, bias=bias)


LABELS = torch.tensor([3, 0, 6, 2, 2, 5, 1])  # of the first 7 of 11 tokens
ALL_LABELS = torch.tensor([3, 0, 6, 2, 2, 5, 1, 4, 4, 0, 3])


def in_parts(monkeypatch: pytest.MonkeyPatch, chunk_rows: int, part_rows: int) -> None:
    monkeypatch.setattr(distill, "CHUNK_LOGITS", chunk_rows * VOCABULARY)
    monkeypatch.setattr(distill, "PART_LOGITS", part_rows * VOCABULARY)


def dense(
    logits: Tensor, labels: Tensor, scales: Scales, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, hard and soft in plain torch, differentiable by autograd."""
    hard = functional.cross_entropy(logits[: len(labels)].float(), labels, reduction="sum")
    soft = torch.zeros(())
    if targets is not None:
        p = (targets.float() / scales.temperature).softmax(-1)
        log_q = (logits.float() / scales.temperature).log_softmax(-1)
        soft = scales.temperature**2 * (p * (p.log() - log_q)).sum()
    return scales.hard * hard + scales.soft * soft, hard, soft


def differentiated(total: Tensor, features: Tensor, layer: nn.Linear) -> list[Tensor]:
    """Gradients of features, weight and bias."""
    leaves = [features, *layer.parameters()]
    return list(torch.autograd.grad(total, leaves))


# the soft loss


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


# the loss over the vocabulary


@pytest.mark.parametrize(
    ("chunk_rows", "part_rows"),
    [(1, 1), (3, 2), (4, 100), (7, 3), (10, 3), (11, 4), (100, 1), (100, 100)],
)
@pytest.mark.parametrize("labels", [LABELS, ALL_LABELS, LABELS[:1], LABELS[:0]], ids=len)
@pytest.mark.parametrize("has_teacher", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
    part_rows: int,
    labels: Tensor,
    has_teacher: bool,
    has_bias: bool,
) -> None:
    in_parts(monkeypatch, chunk_rows, part_rows)
    student, features = linear(0, has_bias), rows(0, HIDDEN).requires_grad_()
    teacher = (rows(1, HIDDEN), linear(1)) if has_teacher else None
    found = VocabularyLoss(student)(features, labels, SCALES, teacher)
    targets = teacher[1](teacher[0]).detach() if teacher else None
    expected = dense(student(features), labels, SCALES, targets)
    torch.testing.assert_close(tuple(found), expected)
    torch.testing.assert_close(
        differentiated(found.total, features, student),
        differentiated(expected[0], features, student),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "scales",
    [
        Scales(hard=1.0),
        Scales(hard=0.0, soft=2.0, temperature=3.0),
        Scales(hard=2.0, soft=0.0, temperature=3.0),
        Scales(hard=1e-4, soft=3e-4, temperature=1.0),
        Scales(hard=5.0, soft=0.1, temperature=0.5),
        Scales(hard=0.0, soft=0.0),
    ],
)
def test_each_sum_has_its_own_scale(scales: Scales) -> None:
    student, features = linear(0), rows(0, HIDDEN).requires_grad_()
    teacher = (rows(1, HIDDEN), linear(1))
    found = VocabularyLoss(student)(features, LABELS, scales, teacher)
    targets = teacher[1](teacher[0]).detach()
    expected = dense(student(features), LABELS, scales, targets)
    torch.testing.assert_close(tuple(found), expected)
    torch.testing.assert_close(
        differentiated(found.total, features, student),
        differentiated(expected[0], features, student),
        rtol=1e-5,
        atol=1e-9,
    )


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_in_bf16_they_are_those_of_fp32_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    in_parts(monkeypatch, chunk_rows, 2)
    student, features = linear(0).bfloat16(), rows(0, HIDDEN).bfloat16().requires_grad_()
    teacher, teacher_rows = linear(1).bfloat16(), rows(1, HIDDEN).bfloat16()
    found = VocabularyLoss(student)(features, LABELS, SCALES, (teacher_rows, teacher))
    gradients = differentiated(found.total, features, student)
    wide, wide_features = linear(0), features.detach().float().requires_grad_()
    wide.load_state_dict(student.state_dict())
    targets = teacher.float()(teacher_rows.float()).detach()
    expected = dense(wide(wide_features), LABELS, SCALES, targets)
    assert {part.dtype for part in found} == {torch.float32}
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    torch.testing.assert_close(tuple(found), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(
        [gradient.float() for gradient in gradients],
        differentiated(expected[0], wide_features, wide),
        rtol=0.03,
        atol=0.03,
    )


def test_many_bf16_chunks_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # One row a chunk, each with the same gradient g: in bf16 a sum stops to grow at 256 g.
    in_parts(monkeypatch, 1, 1)
    student = linear(0).bfloat16()
    features = torch.ones(1024, HIDDEN, dtype=torch.bfloat16)
    labels = torch.zeros(1024, dtype=torch.int64)
    VocabularyLoss(student)(features, labels, Scales(hard=1 / 1024)).total.backward()
    with torch.no_grad():
        expected = student(features[:1])[0].float().softmax(-1)
    expected[0] -= 1
    assert student.bias.grad is not None
    torch.testing.assert_close(student.bias.grad.float(), expected, rtol=0.02, atol=0.0)


def test_many_fp16_chunks_are_added_up_beyond_the_range_of_fp16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The sum of the label's gradients is beyond -65504, fp16's lowest number, before it is scaled.
    in_parts(monkeypatch, 2**15, 2**15)
    student = nn.Linear(1, VOCABULARY).half()
    nn.init.zeros_(student.weight)
    nn.init.zeros_(student.bias)
    features = torch.ones(2**18, 1, dtype=torch.float16)
    labels = torch.zeros(2**18, dtype=torch.int64)
    VocabularyLoss(student)(features, labels, Scales(hard=2.0**-18)).total.backward()
    expected = torch.full((VOCABULARY,), 1 / VOCABULARY)
    expected[0] -= 1
    assert student.bias.grad is not None and student.weight.grad is not None
    torch.testing.assert_close(student.bias.grad.float(), expected, rtol=0.01, atol=0.0)
    torch.testing.assert_close(student.weight.grad[:, 0].float(), expected, rtol=0.01, atol=0.0)


def test_small_scales_keep_gradients_above_the_smallest_fp16_number() -> None:
    # As with a loss scale: the factor comes in the backward pass.
    student, features = linear(0).half(), rows(0, HIDDEN).half().requires_grad_()
    found = VocabularyLoss(student)(features, ALL_LABELS, Scales(hard=1e-9))
    (found.total * 1e9).backward()
    wide, wide_features = linear(0), features.detach().float().requires_grad_()
    wide.load_state_dict(student.state_dict())
    functional.cross_entropy(wide(wide_features), ALL_LABELS, reduction="sum").backward()
    assert features.grad is not None and wide_features.grad is not None
    torch.testing.assert_close(features.grad.float(), wide_features.grad, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("scales", [Scales(1e-7, 0.9, 2.0), Scales(0.9, 1e-7, 2.0)])
def test_scales_far_apart_stay_within_the_range_of_fp16(scales: Scales) -> None:
    student, features = linear(0).half(), rows(0, HIDDEN).half().requires_grad_()
    teacher, teacher_rows = linear(1).half(), rows(1, HIDDEN).half()
    found = VocabularyLoss(student)(features, LABELS, scales, (teacher_rows, teacher))
    gradients = differentiated(found.total, features, student)
    wide, wide_features = linear(0), features.detach().float().requires_grad_()
    wide.load_state_dict(student.state_dict())
    targets = teacher.float()(teacher_rows.float()).detach()
    total = dense(wide(wide_features), LABELS, scales, targets)[0]
    torch.testing.assert_close(
        [gradient.float() for gradient in gradients],
        differentiated(total, wide_features, wide),
        rtol=0.01,
        atol=0.01,
    )


def test_a_weight_shared_with_an_embedding_gets_both_gradients() -> None:
    ids = torch.arange(VOCABULARY)
    gradients = []
    for is_dense in (False, True):
        embedding, student = nn.Embedding(VOCABULARY, HIDDEN), linear(0)
        student.weight = embedding.weight
        embedding.weight.data = linear(5).weight.data
        features = torch.tanh(embedding(ids))
        if is_dense:
            total = dense(student(features), LABELS, SCALES)[0]
        else:
            total = VocabularyLoss(student)(features, LABELS, SCALES).total
        gradients.append(torch.autograd.grad(total, [embedding.weight, student.bias]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_factor_in_the_backward_pass_scales_all_gradients() -> None:
    gradients = []
    for factor in (1.0, 3.0):
        student, features = linear(0), rows(0, HIDDEN).requires_grad_()
        total = VocabularyLoss(student)(
            features, LABELS, SCALES, (rows(1, HIDDEN), linear(1))
        ).total
        gradients.append(differentiated(total * factor, features, student))
    torch.testing.assert_close(gradients[1], [3.0 * gradient for gradient in gradients[0]])


def test_gradients_are_added_to_those_that_are_there() -> None:
    student, features = linear(0), rows(0, HIDDEN)
    for _ in range(2):
        VocabularyLoss(student)(features, LABELS, SCALES).total.backward()
    once = torch.autograd.grad(
        dense(student(features), LABELS, SCALES)[0], list(student.parameters())
    )
    found = [parameter.grad for parameter in student.parameters()]
    torch.testing.assert_close(found, [2 * gradient for gradient in once])


def test_a_frozen_projection_still_gives_the_gradient_of_features() -> None:
    student, features = linear(0).requires_grad_(False), rows(0, HIDDEN).requires_grad_()
    VocabularyLoss(student)(features, LABELS, SCALES).total.backward()
    expected = torch.autograd.grad(dense(student(features), LABELS, SCALES)[0], features)[0]
    torch.testing.assert_close(features.grad, expected)
    assert student.weight.grad is None


def test_a_second_backward_pass_is_refused() -> None:
    total = VocabularyLoss(linear(0))(rows(0, HIDDEN), LABELS, SCALES).total
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second backward pass through the same loss"):
        total.backward()


def test_only_the_total_can_be_differentiated() -> None:
    found = VocabularyLoss(linear(0))(rows(0, HIDDEN).requires_grad_(), LABELS, SCALES)
    assert [part.requires_grad for part in found] == [True, False, False]


class Made(distill._Gradients):
    """Notes that gradients were made."""

    count = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        type(self).count += 1


def evaluated(features: Tensor) -> Sums:
    return VocabularyLoss(linear(0))(features, LABELS, SCALES, (rows(1, HIDDEN), linear(1)))


def test_without_grad_the_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3, 2)
    with torch.no_grad():
        found = evaluated(rows(0, HIDDEN))
    assert not found.total.requires_grad
    torch.testing.assert_close(tuple(found), tuple(evaluated(rows(0, HIDDEN))), rtol=0, atol=0)


@pytest.mark.parametrize(("is_training", "count"), [(True, 1), (False, 0)])
def test_without_grad_no_gradients_are_made(
    monkeypatch: pytest.MonkeyPatch, is_training: bool, count: int
) -> None:
    monkeypatch.setattr(distill, "_Gradients", Made)
    monkeypatch.setattr(Made, "count", 0)
    with torch.set_grad_enabled(is_training):
        evaluated(rows(0, HIDDEN))
    assert Made.count == count


class Widest(torch.overrides.TorchFunctionMode):
    """Notes how many rows of logits [N, V] the largest tensor had that is none of the weights."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.rows, self._weights = 0, {layer.weight.data_ptr() for layer in layers}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_wide = isinstance(result, Tensor) and result.ndim == 2 and len(result.t()) == VOCABULARY
        with torch._C.DisableTorchFunction():
            if is_wide and result.data_ptr() not in self._weights:
                self.rows = max(self.rows, len(result))
        return result


@pytest.mark.parametrize(("chunk_logits", "most"), [(5 * VOCABULARY + 1, 5), (1, 1), (10**6, 11)])
def test_no_logits_of_more_than_a_chunk_exist(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, most: int
) -> None:
    monkeypatch.setattr(distill, "CHUNK_LOGITS", chunk_logits)
    student, teacher, features = linear(0), linear(1), rows(0, HIDDEN).requires_grad_()
    with Widest(student, teacher) as seen:
        found = VocabularyLoss(student)(features, LABELS, SCALES, (rows(1, HIDDEN), teacher))
        found.total.backward()
    assert seen.rows == most


def test_fp32_copies_are_of_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 6, 2)
    part, seen = distill._part, []

    def watched(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        seen.append((len(logits), len(labels)))
        return part(logits, labels, *rest)

    monkeypatch.setattr(distill, "_part", watched)
    evaluated(rows(0, HIDDEN))
    assert seen == [(2, 2), (2, 2), (2, 2), (2, 1), (2, 0), (1, 0)]  # 7 labels of 11 rows


def test_nothing_flows_into_the_teacher() -> None:
    teacher, teacher_rows = linear(1), rows(1, HIDDEN).requires_grad_()
    features = rows(0, HIDDEN).requires_grad_()
    VocabularyLoss(linear(0))(features, LABELS, SCALES, (teacher_rows, teacher)).total.backward()
    assert (teacher.weight.grad, teacher_rows.grad) == (None, None)


def test_the_teacher_is_not_changed() -> None:
    teacher, teacher_rows = linear(1), rows(1, HIDDEN)
    VocabularyLoss(linear(0))(
        rows(0, HIDDEN).requires_grad_(), LABELS, SCALES, (teacher_rows, teacher)
    ).total.backward()
    assert torch.equal(teacher_rows, rows(1, HIDDEN))
    assert torch.equal(teacher.weight, linear(1).weight)


def test_a_student_that_is_its_teacher_has_no_soft_loss_and_no_gradient() -> None:
    student, features = linear(0), rows(0, HIDDEN).requires_grad_()
    scales = Scales(hard=0.0, soft=1.0, temperature=2.0)
    found = VocabularyLoss(student)(features, LABELS, scales, (rows(0, HIDDEN), linear(0)))
    found.total.backward()
    assert found.soft.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(features.grad, torch.zeros_like(features))


def test_without_a_teacher_the_soft_loss_is_zero() -> None:
    features, student = rows(0, HIDDEN), linear(0)
    found = VocabularyLoss(student)(features, ALL_LABELS, Scales(hard=1.0, soft=1.0))
    expected = functional.cross_entropy(student(features), ALL_LABELS, reduction="sum")
    torch.testing.assert_close(tuple(found), (expected, expected, torch.tensor(0.0)))


def test_rows_without_labels_count_for_the_soft_loss_only() -> None:
    features, teacher = rows(0, HIDDEN), (rows(1, HIDDEN), linear(1))
    found = VocabularyLoss(linear(0))(features, LABELS[:0], SCALES, teacher)
    assert found.hard.item() == 0.0
    expected = soft_loss(linear(0)(features), linear(1)(teacher[0]), 2.0)
    torch.testing.assert_close(found.soft, expected)


@pytest.mark.parametrize("has_teacher", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_batch_without_rows_has_no_loss_and_zero_gradients(
    has_teacher: bool, has_bias: bool
) -> None:
    student, features = linear(0, has_bias), torch.zeros(0, HIDDEN, requires_grad=True)
    teacher = (torch.zeros(0, HIDDEN), linear(1)) if has_teacher else None
    found = VocabularyLoss(student)(features, LABELS[:0], SCALES, teacher)
    assert [part.item() for part in found] == [0.0, 0.0, 0.0]
    expected = [torch.zeros_like(leaf) for leaf in (features, *student.parameters())]
    torch.testing.assert_close(differentiated(found.total, features, student), expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits_stay_finite_and_right(sign: float) -> None:
    student, features = linear(0), (rows(0, HIDDEN) * 1e4 * sign).requires_grad_()
    teacher = (rows(1, HIDDEN) * 1e4, linear(1))
    found = VocabularyLoss(student)(features, LABELS, SCALES, teacher)
    gradients = differentiated(found.total, features, student)
    assert all(torch.isfinite(tensor).all() for tensor in (*found, *gradients))
    logits = student(features)
    hard = functional.cross_entropy(logits[: len(LABELS)], LABELS, reduction="sum")
    soft = soft_loss(logits, teacher[1](teacher[0]).detach(), 2.0)
    torch.testing.assert_close((found.hard, found.soft), (hard, soft))
    expected = differentiated(0.3 * hard + 0.7 * soft, features, student)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_a_logit_that_is_not_a_number_shows_in_the_loss() -> None:
    features = rows(0, HIDDEN)
    features[2, 1] = float("nan")
    found = VocabularyLoss(linear(0))(features, LABELS, Scales(hard=1.0))
    assert torch.isnan(found.total)


def test_it_has_the_parameters_of_the_projection_and_no_others() -> None:
    student = linear(0)
    found = dict(VocabularyLoss(student).named_parameters())
    assert list(found) == ["weight", "bias"]
    assert found["weight"] is student.weight and found["bias"] is student.bias


# hidden states [B, T, H]


def states(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.full((1, 2, 3), value) for value in values)


BOTH, FIRST = torch.tensor([0, 1]), torch.tensor([0])


def test_hidden_states_are_a_mean_over_layers_and_width_and_a_sum_over_tokens() -> None:
    # squared distances 1, 4, 9 for each of two tokens
    found = hidden_loss(states(1, 2, 3), states(0, 0, 0), BOTH)
    torch.testing.assert_close(found, torch.tensor(2 * (1 + 4 + 9) / 3))


def test_tokens_left_out_do_not_count() -> None:
    torch.testing.assert_close(hidden_loss(states(2, 2), states(0, 0), FIRST), torch.tensor(4.0))


def test_positions_run_through_the_batch_row_by_row() -> None:
    student = (torch.arange(6.0).view(3, 2, 1),) * 2  # three sequences of two tokens
    teacher = (torch.arange(6.0).view(3, 2, 1).square(),) * 2
    found = hidden_loss(student, teacher, torch.tensor([5, 2]))
    torch.testing.assert_close(found, torch.tensor((25.0 - 5.0) ** 2 + (4.0 - 2.0) ** 2))


def test_a_flat_mask_says_the_same_as_positions() -> None:
    student, teacher = (torch.arange(6.0).view(3, 2, 1),) * 2, (torch.zeros(3, 2, 1),) * 2
    mask = torch.tensor([False, True, False, True, True, False])
    torch.testing.assert_close(
        hidden_loss(student, teacher, mask), hidden_loss(student, teacher, torch.tensor([1, 3, 4]))
    )


def test_a_shallow_student_is_matched_at_the_same_relative_depth() -> None:
    teacher = states(0, 1, 2, 3, 4, 5, 6)
    assert hidden_loss(states(0, 2, 4, 6), teacher, BOTH).item() == 0.0


def test_hidden_states_teach_every_layer() -> None:
    student = tuple(state.requires_grad_() for state in states(1.0, 2.0))
    hidden_loss(student, states(0, 0), FIRST).backward()
    # d/ds of mean over 2 layers and 3 of (s - t)^2 = 2 (s - t) / 6
    expected = [torch.tensor([[[v / 3] * 3, [0.0] * 3]]) for v in (1.0, 2.0)]
    torch.testing.assert_close([state.grad for state in student], expected)
