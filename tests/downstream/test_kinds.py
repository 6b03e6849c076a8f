"""Tagged words, multiple choice, questions without an answer, held-out examples: from a file to a
score, against answers written out and the references' own libraries.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import finetune_recipe, pretrain_recipe
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import opfa
from opfa.compression.pattern import ENCODER_LAYER
from opfa.downstream import evaluate
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.errors import DataError, ModelError
from opfa.tasks import kinds as tasks
from opfa.tasks import squad
from opfa.tasks.features import NO_LABEL
from opfa.tasks.recipe import Task
from opfa.tasks.rows import Rows
from opfa.upstream.pretrain import pretrain

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rome", "par", "##is", "beat", "who", "won"]
ROME, PAR, IS, BEAT = 5, 6, 7, 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer.from_pretrained(directory)


CONFIG = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(task: Task, tokenizer: PreTrainedTokenizerBase) -> tasks.Data:
    return tasks.load(task, tokenizer, CONFIG)


# tagged words


def tagging(path: str, **values: Any) -> Task:
    options = {"kind": "token-classification", "text": "tokens", "label": "tags"}
    metrics = ["entity_f1", "entity_precision", "entity_recall", "accuracy"]
    options |= {"train": path, "validation": path, "metrics": metrics, "sequence_tokens": 16}
    return Task.model_validate_json(json.dumps(options | values))


TAGGED = {"tokens": ["paris", "beat", "rome"], "tags": ["B-CITY", "O", "B-CITY"]}


def test_a_tag_stands_on_the_first_token_of_its_word(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    train = load(tagging(write(tmp_path / "a.jsonl", TAGGED)), tokenizer).train
    assert train.classes == ("B-CITY", "O")
    assert train.features[0]["input_ids"] == [2, PAR, IS, BEAT, ROME, 3]
    assert train.features[0]["labels"] == [NO_LABEL, 0, NO_LABEL, 1, 0, NO_LABEL]


TEXT = "paris beat rome who won"  # its words, with the blank before them, become tokens
BLANKS = {
    "RoBERTa": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "SentencePiece": pre_tokenizers.Metaspace(),
}


def with_blanks(splitter: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that tells a word's beginning by the blank before it."""
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = splitter
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    byte_pairs.train_from_iterator([f"{TEXT} {TEXT}"] * 2, trainer)
    byte_pairs.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=byte_pairs, pad_token="<pad>")


