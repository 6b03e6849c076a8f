"""The upstream loss of a micro-batch against plain transformers over all positions."""

from typing import Any

import pytest
import torch
from conftest import dense_labels
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from opfa.models.configs import wordpiece_tokenizer
from opfa.models.pretraining import new_pretraining_model, pretraining_features, projection
from opfa.training.clock import Clock
from opfa.upstream.batches import Batch
from opfa.upstream.objective import Counts, Losses, Objective, Teacher
from opfa.upstream.progress import mean_losses
from opfa.upstream.recipe import Distillation

VOCABULARY = 50
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(5, VOCABULARY)))
TOKENIZER = wordpiece_tokenizer(
    {word: index for index, word in enumerate(WORDS)}, lowercase=True, tokens=24
)
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER | SPECIAL,
    "modernbert": ENCODER | SPECIAL,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}
COUNTS = Counts(masked=7.0, real=31.0, sequences=5.0)  # of a global batch with more than this one


def model(seed: int, family: str = "bert", objective: str = "mlm+nsp") -> PreTrainedModel:
    torch.manual_seed(seed)
    values = {"model_type": family, **FAMILIES[family], "initializer_range": 0.3}
    return new_pretraining_model(values, objective, TOKENIZER, dropout=0.0)


def batch(has_pairs: bool = True, is_padded: bool = True) -> Batch:
    """Two sequences of 8 tokens, 3 of them predicted; if padded, the second has 5 real ones."""
    random = torch.Generator().manual_seed(0)
    is_real = torch.ones(2, 8, dtype=torch.int64)
    if is_padded:
        is_real[1, 5:] = 0
    ids = torch.randint(5, VOCABULARY, (2, 8), generator=random) * is_real
    inputs = {"input_ids": ids}
    if is_padded:
        inputs["attention_mask"] = is_real
    if has_pairs:
        inputs["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 4, [0] * 3 + [1] * 2 + [0] * 3])
    predicted = torch.tensor([2, 5, 11])
    others = torch.tensor(
        [i for i in is_real.flatten().nonzero().flatten().tolist() if i not in (2, 5, 11)]
    )
    next_sentence = torch.tensor([1, 0]) if has_pairs else torch.tensor([-100, -100])
    return Batch(inputs, predicted, others, torch.tensor([7, 30, 49]), next_sentence)


def objective(student: PreTrainedModel, settings: Distillation | None) -> Objective:
    return Objective(student, settings, Clock())


def softened(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    p = (theirs.detach() / temperature).softmax(-1)
    log_q = (ours / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum()


def expected_losses(
    student: PreTrainedModel, teacher: PreTrainedModel, found: Batch, settings: Distillation
) -> Losses:
    """The formula, over logits at all positions."""
    ours, theirs = (m(**found.inputs, output_hidden_states=True) for m in (student, teacher))
    labels = dense_labels(found)
    is_real = torch.ones_like(labels).bool()
    if "attention_mask" in found.inputs:
        is_real = found.inputs["attention_mask"].bool()
    is_soft, num_soft = is_real, COUNTS.real
    if settings.tokens == "masked":
        is_soft, num_soft = labels != -100, COUNTS.masked
    mlm = functional.cross_entropy(
        ours.prediction_logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    nsp = functional.cross_entropy(
        ours.seq_relationship_logits, found.next_sentence, reduction="sum"
    )
    pairs = ours.prediction_logits[is_soft], theirs.prediction_logits[is_soft]
    distill = softened(*pairs, settings.temperature) / num_soft
    pairs = ours.seq_relationship_logits, theirs.seq_relationship_logits
    distill = distill + softened(*pairs, settings.temperature) / COUNTS.sequences
    hidden = torch.stack(
        [
            (s - t.detach())[is_real].square().mean(-1).sum()
            for s, t in zip(ours.hidden_states, theirs.hidden_states, strict=True)
        ]
    ).mean()
    mlm, nsp = mlm / COUNTS.masked, nsp / COUNTS.sequences
    total = settings.hard_weight * (mlm + nsp) + settings.soft_weight * distill
    hidden = hidden / COUNTS.real if settings.hidden_weight else torch.zeros(())
    total = total + settings.hidden_weight * hidden
    return Losses(total, mlm, nsp, distill, hidden)


def gradients(total: Tensor, student: PreTrainedModel) -> dict[str, Tensor]:
    student.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize("hidden_weight", [0.0, 0.7])
@pytest.mark.parametrize("is_padded", [True, False])
def test_under_a_teacher_loss_and_gradients_are_those_of_the_formula(
    tokens: Any, hidden_weight: float, is_padded: bool
) -> None:
    settings = Distillation(
        teacher="t",
        hard_weight=0.3,
        soft_weight=0.9,
        hidden_weight=hidden_weight,
        temperature=3.0,
        tokens=tokens,
    )
    student, teacher, found = model(0), model(1), batch(is_padded=is_padded)
    targets = Teacher(teacher, student, settings)(found)
    losses = objective(student, settings)(found, targets, COUNTS)
    expected = expected_losses(student, teacher, found, settings)
    torch.testing.assert_close(tuple(losses), tuple(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients(losses.total, student),
        gradients(expected.total, student),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("settings", [None, Distillation(teacher="t", hidden_weight=1.0)])
def test_without_targets_the_loss_is_that_of_plain_transformers(
    settings: Distillation | None,
) -> None:
    student, found = model(0), batch()
    counts = Counts(masked=3.0, real=13.0, sequences=2.0)  # of this batch alone: means
    losses = objective(student, settings)(found, None, counts)
    targets = {"labels": dense_labels(found), "next_sentence_label": found.next_sentence}
    expected = student(**found.inputs, **targets).loss
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.mlm + losses.nsp, expected.detach())
    assert losses.distill.item() == 0.0
    torch.testing.assert_close(
        gradients(losses.total, student), gradients(expected, student), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_projection_are_the_logits_of_the_family(family: str) -> None:
    student, found = model(0, family, "mlm").eval(), batch(has_pairs=False)
    rows = torch.tensor([11, 0, 2, 12, 7])
    features = pretraining_features(student, found.inputs, rows)
    expected = student(**found.inputs).logits.flatten(0, 1)[rows]
    torch.testing.assert_close(projection(student)(features.mlm), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_loss_is_that_of_plain_transformers(family: str) -> None:
    student, found = model(0, family, "mlm"), batch(has_pairs=False)
    losses = objective(student, None)(found, None, Counts(3.0, 13.0, 2.0))
    expected = student(**found.inputs, labels=dense_labels(found)).loss
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(
        gradients(losses.total, student), gradients(expected, student), rtol=1e-4, atol=1e-6
    )


def test_only_the_total_is_differentiable() -> None:
    settings = Distillation(teacher="t", hidden_weight=1.0)
    student, found = model(0), batch()
    targets = Teacher(model(1), student, settings)(found)
    losses = objective(student, settings)(found, targets, COUNTS)
    assert [part.requires_grad for part in losses] == [True, False, False, False, False]


def test_held_out_losses_are_means_over_tokens_and_sequences() -> None:
    settings = Distillation(teacher="t", hidden_weight=1.0)
    student, found = model(0).eval(), [batch(), batch(is_padded=False)]
    teacher = Teacher(model(1), student, settings)
    counts = [Counts(*map(float, one.counts())) for one in found]
    whole = Counts(*(sum(column) for column in zip(*counts, strict=True)))
    parts = [objective(student, settings)(one, teacher(one), whole) for one in found]
    expected = [float(sum(part)) for part in list(zip(*parts, strict=True))[1:]]
    means = mean_losses(objective(student, settings), found, teacher)
    mlm, nsp, _, hidden = expected
    names = {"mlm_loss": mlm, "nsp_loss": nsp, "hidden_loss": hidden}
    assert means == pytest.approx(names, rel=1e-5)
    del names["hidden_loss"]
    assert mean_losses(objective(student, settings), found) == pytest.approx(names, rel=1e-5)


def test_held_out_rows_have_a_loss_where_it_is_what_training_minimizes() -> None:
    student, found = model(0).eval(), [batch()]
    means = mean_losses(Objective(student, None), found)
    assert means["loss"] == pytest.approx(means["mlm_loss"] + means["nsp_loss"])
    total = Objective(student, None)(found[0], None, Counts(*map(float, found[0].counts()))).total
    assert means["loss"] == pytest.approx(total.item(), rel=1e-5)


def test_the_teacher_is_frozen() -> None:
    settings = Distillation(teacher="t", hidden_weight=1.0)
    student, teacher, found = model(0), model(1), batch()
    targets = Teacher(teacher, student, settings)(found)
    objective(student, settings)(found, targets, COUNTS).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
