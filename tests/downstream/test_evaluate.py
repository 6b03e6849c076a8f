"""What a model's outputs are worth, by the definitions of SQuAD and of the GLUE tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizer
from words import task_of, tiny

from opfa.downstream import evaluate
from opfa.tasks import kinds as tasks
from opfa.tasks import squad
from opfa.tasks.examples import Examples
from opfa.tasks.recipe import Task
from opfa.tasks.rows import Rows


def split_of(labels: list[Any], classes: tuple[str, ...] = ()) -> tasks.Split:
    """A split as far as scores of labels need it."""
    examples = Examples(source="here", places=[], texts=[], pairs=None, labels=labels, names=())
    return tasks.Split(
        features=Rows.of([{"labels": labels}]),
        examples=examples,
        classes=classes,
        collate=lambda rows: {},
    )


def classified(metric: str, indices: list[int], labels: list[int], num_classes: int) -> float:
    task = Task.model_validate_json(json.dumps({"metrics": [metric]}))
    logits = torch.nn.functional.one_hot(torch.tensor(indices), num_classes).float()
    split = split_of(labels, tuple("abc"[:num_classes]))
    return evaluate.score(task, (logits,), split)[metric]


def test_accuracy() -> None:
    assert classified("accuracy", [0, 1, 1, 1], [0, 1, 0, 1], 2) == 0.75


def test_f1_of_two_classes_is_that_of_class_one() -> None:
    # 2 hits, 1 false alarm, 0 misses: 2 * 2 / (2 * 2 + 1)
    assert classified("f1", [0, 1, 1, 1], [0, 1, 0, 1], 2) == pytest.approx(0.8)


@pytest.mark.parametrize("names", [("no", "yes"), ("yes", "no")])
def test_f1_is_of_the_second_class_of_the_task_whatever_the_models_order(
    tmp_path: Path, tokenizer: BertTokenizer, names: tuple[str, str]
) -> None:
    rows = [{"sentence": "good film", "label": label} for label in ("no", "yes", "no", "yes")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(validation=str(path), classes=("no", "yes"), metrics=("f1",))
    split = tasks.load_validation(task, tokenizer, tiny(id2label=dict(enumerate(names))))
    assert split.classes == names
    answers = torch.tensor([names.index(name) for name in ("no", "yes", "yes", "yes")])
    logits = torch.nn.functional.one_hot(answers, 2).float()
    # of "yes": 2 hits, 1 false alarm, 0 misses; of "no" it would be 2 / 3
    assert evaluate.score(task, (logits,), split) == {"f1": pytest.approx(0.8)}


def test_f1_of_three_classes_is_the_mean_over_all_classes() -> None:
    # class 0: 1; class 1: 2 / 3; class 2, never right: 0
    expected = (1 + 2 / 3 + 0) / 3
    assert classified("f1", [0, 1, 1], [0, 1, 2], 3) == pytest.approx(expected)


def test_matthews() -> None:
    # hits 2, correct rejections 1, false alarms 1, misses 0: (2*1 - 1*0) / sqrt(3 * 2 * 2 * 1)
    expected = 2 / 12**0.5
    assert classified("matthews", [0, 1, 1, 1], [0, 1, 0, 1], 2) == pytest.approx(expected)


def correlation(values: list[float], labels: list[float]) -> dict[str, float]:
    task = task_of(kind="regression", metrics=("spearman", "pearson"))
    return evaluate.score(task, (torch.tensor(values)[:, None],), split_of(labels))


def test_correlations_come_in_the_order_of_the_recipe() -> None:
    # means 2 and 3; covariance sum 6, variance sums 2 and 24
    scores = correlation([1.0, 2.0, 3.0], [1.0, 1.0, 7.0])
    assert list(scores) == ["spearman", "pearson"]
    assert scores["pearson"] == pytest.approx(6 / (2 * 24) ** 0.5)


def test_spearman_sees_ranks_only() -> None:
    assert correlation([1.0, 2.0, 30.0], [0.0, 0.1, 0.2])["spearman"] == pytest.approx(1.0)


def test_correlation_with_a_constant_is_zero() -> None:
    assert correlation([1.0, 1.0], [0.0, 1.0]) == {"spearman": 0.0, "pearson": 0.0}


# SQuAD's definitions


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("an apple, a pear", "apple pear"),
        ("U.S.", "us"),
        ("Athens", "athens"),  # the article inside a word stays
        ("the-rapist", "therapist"),  # punctuation goes before articles
        ("a", ""),
        ("café’s", "café’s"),  # only ASCII punctuation goes
    ],
)
def test_normal_form(answer: str, normal: str) -> None:
    assert squad.normalize(answer) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("the Rome.", "rome", 1.0, 1.0),
        ("in Rome", "Rome", 0.0, 2 / 3),  # precision 1/2, recall 1
        ("rome rome", "rome", 0.0, 2 / 3),  # a word counts as often as it is there
        ("", "rome", 0.0, 0.0),
        ("the", "a", 1.0, 0.0),  # as the official script: equal, and no common word
        ("paris", "rome", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(prediction: str, answer: str, exact: float, f1: float) -> None:
    assert squad.exact_match(prediction, answer) == exact
    assert squad.squad_f1(prediction, answer) == pytest.approx(f1)


# decoding: [CLS] who won ? [SEP] + 6 of 10 words + [SEP]; the two windows share "in may"


CONTEXT = "Rome beat Paris . in May Paris beat Rome ."


def answering(
    tmp_path: Path, tokenizer: BertTokenizer, *answers: str, **values: Any
) -> tuple[Task, tasks.Split]:
    starts = [CONTEXT.index(answer) for answer in answers]
    golds = {"text": answers, "answer_start": starts}
    row = {"question": "who won ?", "context": CONTEXT, "answers": golds}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    task = task_of(
        kind="question-answering",
        validation=str(tmp_path / "a.jsonl"),
        text="question",
        text_pair="context",
        label="answers",
        metrics=("exact_match", "squad_f1"),
        sequence_tokens=12,
        stride_tokens=2,
        **values,
    )
    return task, tasks.load_validation(task, tokenizer, tiny())


def peaks(*places: tuple[int, int, float]) -> torch.Tensor:
    """Logits of two windows, zero but for (window, token, value)."""
    logits_WT = torch.zeros(2, 12)  # noqa: N806
    for window, token, value in places:
        logits_WT[window, token] = value
    return logits_WT


def test_the_best_span_over_all_windows_is_the_answer(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome")
    starts, ends = peaks((0, 5, 2.0), (1, 6, 3.0)), peaks((0, 5, 2.0), (1, 7, 3.0))
    assert squad.decode(task, (starts, ends), split)[0] == ["May Paris"]


def test_the_first_window_wins_where_it_is_better(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome")
    starts, ends = peaks((0, 5, 4.0), (1, 6, 3.0)), peaks((0, 7, 4.0), (1, 7, 3.0))
    assert squad.decode(task, (starts, ends), split)[0] == ["Rome beat Paris"]


def test_the_question_is_no_answer(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome")
    starts, ends = peaks((0, 1, 9.0), (0, 5, 1.0)), peaks((0, 2, 9.0), (0, 5, 1.0))
    assert squad.decode(task, (starts, ends), split)[0] == ["Rome"]


def test_an_answer_does_not_end_before_it_starts(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome")
    starts, ends = peaks((0, 7, 5.0), (0, 6, 4.0)), peaks((0, 6, 5.0))
    assert squad.decode(task, (starts, ends), split)[0] == ["beat"]


def test_an_answer_has_at_most_answer_tokens(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome", answer_tokens=2)
    starts, ends = peaks((0, 5, 5.0)), peaks((0, 7, 5.0), (0, 6, 4.0))
    assert squad.decode(task, (starts, ends), split)[0] == ["Rome beat"]


def test_no_possible_span_among_the_n_best_is_no_answer(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome", n_best=1)
    starts = peaks((0, 0, 5.0), (1, 0, 5.0))
    assert squad.decode(task, (starts, starts), split)[0] == [""]
    assert evaluate.score(task, (starts, starts), split) == {"exact_match": 0.0, "squad_f1": 0.0}


def test_what_is_padded_is_not_among_the_n_best(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "Rome", n_best=1)
    starts, ends = peaks((0, 5, 4.0), (1, 6, 3.0)), peaks((0, 7, 4.0), (1, 7, 3.0))
    padded = [torch.nn.functional.pad(logits, (0, 3), value=9.0) for logits in (starts, ends)]
    assert squad.decode(task, (padded[0], padded[1]), split)[0] == ["Rome beat Paris"]


def test_the_best_of_several_answers_counts(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "May", "Rome beat Paris", "beat Paris")
    logits = peaks((0, 6, 9.0)), peaks((0, 7, 9.0))
    assert evaluate.score(task, logits, split) == {"exact_match": 100.0, "squad_f1": 100.0}


def test_gold_positions_give_full_marks(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task, split = answering(tmp_path, tokenizer, "beat Rome")  # in the second window only
    places = split.features["start_positions"][:], split.features["end_positions"][:]
    logits = [torch.nn.functional.one_hot(torch.tensor(p), 12).float() for p in places]
    assert evaluate.score(task, (logits[0], logits[1]), split)["exact_match"] == 100.0


# prediction


def pairs(tmp_path: Path) -> Task:
    rows = [{"sentence": "film " * n, "label": n % 2} for n in (1, 4, 2, 5, 3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = str(tmp_path / "a.jsonl")
    return task_of(train=path, validation=path)


def test_predictions_keep_the_order_of_the_examples(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny()).eval()
    split = tasks.load_validation(pairs(tmp_path), tokenizer, tiny())
    (logits,) = evaluate.predict(model, task_of(), split, batch=2, device="cpu")
    for index, tokens in enumerate(split.features["input_ids"]):
        torch.testing.assert_close(logits[index], model(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_left_in_its_mode(
    tmp_path: Path, tokenizer: BertTokenizer, is_training: bool
) -> None:
    model = BertForSequenceClassification(tiny()).train(is_training)
    split = tasks.load_validation(pairs(tmp_path), tokenizer, tiny())
    evaluate.predict(model, task_of(), split, batch=2, device="cpu")
    assert model.training is is_training


def test_windows_of_several_lengths_make_one_tensor(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    class Lengths(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"start_logits": input_ids.float(), "end_logits": -input_ids.float()}

    task, split = answering(tmp_path, tokenizer, "Rome")
    short = task.model_copy(update={"stride_tokens": 1})  # windows of 6 and 5 words
    split = tasks.load_validation(short, tokenizer, tiny())
    starts, ends = evaluate.predict(Lengths(), short, split, batch=1, device="cpu")
    assert starts.shape == ends.shape == (2, 12)
    assert torch.isneginf(starts[1]).tolist() == [False] * 11 + [True]
    assert torch.isneginf(ends[1]).tolist() == [False] * 11 + [True]


def test_evaluation_is_the_score_of_the_predictions(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny())
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 1.0])  # always class 1: right for 1, 5, 3 words
    split = tasks.load_validation(pairs(tmp_path), tokenizer, tiny())
    scores = evaluate.evaluate(model, task_of(), split, batch=2, device="cpu")
    assert scores == {"accuracy": 0.6}
