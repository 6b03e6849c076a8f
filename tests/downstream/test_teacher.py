"""A fine-tuning's teacher: what it must share with the student, its cached logits, its losses."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT, break_off, finetune_recipe
from torch.nn.functional import kl_div, log_softmax, mse_loss
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
)

from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import Distillation
from opfa.downstream.teacher import FILE, Teacher
from opfa.errors import ModelError
from opfa.tasks import kinds as tasks
from opfa.tasks.recipe import Task
from opfa.training.checkpoint import model_digest

KINDS: dict[str, dict[str, Any]] = {
    "classification": {"text": "text"},
    "regression": {"text": "text", "label": "number", "metrics": ["pearson"]},
    "token-classification": {"text": "words", "label": "tags"},
    "question-answering": {
        "text": "text",
        "text_pair": "context",
        "label": "answers",
        "metrics": ["squad_f1"],
        "stride_tokens": 4,
    },
}
HEADS: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = ["the cat sees the sea", "a dog hears", "no child loves a song", "my sister wants it"]
    rows = [
        {
            "text": line,
            "label": "ab"[i % 2],
            "number": i / 2,
            "words": line.split(),
            "tags": ["X" if word == "the" else "O" for word in line.split()],
            "context": f"{line}. " * (i + 1),
            "answers": {"text": [line], "answer_start": [0]},
        }
        for i, line in enumerate(lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def setting(
    kind: str, sparse: Path, data: Path, directory: Path, **settings: Any
) -> tuple[Teacher, PreTrainedModel, tasks.Data, Task]:
    """A random teacher of one layer, a student of two, and their task."""
    values = {"kind": kind, "train": str(data), "validation": str(data), "sequence_tokens": 24}
    task = Task.model_validate_json(json.dumps(values | KINDS[kind]))
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    student_config = BertConfig.from_pretrained(sparse)
    splits = tasks.load(task, tokenizer, student_config)
    classes = ["one number"] if kind == "regression" else splits.train.classes or "ab"
    torch.manual_seed(1)
    config = BertConfig(
        **{**TINY_BERT, "num_hidden_layers": 1},
        vocab_size=student_config.vocab_size,
        id2label=dict(enumerate(classes)),
        initializer_range=0.5,
    )
    HEADS[kind].from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    student = tasks.load_model(task, str(sparse), splits.train.classes).eval()
    distillation = Distillation(teacher=str(directory), **settings)
    teacher = Teacher(distillation, task, splits.train.classes, student, tokenizer=tokenizer)
    return teacher, student, splits, task


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_cached", [True, False])
def test_the_soft_loss_is_that_of_the_formula(
    sparse: Path, data: Path, tmp_path: Path, kind: str, is_cached: bool
) -> None:
    teacher, student, splits, task = setting(kind, sparse, data, tmp_path / "t", temperature=3.0)
    if is_cached:
        teacher.remember(splits.train, tmp_path / "logits", contextlib.nullcontext)
    indices = [2, 0, 1]
    batch = splits.train.collate([splits.train.features[i] for i in indices])
    outputs = student(**tasks.inputs_of(batch))
    soft, hidden = teacher.losses(outputs, batch, indices)
    expected, num_rows = torch.tensor(0.0), 0
    for row, index in enumerate(indices):  # one by one, without any padding
        feature = splits.train.features[index]
        alone = {k: torch.tensor([feature[k]]) for k in ("input_ids", "attention_mask")}
        alone["token_type_ids"] = torch.tensor([feature["token_type_ids"]])
        theirs = teacher.model(**alone)
        for name in tasks.KINDS[kind].outputs:
            ours, goal = outputs[name][row], theirs[name][0]
            if kind == "regression":
                expected, num_rows = expected + mse_loss(ours, goal), num_rows + 1
                continue
            if kind == "question-answering":
                ours = ours[: len(goal)]  # no answer is where no token is
            if kind == "token-classification":
                kept = torch.tensor(feature["labels"]) != -100
                ours, goal = ours[: len(kept)][kept], goal[kept]
            ours, goal = ours.view(-1, ours.shape[-1]), goal.view(-1, goal.shape[-1])
            pair = log_softmax(ours / 3, -1), log_softmax(goal / 3, -1)
            expected = expected + 9 * kl_div(*pair, reduction="sum", log_target=True)
            num_rows += len(ours)
    torch.testing.assert_close(soft, expected / num_rows)
    assert hidden == 0.0


def test_cached_logits_need_no_teacher_any_more(sparse: Path, data: Path, tmp_path: Path) -> None:
    teacher, student, splits, _ = setting("classification", sparse, data, tmp_path / "t")
    teacher.remember(splits.train, tmp_path / "logits", contextlib.nullcontext)
    batch = splits.train.collate([splits.train.features[1]])
    outputs = student(**tasks.inputs_of(batch))
    before, _ = teacher.losses(outputs, batch, [1])
    teacher.model.forward = None  # pyright: ignore[reportAttributeAccessIssue]
    again, _ = teacher.losses(outputs, batch, [1])
    teacher.remember(splits.train, tmp_path / "logits", contextlib.nullcontext)  # from the file
    from_file, _ = teacher.losses(outputs, batch, [1])
    assert before == again == from_file


def test_the_hidden_loss_is_a_sum_over_tokens(sparse: Path, data: Path, tmp_path: Path) -> None:
    teacher, student, splits, _ = setting(
        "classification", sparse, data, tmp_path / "t", hidden_weight=1.0
    )
    batch = splits.train.collate([splits.train.features[i] for i in (0, 1)])
    options = {**tasks.inputs_of(batch), "output_hidden_states": True}
    ours, theirs = student(**options), teacher.model(**options)
    _, hidden = teacher.losses(ours, batch, [0, 1])
    # student: embeddings and 2 layers; teacher: embeddings and 1 layer; 0 to 0, 1 to 0, 2 to 1
    expected = torch.tensor(0.0)
    for student_layer, teacher_layer in ((0, 0), (1, 0), (2, 1)):
        distance = ours.hidden_states[student_layer] - theirs.hidden_states[teacher_layer]
        kept = distance.square().mean(-1)[batch["attention_mask"].bool()]
        expected = expected + kept.sum() / 3
    torch.testing.assert_close(hidden, expected)


def trained(sparse: Path, examples: Path, output: Path) -> Path:
    finetune(finetune_recipe(sparse, examples), output)
    return output / "model"


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_micro_batches_change_nothing_under_a_teacher(
    sparse: Path, examples: Path, tmp_path: Path, hidden_weight: float
) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    shutil.copytree(sparse, tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    losses = []
    for micro_batch in (8, 2):
        recipe = finetune_recipe(
            tmp_path / "student",
            examples,
            training={"micro_batch": micro_batch},
            distillation={"teacher": str(teacher), "hidden_weight": hidden_weight},
        )
        finetune(recipe, tmp_path / f"run-{micro_batch}")
        lines = (tmp_path / f"run-{micro_batch}/metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_cache_changes_nothing_but_the_work(sparse: Path, examples: Path, tmp_path: Path) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    losses = []
    for cache in (True, False):
        settings = {"teacher": str(teacher), "cache": cache}
        finetune(finetune_recipe(sparse, examples, distillation=settings), tmp_path / str(cache))
        lines = (tmp_path / str(cache) / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
        assert not (tmp_path / str(cache) / FILE).exists()  # gone with the run's end
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resume_under_a_teacher_is_bit_identical(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    recipe = finetune_recipe(sparse, examples, distillation={"teacher": str(teacher)})
    finetune(recipe, tmp_path / "unbroken")

    break_off(6, finetune, recipe, tmp_path / "broken")
    finetune(recipe, tmp_path / "broken", resume=True)
    assert model_digest(tmp_path / "broken/model") == model_digest(tmp_path / "unbroken/model")


# what doesn't fit


def refused(sparse: Path, examples: Path, teacher: Path, tmp_path: Path, **settings: Any) -> str:
    recipe = finetune_recipe(sparse, examples, distillation={"teacher": str(teacher), **settings})
    with pytest.raises(ModelError) as caught:
        finetune(recipe, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_teacher_with_another_vocabulary_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    message = refused(sparse, examples, teacher, tmp_path)
    assert "has another tokenizer than the student (120 entries, 120; 2 differ, such as" in message


def test_a_teacher_that_keeps_capitals_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    path = teacher / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["do_lower_case"] = False
    path.write_text(json.dumps(tokenizer))
    assert "cuts text in another way" in refused(sparse, examples, teacher, tmp_path)


def test_a_teacher_with_another_order_of_labels_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    config |= {"id2label": {"0": "other", "1": "cat"}, "label2id": {"other": 0, "cat": 1}}
    (teacher / "config.json").write_text(json.dumps(config))
    message = refused(sparse, examples, teacher, tmp_path)
    assert "its classes are in another order, other, cat; the task's are cat, other" in message


def test_a_teacher_that_wants_token_types_is_refused_to_a_student_without(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    teacher = trained(sparse, examples, tmp_path / "teacher")
    path = teacher / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    message = refused(sparse, examples, teacher, tmp_path)
    assert "its tokenizer gives input_ids, attention_mask; the student's gives" in message


def test_a_teacher_with_too_few_positions_is_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    shape = {**TINY_BERT, "max_position_embeddings": 8}
    names = {"id2label": {0: "cat", 1: "other"}, "label2id": {"cat": 0, "other": 1}}
    config = BertConfig(**shape, vocab_size=120, **names)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "t")
    AutoTokenizer.from_pretrained(sparse).save_pretrained(tmp_path / "t")
    message = refused(sparse, examples, tmp_path / "t", tmp_path)
    assert "sequence_tokens = 24: this model has only 8 positions" in message


def test_hidden_states_of_another_size_are_refused(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    config = BertConfig(
        **{**TINY_BERT, "hidden_size": 32},
        vocab_size=120,
        id2label={0: "cat", 1: "other"},
        label2id={"cat": 0, "other": 1},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "t")
    AutoTokenizer.from_pretrained(sparse).save_pretrained(tmp_path / "t")
    message = refused(sparse, examples, tmp_path / "t", tmp_path, hidden_weight=1.0)
    assert message.startswith("distillation.hidden_weight = 1.0: the teacher's hidden size is 32")