@pytest.mark.parametrize("name", BLANKS)
def test_tagged_words_are_tokens_as_in_running_text(tmp_path: Path, name: str) -> None:
    tokenizer = with_blanks(BLANKS[name])
    path = write(tmp_path / "a.jsonl", {"tokens": TEXT.split(), "tags": ["A", "B", "A", "B", "A"]})
    data = tasks.load(tagging(path), tokenizer, BertConfig(vocab_size=400))
    row = data.validation.features[0]
    assert row["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert [label for label in row["labels"] if label != NO_LABEL] == [0, 1, 0, 1, 0]
    assert row["words"] == [0, 1, 2, 3, 4]


def test_tags_are_padded_with_what_the_loss_ignores(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    short = {"tokens": ["rome"], "tags": ["B-CITY"]}
    train = load(tagging(write(tmp_path / "a.jsonl", TAGGED, short)), tokenizer).train
    batch = train.collate([train.features[0], train.features[1]])
    assert batch["labels"][1].tolist() == [NO_LABEL, 0] + [NO_LABEL] * 4
    assert batch["input_ids"][1].tolist() == [2, ROME, 3, 0, 0, 0]
    assert tasks.num_targets(batch) == 4
    logits = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    chosen = logits.log_softmax(-1)[[0, 0, 0, 1], [1, 3, 4, 1], [0, 1, 0, 0]]
    loss = tasks.task_loss(tagging("x"), {"logits": logits}, batch)
    torch.testing.assert_close(loss, -chosen.mean())


CONLL = "-DOCSTART- -X- O\n\nparis NNP B-CITY\nbeat VB O\nrome NNP B-CITY\n\n\nrome NNP B-CITY"


@pytest.mark.parametrize("form", ["jsonl", "conll", "parquet", "positions"])
def test_every_form_of_tags_gives_the_same_examples(
    tmp_path: Path, tokenizer: BertTokenizer, form: str
) -> None:
    rows = [TAGGED, {"tokens": ["rome"], "tags": ["B-CITY"]}]
    numbers = [{**row, "tags": [int(tag == "O") for tag in row["tags"]]} for row in rows]
    path, classes = str(tmp_path / f"a.{form}"), []
    if form == "jsonl":
        write(Path(path), *rows)
    elif form == "conll":
        Path(path).write_text(CONLL)
    elif form == "positions":
        path, classes = write(tmp_path / "b.jsonl", *numbers), ["B-CITY", "O"]
    else:
        tags = List(ClassLabel(names=["B-CITY", "O"]))
        features = Features({"tokens": List(Value("string")), "tags": tags})
        Dataset.from_list(numbers, features=features).to_parquet(path)
    data = load(tagging(path, classes=classes), tokenizer)
    assert data.train.classes == ("B-CITY", "O")
    assert data.validation.examples.texts == [row["tokens"] for row in rows]
    assert data.validation.examples.labels == [row["tags"] for row in rows]


def test_a_data_set_of_the_hubs_form_brings_its_classes(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    tags = List(ClassLabel(names=["B-CITY", "O", "I-CITY"]))
    features = Features({"tokens": List(Value("string")), "tags": tags})
    rows = [{"tokens": ["paris", "beat"], "tags": [0, 1]}]
    for name in ("train", "validation"):
        path = tmp_path / "cities/data" / f"{name}-00000.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
    task = tagging("train", hub=str(tmp_path / "cities"), validation="validation")
    data = load(task, tokenizer)
    assert data.train.classes == ("B-CITY", "O", "I-CITY")
    assert data.validation.examples.labels == [["B-CITY", "O"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "paris", "tags": ["O"]}, "'tokens' is not a list"),
        ({"tokens": [], "tags": []}, "'tokens' is not a list, or an empty one"),
        ({"tokens": ["rome", ""], "tags": ["O", "O"]}, "a word that is no text or empty"),
        ({"tokens": ["rome"], "tags": ["O", "O"]}, "1 words in 'tokens', 2 tags in 'tags'"),
        ({"tokens": ["rome"], "tags": [None]}, "neither a name nor an integer"),
    ],
)
def test_malformed_tags_are_refused(
    tmp_path: Path, tokenizer: BertTokenizer, row: Any, message: str
) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, line 2: .*{message}"):
        load(tagging(write(tmp_path / "a.jsonl", TAGGED, row)), tokenizer)


def test_a_tag_that_training_never_saw_is_named(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    seen = write(tmp_path / "a.jsonl", TAGGED)
    unseen = write(tmp_path / "b.jsonl", TAGGED, {"tokens": ["rome"], "tags": ["B-TEAM"]})
    task = tagging(seen).model_copy(update={"validation": unseen})
    with pytest.raises(
        DataError, match="line 2: class 'B-TEAM' is not one of 'B-CITY', 'O' .the training ex"
    ):
        load(task, tokenizer)


def test_a_word_without_a_tag_in_a_conll_file_is_named(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    (tmp_path / "a.conll").write_text(CONLL + "\nbeat\n")
    with pytest.raises(DataError, match="a.conll, line 9: a word without a tag: 'beat'"):
        load(tagging(str(tmp_path / "a.conll")), tokenizer)


def test_entities_are_scored_whole_and_lost_words_count_as_outside(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    # \x00 has no token; with 8 tokens the last word of the second sentence is cut off
    rows = [
        {"tokens": ["paris", "\x00", "rome"], "tags": ["B-CITY", "I-CITY", "B-CITY"]},
        {"tokens": ["beat"] * 6 + ["rome"], "tags": ["O"] * 6 + ["B-CITY"]},
    ]
    task = tagging(write(tmp_path / "a.jsonl", *rows), sequence_tokens=8)
    split = load(task, tokenizer).validation  # classes: B-CITY, I-CITY, O
    right = torch.full((2, 8), 2)
    right[0, 1], right[0, 3] = 0, 0
    logits = torch.nn.functional.one_hot(right, 3).float()
    # 3 entities: found 1 whole (rome), 1 cut short (paris \x00), 1 lost
    assert evaluate.score(task, (logits,), split) == {
        "entity_f1": pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        "entity_precision": 1 / 2,
        "entity_recall": pytest.approx(1 / 3),
        "accuracy": pytest.approx(8 / 10),
    }


def test_what_is_cut_off_is_told(
    tmp_path: Path, tokenizer: BertTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path / "a.jsonl", TAGGED, {"tokens": ["rome"] * 20, "tags": ["O"] * 20}, TAGGED
    )
    with caplog.at_level(logging.WARNING):
        load(tagging(path), tokenizer)
    told = f"{path}: 1 of 3 examples are longer than sequence_tokens = 16; the rest of them is cut"
    assert told in caplog.text


# multiple choice


def choosing(path: str, **values: Any) -> Task:
    options = {"kind": "multiple-choice", "text": "start", "choices": ["a", "b"], "label": "right"}
    options |= {"train": path, "validation": path, "sequence_tokens": 16}
    return Task.model_validate_json(json.dumps(options | values))


CHOICE = {"start": "who won", "a": "rome", "b": "paris", "right": 1}


def test_choices_stand_beside_each_other(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", CHOICE, {**CHOICE, "a": "rome beat", "right": 0})
    train = load(choosing(path), tokenizer).train
    batch = train.collate([train.features[0], train.features[1]])
    assert batch["input_ids"].shape == (2, 2, 7)
    assert batch["input_ids"][0].tolist() == [
        [2, 9, 10, 3, ROME, 3, 0],
        [2, 9, 10, 3, PAR, IS, 3],
    ]
    assert batch["token_type_ids"][0, 0].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert batch["labels"].tolist() == [1, 0]
    assert train.lengths().tolist() == [7, 7]  # of the longest choice


@pytest.mark.parametrize(("label", "position"), [(1, 1), ("1", 1), ("A", 0), ("B", 1)])
def test_a_choice_is_a_position_or_a_letter(
    tmp_path: Path, tokenizer: BertTokenizer, label: Any, position: int
) -> None:
    path = write(tmp_path / "a.jsonl", {**CHOICE, "right": label})
    assert load(choosing(path), tokenizer).train.features[0]["labels"] == position


def test_choices_may_be_one_column_and_have_a_beginning(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    row = {"start": "who won", "begin": "paris beat", "endings": ["rome", "who"], "right": 0}
    path = write(tmp_path / "a.jsonl", row)
    task = choosing(path, choices=["endings"], text_pair="begin")
    assert load(task, tokenizer).validation.examples.pairs == [
        ["paris beat rome", "paris beat who"]
    ]


@pytest.mark.parametrize(
    ("row", "choices", "message"),
    [
        ({**CHOICE, "right": 2}, ["a", "b"], r"must be 0 to 1, or A to B \(got 2\)"),
        ({**CHOICE, "right": "C"}, ["a", "b"], r"must be 0 to 1, or A to B \(got 'C'\)"),
        ({**CHOICE, "right": -1}, ["a", "b"], r"must be 0 to 1, or A to B \(got -1\)"),
        ({**CHOICE, "b": ""}, ["a", "b"], "'b' is empty"),
        ({**CHOICE, "e": ["x", 3]}, ["e"], "'e' must be two or more texts"),
        ({**CHOICE, "e": ["x"]}, ["e"], "'e' must be two or more texts"),
    ],
)
def test_malformed_choices_are_refused(
    tmp_path: Path, tokenizer: BertTokenizer, row: Any, choices: list[str], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", {**row, "e": row.get("e", ["x", "y"])})
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        load(choosing(path, choices=choices), tokenizer)


def test_all_examples_have_as_many_choices(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    rows = [{**CHOICE, "e": ["x", "y"]}, {**CHOICE, "e": ["x", "y", "z"]}]
    with pytest.raises(DataError, match="line 2: has 3 choices, the first example 2"):
        load(choosing(write(tmp_path / "a.jsonl", *rows), choices=["e"]), tokenizer)


def test_an_example_is_cut_once_however_many_of_its_choices_are(
    tmp_path: Path, tokenizer: BertTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**CHOICE, "e": ["rome " * 20, "paris " * 20, "who"], "right": 0}
    short = {**CHOICE, "e": ["rome", "paris", "who"]}
    path = write(tmp_path / "a.jsonl", short, long)
    with caplog.at_level(logging.WARNING):
        load(choosing(path, choices=["e"]), tokenizer)
    assert f"{path}: 1 of 2 examples are longer than sequence_tokens = 16" in caplog.text


def test_the_likeliest_choice_is_scored(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    task = choosing(write(tmp_path / "a.jsonl", CHOICE, CHOICE))
    split = load(task, tokenizer).validation
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert evaluate.score(task, (logits,), split) == {"accuracy": 0.5}


# every kind, end to end, with held zeros


def varieties(directory: Path) -> dict[str, dict[str, Any]]:
    tagged = [{"tokens": ["the", "cat", "sees"], "tags": ["O", "B-A", "O"]}] * 12
    tagged += [{"tokens": ["a", "dog"], "tags": ["O", "B-A"]}] * 4
    choices = [{"start": "the cat", "e": ["sees the sea.", "a a"], "right": 0}] * 8
    choices += [{"start": "the cat", "e": ["a a", "sees the sea."], "right": 1}] * 8
    question = {"q": "who sees the sea?", "c": "the captain sees the sea. a dog hears a song."}
    none = {"text": [], "answer_start": []}
    asked = [{**question, "a": {"text": ["the captain"], "answer_start": [0]}}] * 8
    asked += [{**question, "q": "where is it?", "a": none}] * 8
    for name, rows in (("tags", tagged), ("choices", choices), ("questions", asked)):
        write(directory / f"{name}.jsonl", *rows)
    return {
        "tags": {"kind": "token-classification", "text": "tokens", "label": "tags"},
        "choices": {
            "kind": "multiple-choice",
            "text": "start",
            "choices": ["e"],
            "label": "right",
            "metrics": ["accuracy"],
        },
        "questions": {
            "kind": "question-answering",
            "text": "q",
            "text_pair": "c",
            "label": "a",
            "has_unanswerable": True,
            "metrics": ["squad_f1", "best_squad_f1", "no_answer_accuracy"],
            "sequence_tokens": 30,
            "stride_tokens": 4,
        },
    }


@pytest.mark.parametrize("name", ["tags", "choices", "questions"])
def test_every_kind_is_learnt_with_held_zeros(sparse: Path, tmp_path: Path, name: str) -> None:
    task = varieties(tmp_path)[name]
    task |= {
        "train": str(tmp_path / f"{name}.jsonl"),
        "validation": str(tmp_path / f"{name}.jsonl"),
    }
    if name == "tags":
        task["metrics"] = ["entity_f1", "accuracy"]
    training = {"epochs": 40.0, "learning_rate": 1e-2, "micro_batch": 4}
    recipe = finetune_recipe(sparse, tmp_path, task=task, training=training)
    results = finetune(recipe, tmp_path / "run")
    limit = 100.0 if name == "questions" else 1.0
    first = results.metrics[recipe.task.metrics[0]]
    assert first == pytest.approx(limit)
    assert (
        opfa.inspect(tmp_path / "run/model")["fingerprint"] == opfa.inspect(sparse)["fingerprint"]
    )
    again = evaluate_model(str(tmp_path / "run/model"), recipe, tmp_path / "answers.jsonl")
    assert again.metrics == results.metrics
    rows = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    for row in rows:  # all are right
        expected = (row["label"]["text"] or [""])[0] if name == "questions" else row["label"]
        assert row["prediction"] == expected
    assert len({str(row["prediction"]) for row in rows}) > 1


@pytest.fixture(scope="module")
def pooled(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose pooler is pruned too."""
    pattern = {"include": [ENCODER_LAYER, "pooler"]}
    pruning = {"schedule": {"end": 2, "target": 0.9}, "pattern": pattern}
    output = tmp_path_factory.mktemp("pooled") / "run"
    pretrain(pretrain_recipe(prepared, pruning=pruning, training={"steps": 4}), output)
    return output / "model"


@pytest.mark.parametrize("name", ["tags", "choices", "questions"])
def test_zeros_are_held_where_the_head_has_no_pooler(
    pooled: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / f"{name}.jsonl")
    task = {**varieties(tmp_path)[name], "train": path, "validation": path}
    if name == "tags":
        task["metrics"] = ["entity_f1"]
    with caplog.at_level(logging.WARNING):
        finetune(finetune_recipe(pooled, tmp_path, task=task), tmp_path / "run")
    before, after = (opfa.inspect(model)["tensors"] for model in (pooled, tmp_path / "run/model"))
    if name == "choices":  # the only one of these heads with a pooler
        assert after == before
        assert "left out" not in caplog.text
    else:
        assert after == {name: row for name, row in before.items() if "pooler" not in name}
        assert "left out, since BertFor" in caplog.text and "pooler.dense.weight" in caplog.text


def test_zeros_of_the_encoder_are_not_left_out(pooled: Path, tmp_path: Path) -> None:
    shutil.copytree(pooled, tmp_path / "model")
    stated = (tmp_path / "model/sparsity.json").read_text()
    (tmp_path / "model/sparsity.json").write_text(stated.replace("layer.1.", "layer.7."))
    varieties(tmp_path)
    task = {"kind": "multiple-choice", "text": "start", "choices": ["e"], "label": "right"}
    path = str(tmp_path / "choices.jsonl")
    task |= {"train": path, "validation": path, "metrics": ["accuracy"]}
    with pytest.raises(ModelError, match=r"names bert\.encoder\.layer\.7\..*no such") as caught:
        finetune(finetune_recipe(tmp_path / "model", tmp_path, task=task), tmp_path / "run")
    assert "zeros=free" not in str(caught.value)  # it would let the zeros go


def test_more_validation_splits_are_measured_by_name(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    more = {"mismatched": str(examples / "train.jsonl")}
    recipe = finetune_recipe(sparse, examples, task={"more_validation": more})
    metrics = finetune(recipe, tmp_path / "run").metrics
    assert list(metrics) == ["accuracy", "mismatched_accuracy"]
    assert evaluate_model(str(tmp_path / "run/model"), recipe).metrics == metrics
    swapped = recipe.model_copy(
        update={"task": recipe.task.model_copy(update={"validation": more["mismatched"]})}
    )
    found = evaluate_model(str(tmp_path / "run/model"), swapped).metrics["accuracy"]
    assert found == metrics["mismatched_accuracy"]


# questions without an answer: SQuAD v2.0


def answering(tmp_path: Path, *golds: tuple[str, ...], **values: Any) -> Task:
    context = "Rome beat Paris"
    rows = [
        {
            "q": "who won",
            "c": context,
            "a": {"text": gold, "answer_start": [context.index(text) for text in gold]},
        }
        for gold in golds
    ]
    options = {"kind": "question-answering", "text": "q", "text_pair": "c", "label": "a"}
    options |= {"sequence_tokens": 16, "stride_tokens": 2, "has_unanswerable": True}
    options |= {"validation": write(tmp_path / "a.jsonl", *rows), "metrics": ["exact_match"]}
    return Task.model_validate_json(json.dumps(options | values))


def spans(*rows: tuple[int, int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of [CLS] who won [SEP] rome beat par ##is [SEP]: a span, and what [CLS] leads by."""
    starts, ends = torch.full((len(rows), 9), -9.0), torch.full((len(rows), 9), -9.0)
    for index, (first, last, lead) in enumerate(rows):
        starts[index, first], ends[index, last] = 0.0, 0.0
        starts[index, 0], ends[index, 0] = lead, 0.0
    return starts, ends


METRICS = ["exact_match", "squad_f1", "has_answer_exact_match", "has_answer_squad_f1"]
METRICS += ["no_answer_accuracy", "best_exact_match", "best_squad_f1"]


def test_scores_of_version_2_by_hand(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    # lead: answered rightly -2, wrongly answered though there is none -1, silent though there is
    # an answer 1, silent rightly 3
    task = answering(tmp_path, ("Rome",), (), ("beat Paris",), (), metrics=METRICS)
    split = tasks.load_validation(task, tokenizer, CONFIG)
    logits = spans((4, 4, -2.0), (4, 4, -1.0), (6, 7, 1.0), (4, 4, 3.0))
    assert squad.decode(task, logits, split) == (["Rome", "Rome", "Paris", "Rome"], [-2, -1, 1, 3])
    found = evaluate.score(task, logits, split)
    assert found == {
        "exact_match": 50.0,
        "squad_f1": 50.0,
        "has_answer_exact_match": 50.0,
        "has_answer_squad_f1": 50.0,
        "no_answer_accuracy": 50.0,
        "best_exact_match": 75.0,  # answer only the first: 1 + 2 silences right
        "best_squad_f1": 75.0,  # the third adds 2/3 and costs the second
        "best_exact_match_threshold": -2.0,
        "best_squad_f1_threshold": -2.0,
    }
    assert list(found)[: len(METRICS)] == METRICS


def test_the_best_threshold_gives_the_best_score_also_when_silence_is_best(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = answering(tmp_path, (), (), metrics=["best_squad_f1"])
    split = tasks.load_validation(task, tokenizer, CONFIG)
    logits = spans((4, 4, -2.0), (4, 4, -1.0))
    found = evaluate.score(task, logits, split)
    assert found["best_squad_f1"] == 100.0
    options = {"no_answer_threshold": found["best_squad_f1_threshold"], "metrics": ("squad_f1",)}
    assert evaluate.score(task.model_copy(update=options), logits, split) == {"squad_f1": 100.0}


def test_an_answer_of_an_article_alone_is_an_answer(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    row = {"q": "who won", "c": "the rome", "a": {"text": ["the"], "answer_start": [0]}}
    task = answering(tmp_path, ("Rome",), metrics=["no_answer_accuracy", "has_answer_exact_match"])
    task = task.model_copy(update={"validation": write(tmp_path / "b.jsonl", row)})
    split = tasks.load_validation(task, tokenizer, CONFIG)
    logits = torch.zeros(1, 7), torch.zeros(1, 7)
    assert evaluate.score(task, logits, split)["no_answer_accuracy"] == 0.0  # there is none


@pytest.mark.parametrize(("threshold", "answer"), [(-0.5, 0.0), (0.5, 100.0)])
def test_no_answer_is_given_above_the_threshold(
    tmp_path: Path, tokenizer: BertTokenizer, threshold: float, answer: float
) -> None:
    task = answering(tmp_path, ("Rome",), no_answer_threshold=threshold)
    split = tasks.load_validation(task, tokenizer, CONFIG)
    assert evaluate.score(task, spans((4, 4, 0.0)), split) == {"exact_match": answer}


def official_v2(golds: list[list[str]], spans: list[str], leads: list[float]) -> dict[str, float]:
    """The definitions of SQuAD's evaluate-v2.0, written from their text: raw scores, and the best
    over all thresholds by trying each.
    """
    golds = [[gold for gold in answers if squad.normalize(gold)] or [""] for answers in golds]

    def f1(gold: str, text: str) -> float:
        gold_words, words = squad.normalize(gold).split(), squad.normalize(text).split()
        common = sum(min(gold_words.count(w), words.count(w)) for w in set(words))
        if not gold_words or not words:
            return float(gold_words == words)
        precision, recall = common / len(words), common / len(gold_words)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    def mean(threshold: float) -> float:
        given = ["" if lead > threshold else s for s, lead in zip(spans, leads, strict=True)]
        pairs = zip(given, golds, strict=True)
        return 100 * float(np.mean([max(f1(g, text) for g in answers) for text, answers in pairs]))

    best = max(mean(threshold) for threshold in [-np.inf, *leads])
    return {"squad_f1": mean(0.0), "best_squad_f1": best}


def test_scores_of_version_2_equal_the_definition(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    random = np.random.default_rng(0)
    texts = ["Rome", "beat", "Paris", "Rome beat", "beat Paris", "Rome beat Paris"]
    for _ in range(30):
        golds = [tuple(random.choice(texts, random.integers(0, 3))) for _ in range(6)]
        task = answering(tmp_path, *golds, metrics=["squad_f1", "best_squad_f1"])
        split = tasks.load_validation(task, tokenizer, CONFIG)
        first = random.integers(4, 7, 6)
        logits = spans(*((int(f), int(random.integers(f, 8)), random.normal()) for f in first))
        found = evaluate.score(task, logits, split)
        expected = official_v2([list(g) for g in golds], *squad.decode(task, logits, split))
        for name, value in expected.items():
            assert found[name] == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "answer", "v1", "v2"), [("", "", 0.0, 1.0), ("the", "a", 0.0, 1.0)]
)
def test_two_empty_answers_agree_in_version_2_only(
    prediction: str, answer: str, v1: float, v2: float
) -> None:
    assert squad.squad_f1(prediction, answer) == v1
    assert squad.squad_f1_v2(prediction, answer) == v2


def test_a_question_without_an_answer_points_at_cls(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    split = tasks.load_validation(answering(tmp_path, ()), tokenizer, CONFIG)
    assert (split.features[0]["start_positions"], split.features[0]["end_positions"]) == (0, 0)


def test_a_question_without_an_answer_needs_the_recipes_word(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    task = answering(tmp_path, (), has_unanswerable=False)
    with pytest.raises(DataError, match="line 1: .* at least one answer; task.has_unanswerable"):
        tasks.load_validation(task, tokenizer, CONFIG)


def test_answers_that_no_window_holds_are_told(
    tmp_path: Path, tokenizer: BertTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = "beat " * 8 + "beat"
    rows = [
        {"q": "who won", "c": text, "a": {"text": [text], "answer_start": [0]}}
        for text in (long, "rome")
    ]
    path = write(tmp_path / "b.jsonl", *rows)
    task = answering(tmp_path, (), sequence_tokens=10, has_unanswerable=True)
    with caplog.at_level(logging.WARNING):
        tasks.load_validation(task.model_copy(update={"validation": path}), tokenizer, CONFIG)
    assert "1 of 2 examples have an answer that no window holds whole" in caplog.text


# metrics against their own libraries, on random predictions


@pytest.mark.parametrize("num_classes", [2, 3])
def test_metrics_of_classes_equal_scikit_learn(num_classes: int) -> None:
    random = np.random.default_rng(1)
    targets, indices = random.integers(0, num_classes, (2, 200))
    average = "binary" if num_classes == 2 else "macro"
    logits = torch.nn.functional.one_hot(torch.tensor(indices), num_classes).float()
    task = Task(metrics=("accuracy", "f1", "matthews"))
    examples = tasks.Examples(
        source="", places=[], texts=[], pairs=None, labels=targets.tolist(), names=()
    )
    split = tasks.Split(
        features=Rows.of([{"labels": targets.tolist()}]),
        examples=examples,
        classes=tuple("abc"[:num_classes]),
        collate=lambda rows: {},
    )
    assert evaluate.score(task, (logits,), split) == {
        "accuracy": sklearn.metrics.accuracy_score(targets, indices),
        "f1": sklearn.metrics.f1_score(targets, indices, average=average),
        "matthews": sklearn.metrics.matthews_corrcoef(targets, indices),
    }


# held-out examples


def test_held_out_examples_are_a_part_of_the_training_examples(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    rows = [{"sentence": "rome " * (i % 7 + 1), "label": i % 2, "n": i} for i in range(40)]
    path = write(tmp_path / "a.jsonl", *rows)
    task = Task(train=path, validation=path, sequence_tokens=16)
    data = tasks.load(task, tokenizer, CONFIG, holdout=0.25)
    held, train = data.selection.examples.places, data.train.examples.places
    assert (len(held), len(train), len(data.validation.examples.places)) == (10, 30, 40)
    assert not set(held) & set(train)
    assert len(data.train.features) == 30
    again = tasks.load(task, tokenizer, CONFIG, holdout=0.25)
    assert again.selection.examples.places == held


def test_all_questions_of_a_context_are_held_out_together(
    tmp_path: Path, tokenizer: BertTokenizer
) -> None:
    contexts = ["rome beat paris", "paris beat rome", "rome won", "paris won"]
    rows = [
        {"q": f"who won {i}", "c": context, "a": {"text": [], "answer_start": []}}
        for i in range(5)
        for context in contexts
    ]
    task = answering(tmp_path, ()).model_copy(
        update={"train": write(tmp_path / "b.jsonl", *rows), "more_validation": {}}
    )
    data = tasks.load(task, tokenizer, CONFIG, holdout=0.25)
    train, held = data.train.examples.pairs, data.selection.examples.pairs
    assert train is not None and held is not None
    assert (len(train), len(held)) == (15, 5)
    assert len(set(held)) == 1 and not set(held) & set(train)


def test_a_holdout_of_nothing_is_refused(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    rows = [{"sentence": "rome", "label": i} for i in (0, 1)]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match="selection.holdout = 0.1 of 2 examples is 0"):
        task = Task(train=path, validation=path, sequence_tokens=16)
        tasks.load(task, tokenizer, CONFIG, holdout=0.1)
