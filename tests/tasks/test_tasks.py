"""What is read, refused, tokenized, loaded and minimized for a task."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import zstandard
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizer,
)
from words import task_of, tiny

from opfa.errors import DataError, ModelError
from opfa.tasks import beginnings, features
from opfa.tasks import examples as reading
from opfa.tasks import kinds as tasks
from opfa.tasks.classes import of_model
from opfa.tasks.recipe import Task

GOOD, BAD, FILM = 5, 6, 7


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(task: Task, split: str) -> reading.Examples:
    return reading.read(task, split, tasks.KINDS[task.kind].check)


def classification(tmp_path: Path, *labels: Any, **values: Any) -> Task:
    rows = [{"sentence": "good film", "label": label} for label in labels]
    path = write(tmp_path / "data.jsonl", *rows)
    return task_of(train=path, validation=path, **values)


def question(**values: Any) -> dict[str, Any]:
    row = {
        "question": "who won ?",
        "context": "rome beat paris . in may paris beat rome .",
        "answers": {"text": ["paris"], "answer_start": [25]},
    }
    return row | values


def answering(tmp_path: Path, *rows: Any, **values: Any) -> Task:
    path = write(tmp_path / "questions.jsonl", *rows)
    options = {"sequence_tokens": 12, "stride_tokens": 2} | values
    return task_of(
        kind="question-answering",
        train=path,
        validation=path,
        text="question",
        text_pair="context",
        label="answers",
        metrics=("exact_match",),
        **options,
    )


# reading


JSONL = '{"sentence": "good", "label": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL.encode()),
        ("a.json", JSONL.encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
        ("a.jsonl.zst", zstandard.compress(JSONL.encode())),
        ("a.csv", b'label,sentence\n1,"good"\n'),
        ("a.tsv", b"label\tsentence\n1\tgood\n"),
    ],
)
def test_every_format_gives_the_same_example(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    examples = read(task_of(), str(tmp_path / name))
    assert (examples.texts, examples.labels) == (["good"], ["1"])


def test_parquet_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"sentence": ["bad", "good"], "label": [0, 1]}
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    examples = read(task_of(), path)
    assert (examples.names, examples.labels) == (("no", "yes"), ["no", "yes"])


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"good\t1\nfilm"\t0\n')
    assert read(task_of(), str(tmp_path / "a.tsv")).texts == ['"good', 'film"']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: is empty"),
        ("a.csv", "sentence,label\n", "a.csv: has a header but no rows"),
        ("a.jsonl", JSONL + "{oops\n", "a.jsonl, line 2: malformed JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: not a JSON object"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n',
            "line 1: no column 'sentence' .task.text.; there are 'text'",
        ),
        ("a.jsonl", JSONL + '{"sentence": " ", "label": 1}', "line 2: 'sentence' is empty"),
        ("a.jsonl", '{"sentence": 3, "label": 1}', r"'sentence' is not a text \(got 3\)"),
        ("a.jsonl", '{"sentence": "x", "label": null}', "line 1: 'label' is missing"),
        ("a.jsonl", '{"sentence": "x", "label": 0.5}', r"nor an integer \(got 0.5\)"),
        ("a.csv", "sentence,label\ngood,\n", "line 2: 'label' is empty"),
        (
            "a.csv",
            "text,label\ngood,1\n",
            r"a.csv, header: no column 'sentence' \(task.text\); there",
        ),
        ("a.csv", "sentence;label\ngood;1\n", "are the columns separated by ';'[?]"),
        ("a.csv", "sentence;label\nso, so;1\n", "line 2: 2 values.* has 1; are the.* by ';'[?]"),
        ("a.csv", "sentence,label\ngood\n", "line 2: 1 value, and the header has 2"),
        (
            "a.csv",
            'sentence,label\n"good,1\n',
            "a.csv, line 2: can't be read: unexpected end of data",
        ),
        ("a.doc", "good\n", "known are .jsonl"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz: can't be read: Not a gzipped file"),
        ("a.jsonl.zst", "not zstandard", "a.jsonl.zst: can't be read: "),
        ("a.parquet", "not parquet", "a.parquet: can't be read: "),
    ],
)
def test_a_bad_file_is_one_message(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(task_of(), str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        read(task_of(), "nowhere.jsonl")


def test_an_unreachable_hub_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing \[train\]: can't be read: Couldn't reach"):
        read(task_of(hub="nobody/nothing"), "train")


def test_a_pair_may_have_one_empty_half(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"sentence": "good", "other": "", "label": 0})
    assert read(task_of(text_pair="other"), path).pairs == [""]


def test_a_pair_of_empty_halves_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"sentence": "", "other": "", "label": 0})
    with pytest.raises(DataError, match="line 1: 'sentence' and 'other' are both empty"):
        read(task_of(text_pair="other"), path)


@pytest.mark.parametrize("label", ["high", math.nan, math.inf, [1]])
def test_a_label_of_a_regression_is_a_finite_number(tmp_path: Path, label: Any) -> None:
    task = classification(tmp_path, label, kind="regression", metrics=("pearson",))
    with pytest.raises(DataError, match="line 1: 'label' is not a finite number"):
        read(task, task.train)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("paris", "must be {'text'"),
        ({"text": [], "answer_start": []}, "at least one answer; task.has_un"),
        ({"text": ["paris"], "answer_start": [1, 2]}, "must be {'text'"),
        ({"text": ["paris"], "answer_start": ["25"]}, "must hold texts and positions"),
    ],
)
def test_malformed_answers_are_refused(tmp_path: Path, answers: Any, message: str) -> None:
    task = answering(tmp_path, question(), question(answers=answers))
    with pytest.raises(DataError, match=f"questions.jsonl, line 2: 'answers' .*{message}"):
        read(task, task.train)


def test_answers_outside_their_contexts_are_counted(tmp_path: Path) -> None:
    wrong = {"text": ["paris"], "answer_start": [24]}
    rows = question(), question(answers=wrong, id="q7"), question(answers=wrong)
    task = answering(tmp_path, *rows)
    with pytest.raises(DataError) as caught:
        read(task, task.train)
    assert str(caught.value) == (
        f"{task.train}: 2 of 3 examples have an answer that is not in the context; the first: "
        "line 2, id q7: 'answers' says 'paris', which is not at character 24 of the context"
    )


@pytest.mark.parametrize(
    ("context", "answer", "start"),
    [
        ("in paris it was", " paris", 2),
        ("in paris it was", "paris ", 3),
        ("in \u00a0paris\t it", "\u00a0paris\t ", 3),
    ],
)
def test_blanks_at_the_ends_of_an_answer_do_not_move_its_span(
    tmp_path: Path, tokenizer: BertTokenizer, context: str, answer: str, start: int
) -> None:
    answers = {"text": [answer], "answer_start": [start]}
    train = tasks.load(
        answering(tmp_path, question(context=context, answers=answers)), tokenizer, tiny()
    ).train
    ids = train.features["input_ids"][0]
    first, last = (train.features[f"{end}_positions"][0] for end in ("start", "end"))
    said = str(tokenizer.decode(ids[first : last + 1]))
    assert said.replace(" ", "").replace("##", "") == "paris"
    assert train.examples.labels == [{"text": ["paris"], "answer_start": [context.index("paris")]}]


def test_an_answer_of_blanks_alone_is_refused(tmp_path: Path) -> None:
    task = answering(tmp_path, question(answers={"text": ["  "], "answer_start": [2]}))
    with pytest.raises(DataError, match="line 1: 'answers' must hold texts and positions"):
        read(task, task.train)


def test_a_question_needs_a_context(tmp_path: Path) -> None:
    task = answering(tmp_path, question(context=""))
    with pytest.raises(DataError, match="line 1: 'context' is empty"):
        read(task, task.train)


def test_the_digest_is_of_the_examples_and_not_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,label\ngood,1\n")
    (tmp_path / "b.jsonl").write_text(JSONL)
    (tmp_path / "c.jsonl").write_text(JSONL.replace("good", "bad"))
    a, b, c = (read(task_of(), str(tmp_path / n)).sha256() for n in ("a.csv", "b.jsonl", "c.jsonl"))
    assert a == b != c


# classes


def test_inferred_numbers_are_sorted_as_numbers(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    train = tasks.load(classification(tmp_path, 10, 9, 10), tokenizer, tiny()).train
    assert train.classes == ("9", "10")
    assert train.features["labels"][:] == [1, 0, 1]


def test_inferred_names_are_sorted(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    train = tasks.load(classification(tmp_path, "yes", "no"), tokenizer, tiny()).train
    assert train.classes == ("no", "yes")


def test_a_number_is_a_position_among_named_classes(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = classification(tmp_path, 1, "bad", 0, classes=("bad", "good"))
    train = tasks.load(task, tokenizer, tiny()).train
    assert train.features["labels"][:] == [1, 0, 0]


def test_a_number_is_a_name_where_classes_are_numbers(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = classification(tmp_path, 1, 2, classes=("2", "1"))
    train = tasks.load(task, tokenizer, tiny()).train
    assert train.features["labels"][:] == [1, 0]


@pytest.mark.parametrize("label", [2, -1, "fine"])
def test_a_label_outside_the_classes_is_refused(
    tmp_path: Path, tokenizer: BertTokenizer, label: Any
) -> None:
    task = classification(tmp_path, 0, label, classes=("bad", "good"))
    message = f"data.jsonl, line 2: class '{label}' is not one of 'bad', 'good'"
    with pytest.raises(DataError, match=message):
        tasks.load(task, tokenizer, tiny())


def test_a_share_of_the_training_examples_is_held_out_the_same_each_time(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    rows = [{"sentence": "good " * (1 + i), "label": str(i % 2)} for i in range(10)]
    path = write(tmp_path / "data.jsonl", *rows)
    task = task_of(train=path, validation=0.3, sequence_tokens=16)
    data = tasks.load(task, tokenizer, tiny())
    train, held = set(data.train.examples.texts), set(data.validation.examples.texts)
    assert (len(train), len(held)) == (7, 3) and train | held == {row["sentence"] for row in rows}
    again = tasks.load_validation(task, tokenizer, tiny())
    assert again.examples.sha256() == data.validation.examples.sha256()
    rest = tasks.load_validation(task, tokenizer, tiny(), is_training=True)
    assert rest.examples.sha256() == data.train.examples.sha256()
    chosen = tasks.load(task, tokenizer, tiny(), holdout=0.3)  # of what is left
    assert set(chosen.validation.examples.texts) == held
    assert set(chosen.selection.examples.texts) < train


def test_a_class_of_held_out_examples_alone_is_one_of_the_classes(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    rows = [{"sentence": "good film", "label": label} for label in "abcdefgh"]
    task = task_of(train=write(tmp_path / "data.jsonl", *rows), validation=0.25)
    assert tasks.load(task, tokenizer, tiny()).validation.classes == tuple("abcdefgh")


def test_a_share_of_nothing_is_refused(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    rows = [{"sentence": "good film", "label": label} for label in "ab"]
    task = task_of(train=write(tmp_path / "data.jsonl", *rows), validation=0.1)
    with pytest.raises(DataError, match=r"task.validation = 0.1 of 2 examples is 0; both parts"):
        tasks.load(task, tokenizer, tiny())


def test_a_missing_file_names_its_key(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task = classification(tmp_path, 0, 1).model_copy(update={"validation": "nowhere.jsonl"})
    with pytest.raises(DataError, match=r"^task.validation: nowhere.jsonl: no such file"):
        tasks.load(task, tokenizer, tiny())


def test_one_class_is_too_few(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    with pytest.raises(DataError, match="two classes are needed, and there is only '0'$"):
        tasks.load(classification(tmp_path, 0, 0), tokenizer, tiny())
    rows = [{"sentence": "good film", "label": "a"}] * 8
    task = task_of(train=write(tmp_path / "data.jsonl", *rows), validation=0.25)
    with pytest.raises(DataError, match=r"data.jsonl: two classes.* only 'a'$"):
        tasks.load(task, tokenizer, tiny())


@pytest.mark.parametrize(
    ("labels", "said", "has_hint"),
    [
        ([*"aaab"] * 5, "15 examples to train on, 5 held out (task.validation = 0.25); 2 classes, "
            "'a', 'b'; the most frequent, 'a', has 75 %", False),
        ([f"{i}.5" for i in range(4)] * 5, "4 classes", True),
        ([f"x{i}" for i in range(20)], "20 classes", True),
    ],
)  # fmt: skip
def test_what_is_learnt_is_said_first_and_numbers_are_noticed(
    labels: list[str],
    said: str,
    has_hint: bool,
    tmp_path: Path,
    tokenizer: BertTokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "opfa")
    rows = [{"sentence": "good film", "label": label} for label in labels]
    tasks.load(
        task_of(train=write(tmp_path / "data.jsonl", *rows), validation=0.25), tokenizer, tiny()
    )
    told = [record.getMessage() for record in caplog.records]
    assert said in told[0]
    assert any("my-scores" in line for line in told) == has_hint


def test_evaluation_takes_the_order_of_the_model(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    config = tiny(id2label={0: "GOOD", 1: "BAD"}, label2id={"GOOD": 0, "BAD": 1})
    task = classification(tmp_path, 0, 1, 1, classes=("bad", "good"))
    validation = tasks.load_validation(task, tokenizer, config)
    assert validation.classes == ("good", "bad")
    assert validation.features["labels"][:] == [1, 0, 0]


def test_a_model_with_unnamed_classes_takes_the_order_of_the_task(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = classification(tmp_path, "bad", "good", classes=("bad", "good"))
    assert tasks.load_validation(task, tokenizer, tiny()).classes == ("bad", "good")


def test_a_model_of_other_classes_is_refused(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    config = tiny(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    task = classification(tmp_path, 0, 1, classes=("bad", "good"))
    with pytest.raises(ModelError, match="classes are cat, dog; the task's are bad, good"):
        tasks.load_validation(task, tokenizer, config)


# features


def test_text_is_cut_at_sequence_tokens(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *({"sentence": "film " * 9, "label": i} for i in (0, 1)))
    task = task_of(train=path, validation=path, sequence_tokens=8)
    train = tasks.load(task, tokenizer, tiny()).train
    assert train.features[0]["input_ids"] == [2, FILM, FILM, FILM, FILM, FILM, FILM, 3]


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    rows = [{"sentence": "good", "label": 0}, {"sentence": "bad film", "label": 1}]
    path = write(tmp_path / "a.jsonl", *rows)
    task = task_of(train=path, validation=path)
    train = tasks.load(task, tokenizer, tiny()).train
    batch = train.collate([train.features[0], train.features[1]])
    assert batch["input_ids"].tolist() == [[2, GOOD, 3, 0], [2, BAD, FILM, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_targets_are_no_inputs() -> None:
    batch = {name: torch.zeros(1) for name in ("input_ids", "labels", "end_positions")}
    assert list(tasks.inputs_of(batch)) == ["input_ids"]


def test_every_example_has_its_features_when_there_are_several_chunks(
    tmp_path: Path, tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 2)
    train = tasks.load(classification(tmp_path, 0, 1, 1, 0, 1), tokenizer, tiny()).train
    assert train.features["labels"][:] == [0, 1, 1, 0, 1]


def test_an_answer_outside_a_window_is_its_cls(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    # 12 tokens: [CLS] who won ? [SEP] + 6 of the context's 10 words + [SEP]; windows share 2 words.
    train = tasks.load(answering(tmp_path, question()), tokenizer, tiny()).train
    windows = [tokenizer.decode(ids[5:-1]) for ids in train.features["input_ids"]]
    assert windows == ["rome beat paris. in may", "in may paris beat rome."]
    assert train.features["start_positions"][:] == [0, 7]
    assert train.features["end_positions"][:] == [0, 7]


def test_an_answer_inside_a_word_is_that_word(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    row = question(answers={"text": ["aris . in m"], "answer_start": [11]})
    train = tasks.load(answering(tmp_path, row), tokenizer, tiny()).train
    assert (train.features["start_positions"][0], train.features["end_positions"][0]) == (7, 10)


def test_windows_know_their_question_when_there_are_several_chunks(
    tmp_path: Path, tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 1)
    validation = tasks.load(
        answering(tmp_path, question(), question()), tokenizer, tiny()
    ).validation
    assert validation.features["example"][:] == [0, 0, 1, 1]


def test_a_question_that_leaves_no_room_is_refused(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = answering(tmp_path, question(), question(question="who won " * 4))
    with pytest.raises(DataError, match="line 2: the question has 8 tokens, too many"):
        tasks.load(task, tokenizer, tiny())


def test_sequences_longer_than_the_positions_are_refused(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = classification(tmp_path, 0, 1).model_copy(update={"sequence_tokens": 33})
    with pytest.raises(ModelError, match="^task.sequence_tokens = 33: this model has only 32 pos"):
        tasks.load(task, tokenizer, tiny())


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    config = tiny()
    config.vocab_size = 5
    with pytest.raises(ModelError, match="the tokenizer has 17 entries"):
        tasks.load(classification(tmp_path, 0, 1), tokenizer, config)


# model and loss


def test_a_new_head_knows_the_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    BertForMaskedLM(tiny()).save_pretrained(tmp_path)
    capfd.readouterr()
    model = tasks.load_model(task_of(), str(tmp_path), ("bad", "good", "fine"))
    assert model.config.id2label == {0: "bad", 1: "good", 2: "fine"}
    assert model.config.label2id == {"bad": 0, "good": 1, "fine": 2}
    assert model.num_labels == 3
    assert capfd.readouterr() == ("", "")  # no load report, no bar


def test_a_regression_has_one_output(tmp_path: Path) -> None:
    BertForMaskedLM(tiny()).save_pretrained(tmp_path)
    task = task_of(kind="regression", metrics=("pearson",))
    assert tasks.load_model(task, str(tmp_path), ()).num_labels == 1


def test_a_model_is_loaded_in_fp32(tmp_path: Path) -> None:
    BertForMaskedLM(tiny()).bfloat16().save_pretrained(tmp_path)
    assert tasks.load_model(task_of(), str(tmp_path), ("a", "b")).dtype == torch.float32


def test_a_head_of_another_task_is_replaced(tmp_path: Path) -> None:
    BertForSequenceClassification(tiny(num_labels=3)).save_pretrained(tmp_path)
    assert tasks.load_model(task_of(), str(tmp_path), ("a", "b")).num_labels == 2


def test_a_trained_model_must_have_its_head(tmp_path: Path) -> None:
    BertForMaskedLM(tiny()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tensors are missing or of another shape"):
        tasks.load_model(task_of(), str(tmp_path), ("a", "b"), is_trained=True)


def test_a_teacher_must_have_the_classes_in_order(tmp_path: Path) -> None:
    config = tiny(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tasks.load_model(task_of(), str(tmp_path), ("a", "b"), is_trained=True)
    with pytest.raises(ModelError, match="its classes are in another order"):
        tasks.load_model(task_of(), str(tmp_path), ("b", "a"), is_trained=True)


def test_a_checkpoint_without_its_encoder_is_refused(tmp_path: Path) -> None:
    model = BertForMaskedLM(tiny())
    state = {k: v for k, v in model.state_dict().items() if "attention.self.query" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"2 tensors are missing .*bert\.encoder.*query"):
        tasks.load_model(task_of(), str(tmp_path), ("a", "b"))


@pytest.mark.parametrize("name", ["missing", "empty", "other"])
def test_a_directory_without_a_model_is_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "other" / "model.safetensors").write_text("no model")
    with pytest.raises(ModelError, match=name) as caught:
        tasks.load_model(task_of(), str(tmp_path / name), ("a", "b"))
    assert len(str(caught.value).splitlines()) == 1


def batch_of(**targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[2, GOOD, 3, 0], [2, BAD, FILM, 3]]), **targets}


def test_the_loss_of_a_classification_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny(num_labels=3)).eval()
    batch = batch_of(labels=torch.tensor([2, 0]))
    outputs = model(**batch)
    torch.testing.assert_close(tasks.task_loss(task_of(), outputs, batch), outputs.loss)


def test_the_loss_of_a_regression_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny(num_labels=1, problem_type="regression")).eval()
    batch = batch_of(labels=torch.tensor([2.5, -1.0]))
    outputs = model(**batch)
    task = task_of(kind="regression", metrics=("pearson",))
    torch.testing.assert_close(tasks.task_loss(task, outputs, batch), outputs.loss)


def test_the_loss_of_question_answering_is_that_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny()).eval()
    batch = batch_of(start_positions=torch.tensor([1, 0]), end_positions=torch.tensor([1, 2]))
    outputs = model(**batch)
    loss = tasks.task_loss(answering(tmp_path, question()), outputs, batch)
    torch.testing.assert_close(loss, outputs.loss)


def test_padding_takes_no_part_in_the_loss_of_question_answering(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny()).eval()
    targets = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 2])}
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = batch_of(attention_mask=mask, **targets)
    task = answering(tmp_path, question())
    alone = []
    for row, length in ((0, 3), (1, 4)):
        short = {
            name: tensor[row : row + 1, :length]
            for name, tensor in batch.items()
            if tensor.ndim > 1
        }
        short |= {name: tensor[row : row + 1] for name, tensor in targets.items()}
        outputs = model(**tasks.inputs_of(short))
        alone.append(tasks.task_loss(task, outputs, short))
    loss = tasks.task_loss(task, model(**tasks.inputs_of(batch)), batch)
    torch.testing.assert_close(loss, sum(alone) / torch.tensor(2.0))


def test_every_number_is_a_target() -> None:
    assert tasks.num_targets(batch_of(labels=torch.tensor([-100.0, 2.0]))) == 2
    assert tasks.num_targets(batch_of(labels=torch.tensor([-100, 2]))) == 1


@pytest.mark.parametrize(("kind", "outputs"), [("classification", 1), ("regression", 2)])
def test_a_head_of_another_size_is_not_evaluated(kind: str, outputs: int) -> None:
    config = tiny(num_labels=outputs, architectures=["BertForSequenceClassification"])
    metrics = ("accuracy",) if kind == "classification" else ("pearson",)
    task = Task.model_validate_json(json.dumps({"kind": kind, "metrics": metrics}))
    with pytest.raises(
        ModelError, match=f"task.kind = '{kind}': needs .*, and this model has {outputs} "
    ):
        tasks.check_head(task, config)


def test_f1_of_two_named_classes_needs_their_order(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = classification(tmp_path, "yes", "no", metrics=("f1",))
    with pytest.raises(DataError, match=r"say which one that is, task.classes = \['no', 'yes'\]"):
        tasks.load(task, tokenizer, tiny())
    stated = classification(tmp_path, "yes", "no", metrics=("f1",), classes=("no", "yes"))
    assert tasks.load(stated, tokenizer, tiny()).train.classes == ("no", "yes")


def test_a_tokenizer_that_does_not_know_the_language_is_told(
    tmp_path: Path, tokenizer: BertTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", *({"sentence": "quel film", "label": i} for i in (0, 1)))
    tasks.load(task_of(train=path, validation=path), tokenizer, tiny())
    assert "the tokenizer doesn't know 25 % of it" in caplog.text  # 1 of [CLS] quel film [SEP]


def test_the_loss_is_fp32_also_from_bf16_logits() -> None:
    outputs = {"logits": torch.zeros(2, 4, dtype=torch.bfloat16)}
    loss = tasks.task_loss(task_of(), outputs, {"labels": torch.tensor([0, 3])})
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)


# classes


@pytest.mark.parametrize("classes", [("US", "us"), ("us", "US", "Us")])
def test_classes_that_differ_in_case_alone_keep_their_places(classes: tuple[str, ...]) -> None:
    config = tiny(id2label=dict(enumerate(classes)))
    assert of_model(config, tuple(reversed(classes))) == classes
    assert of_model(config, ()) == classes


def test_names_are_compared_without_case_only_where_they_are_not_the_same() -> None:
    config = tiny(id2label={0: "US", 1: "us", 2: "Mexico"})
    assert of_model(config, ("mexico", "us", "US")) == ("US", "us", "mexico")
    with pytest.raises(ModelError, match="the model's classes are US, us, Mexico; the task's are"):
        of_model(config, ("Us", "uS", "Mexico"))


def test_blanks_at_the_ends_of_a_class_do_not_make_another_one(tmp_path: Path) -> None:
    task = classification(tmp_path, "pos", "pos ", "\tneg", "neg\xa0")
    assert read(task, task.train).labels == ["pos", "pos", "neg", "neg"]
    assert of_model(tiny(id2label={0: "pos ", 1: "neg"}), ("neg", "pos")) == ("pos", "neg")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "b", "a"), "classes: 'a' stands twice"),
        (("a", "a "), "classes: 'a ' is empty, or has blanks at its ends"),
        (("a", ""), "classes: '' is empty"),
    ],
)
def test_a_class_of_a_recipe_stands_once_and_without_blanks(classes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(classes=classes)


def test_a_class_that_a_data_set_or_a_model_names_twice_is_refused(tmp_path: Path) -> None:
    names = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "a "])}
    )
    rows = {"sentence": ["bad"], "label": [0]}
    datasets.Dataset.from_dict(rows, features=names).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="class 'a' stands twice among its classes' names"):
        read(task_of(), str(tmp_path / "a.parquet"))
    with pytest.raises(ModelError, match="the model's class 'a' stands twice"):
        of_model(tiny(id2label={0: "a", 1: "a"}), ())


def tagging(tmp_path: Path, *tags: Any, **values: Any) -> Task:
    rows = [{"words": ["good"] * len(tags), "tags": list(tags)}] * 2
    path = write(tmp_path / "tags.jsonl", *rows)
    options = {"metrics": ("entity_f1",)} | values
    kind = "token-classification"
    return task_of(kind=kind, train=path, validation=path, text="words", label="tags", **options)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([0, 1, 2], r"and there is '\d'; say their names in order, such as task.classes"),
        (["O", "1"], "and there is '1'; say their names"),
        (["O", "PER"], r"and there is 'PER'; other tags are measured by task.metrics = \["),
        (["PER-B", "O"], "and there is 'PER-B'"),
    ],
)
def test_entity_metrics_need_tags_that_tell_entities(
    tmp_path: Path, tokenizer: BertTokenizer, tags: list[Any], message: str
) -> None:
    task = tagging(tmp_path, *tags)
    with pytest.raises(DataError, match=f"tags.jsonl: entity_f1 needs .* {message}"):
        tasks.load(task, tokenizer, tiny())
    tasks.load(tagging(tmp_path, *tags, metrics=("accuracy",)), tokenizer, tiny())


@pytest.mark.parametrize("tags", [["O", "B-PER", "I-PER"], ["S-A", "O"], ["U", "O"], ["I_A", "O"]])
def test_tags_of_entities_may_be_written_in_several_ways(
    tmp_path: Path, tokenizer: BertTokenizer, tags: list[str]
) -> None:
    tasks.load(tagging(tmp_path, *tags), tokenizer, tiny())


def test_numbered_tags_with_stated_names_have_entities(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = tagging(tmp_path, 0, 1, 2, classes=("O", "B-PER", "I-PER"))
    assert tasks.load(task, tokenizer, tiny()).train.examples.labels[0] == ["O", "B-PER", "I-PER"]


# long texts


def spied(monkeypatch: pytest.MonkeyPatch, tokenizer: BertTokenizer) -> list[int]:
    """The number of characters that the tokenizer sees at once, at every call."""
    seen: list[int] = []
    encode = type(tokenizer)._encode_plus

    def counted(self: Any, text: Any, text_pair: Any = None, **options: Any) -> Any:
        seen.append(len(str(text)) + len(str(text_pair)))
        return encode(self, text=text, text_pair=text_pair, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counted)
    return seen


@pytest.mark.parametrize("text", ["good bad film " * 10_000, "good " + "x" * 90 + " bad " * 20_000])
def test_a_long_text_is_cut_before_the_tokenizer_sees_it(
    tmp_path: Path, tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    pairs: list[tuple[str, str | None]] = [(text, None), ("bad", text)]
    whole = [tokenizer(*pair, truncation=True, max_length=16) for pair in pairs]
    rows = [{"sentence": text, "other": "bad", "label": label} for label in "ab"]
    path = write(tmp_path / "a.jsonl", *rows)
    seen = spied(monkeypatch, tokenizer)
    one = tasks.load(task_of(train=path, validation=path), tokenizer, tiny())
    options = {"text": "other", "text_pair": "sentence"}
    two = tasks.load(task_of(train=path, validation=path, **options), tokenizer, tiny())
    for loaded, encoded in zip((one, two), whole, strict=True):
        assert loaded.train.features["input_ids"][0] == encoded["input_ids"]
    assert seen
    assert max(seen) < 100_000


@pytest.mark.parametrize("blank", [" ", "\u200b", "x" * 70_000 + " "])
def test_a_beginning_grows_until_it_has_tokens_enough(tokenizer: BertTokenizer, blank: str) -> None:
    text = blank * (140_000 // len(blank)) + "good film " * 1_000
    cut = beginnings.of_text(tokenizer, text, 16)
    options = {"truncation": True, "max_length": 16}
    assert tokenizer(cut, **options)["input_ids"] == tokenizer(text, **options)["input_ids"]
    assert text.startswith(cut)


def test_many_words_are_cut_before_the_tokenizer_sees_them(
    tmp_path: Path, tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = ["B-A", "O"] * 5_000
    task = tagging(tmp_path, *tags)
    seen = spied(monkeypatch, tokenizer)
    loaded = tasks.load(task, tokenizer, tiny())
    assert loaded.train.features["labels"][0] == [-100, *[0, 1] * 7, -100]
    assert loaded.train.examples.labels[0] == tags
    assert max(seen) < 10_000


def test_a_split_that_takes_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 1_000)
    task = classification(tmp_path, *["a"] * 20)
    with pytest.raises(DataError, match=r"line \d+: the examples up to here take more than 1,000"):
        read(task, task.train)


def test_a_context_of_too_many_characters_is_refused(tmp_path: Path) -> None:
    task = answering(tmp_path, question(context="rome beat paris " * 70_000))
    with pytest.raises(DataError, match="'context' has 1,120,000 characters; windows are made of"):
        read(task, task.train)
