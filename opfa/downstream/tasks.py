"""A task as data: tokenized features, the model with its head, and the loss.

Questions follow SQuAD v1.1: a long context becomes
overlapping windows; an answer outside a window is its [CLS].
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opfa.downstream.examples import Examples, Row, read
from opfa.downstream.recipe import Task
from opfa.models import check_fit, load_config, loading
from opfa.recipe import DataError, ModelError

TARGETS = ("labels", "start_positions", "end_positions")
DECODING = ("example", "context", "offsets")  # what only `evaluate` needs of a window
CHUNK = 1_000  # examples that are tokenized at once

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: `features` and `collate` are for a DataLoader, `examples` for scoring."""

    features: Dataset
    examples: Examples
    classes: tuple[str, ...]  # in the order of the model's outputs
    collate: Callable[[Sequence[Row]], Batch]


def load(
    task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[Split, Split]:
    """Read training and validation split; classes come from the task or the training split."""
    train, validation = read(task, task.train), read(task, task.validation)
    classes = task.classes or train.names or _inferred(task, train)
    training = _split(task, tokenizer, config, train, classes)
    columns = [name for name in training.features.column_names if name not in DECODING]
    training = replace(training, features=training.features.select_columns(columns))
    return training, _split(task, tokenizer, config, validation, classes)


def load_validation(
    task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Split:
    """Read the validation split alone, with the classes in the order of a trained model."""
    validation = read(task, task.validation)
    is_classification = task.kind == "classification"
    stated = task.classes or validation.names
    classes = _trained_classes(config, stated) if is_classification else ()
    return _split(task, tokenizer, config, validation, classes)


def _inferred(task: Task, train: Examples) -> tuple[str, ...]:
    if task.kind != "classification":
        return ()
    names = set(train.labels)
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if are_numbers else (0, name)))


def _trained_classes(config: PretrainedConfig, stated: tuple[str, ...]) -> tuple[str, ...]:
    """Stated classes in the order of the model's outputs, which may be just LABEL_0, LABEL_1."""
    by_index: dict[Any, Any] = config.id2label or {}  # Any: transformers says int or str
    trained = tuple(str(by_index[index]) for index in sorted(by_index))
    if not stated:
        return trained
    if len(trained) == len(stated) and all(name.startswith("LABEL_") for name in trained):
        return stated
    by_name = {name.casefold(): name for name in stated}
    if sorted(by_name) != sorted(name.casefold() for name in trained):
        theirs, ours = ", ".join(trained), ", ".join(stated)
        raise ModelError(f"the model's classes are {theirs}; the task's are {ours}")
    return tuple(by_name[name.casefold()] for name in trained)


def _split(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    examples: Examples,
    classes: tuple[str, ...],
) -> Split:
    check_fit(config, tokenizer, task.sequence_tokens)
    pad_token_id = tokenizer.pad_token_id
    if not (isinstance(pad_token_id, int) and tokenizer.is_fast):
        raise ModelError("the tokenizer needs a padding token and the fast (`tokenizers`) form")
    labels = _label_indices(task, examples, classes)
    chunks = []
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        if task.kind == "question-answering":
            columns = _windows(task, tokenizer, examples, part)
        else:
            pairs = examples.pairs and examples.pairs[part]
            tokens = task.sequence_tokens
            columns = tokenizer(examples.texts[part], pairs, truncation=True, max_length=tokens)
            columns["labels"] = labels[part]
        chunks.append(Dataset.from_dict(dict(columns)))
    features = concatenate_datasets(chunks)
    return Split(
        features=features,
        examples=examples,
        classes=classes,
        collate=partial(_collate, pad_token_id),
    )


def _label_indices(task: Task, examples: Examples, classes: tuple[str, ...]) -> list[Any]:
    """Labels as the loss wants them: classes by index."""
    if task.kind != "classification":
        return examples.labels
    if len(classes) < 2:
        raise DataError(f"{examples.source}: two classes are needed, and there is only {classes}")
    names = task.classes or examples.names or classes
    index = {name: classes.index(name) for name in names if name in classes}
    if not any(name.isdecimal() for name in names):
        index |= {str(i): index[name] for i, name in enumerate(names) if name in index}
    for place, label in zip(examples.places, examples.labels, strict=True):
        if label not in index:
            known = ", ".join(map(repr, classes))
            raise DataError(f"{examples.source}, {place}: class {label!r} is not one of {known}")
    return [index[label] for label in examples.labels]


def _windows(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice
) -> dict[str, list[Any]]:
    """Tokenize questions with every window of their contexts, and find the first answer in each.

    `example` is the question's index; `context` the token range of the window's text; `offsets` are
    its tokens' places in the context.
    """
    assert examples.pairs is not None, "the recipe asks for text_pair"
    _check_room(task, tokenizer, examples, part)
    encoded = tokenizer(
        examples.texts[part],
        examples.pairs[part],
        truncation="only_second",
        max_length=task.sequence_tokens,
        stride=task.stride_tokens,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns = dict(encoded)
    columns["example"] = [part.start + i for i in columns.pop("overflow_to_sample_mapping")]
    columns["offsets"] = columns.pop("offset_mapping")
    columns["context"], spans = [], []
    for window, example in enumerate(columns["example"]):
        sequences = encoded.sequence_ids(window)
        first = sequences.index(1) if 1 in sequences else len(sequences)
        context = (first, first + sequences.count(1))
        cls = columns["input_ids"][window].index(tokenizer.cls_token_id)
        span = _token_span(columns["offsets"][window], context, examples.labels[example])
        columns["context"].append(context)
        spans.append(span or (cls, cls))
    columns["start_positions"], columns["end_positions"] = map(list, zip(*spans, strict=True))
    return columns


def _check_room(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples, part: slice
) -> None:
    """Neighbouring windows overlap by `stride_tokens`, so each must hold more than that."""
    questions = tokenizer(examples.texts[part], add_special_tokens=False)["input_ids"]
    most = task.sequence_tokens - tokenizer.num_special_tokens_to_add(pair=True)
    for place, question in zip(examples.places[part], questions, strict=True):
        if most - len(question) <= task.stride_tokens:
            raise DataError(
                f"{examples.source}, {place}: the question has {len(question)} tokens, too many "
                f"for windows of sequence_tokens = {task.sequence_tokens} that overlap by "
                f"stride_tokens = {task.stride_tokens}"
            )


def _token_span(
    offsets: Sequence[Sequence[int]], context: tuple[int, int], answers: Row
) -> tuple[int, int] | None:
    """First and last token of the first answer, if this window has all of it."""
    first, stop = context
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    if first == stop or start < offsets[first][0] or end > offsets[stop - 1][1]:
        return None
    start_token = bisect_right(offsets, start, first, stop, key=lambda offset: offset[0]) - 1
    end_token = bisect_left(offsets, end, first, stop, key=lambda offset: offset[1])
    return start_token, end_token


def _collate(pad_token_id: int, rows: Sequence[Row]) -> Batch:
    """Pad to the longest row of the batch."""
    tokens = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0]:
        if name in TARGETS:
            batch[name] = torch.tensor([row[name] for row in rows])
        elif name not in DECODING:
            fill = pad_token_id if name == "input_ids" else 0
            padded = [row[name] + [fill] * (tokens - len(row[name])) for row in rows]
            batch[name] = torch.tensor(padded)
    return batch


def check_head(task: Task, config: PretrainedConfig) -> None:
    """Refuse a checkpoint that was not fine-tuned for this kind of task."""
    head = "QuestionAnswering" if task.kind == "question-answering" else "SequenceClassification"
    if not any(head in name for name in config.architectures or ()):
        made_for = ", ".join(config.architectures or ("nothing",))
        raise ModelError(f"a model for {made_for} has no head for {task.kind}; fine-tune it first")


def load_model(
    task: Task, init: str, classes: Sequence[str], *, is_trained: bool = False
) -> PreTrainedModel:
    """The model with the task's head, fp32. A head that doesn't fit is made anew.

    With `is_trained` (a teacher, or a model to evaluate) everything must fit, classes included.
    """
    heads: dict[str, Any] = {  # Any: Auto classes share no base
        "classification": AutoModelForSequenceClassification,
        "regression": AutoModelForSequenceClassification,
        "question-answering": AutoModelForQuestionAnswering,
    }
    options: dict[str, Any] = {}
    if task.kind == "classification":
        if is_trained and _trained_classes(load_config(init), tuple(classes)) != tuple(classes):
            raise ModelError(f"model {init!r}: its classes are in another order than {classes}")
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {name: index for index, name in enumerate(classes)}
        options["problem_type"] = "single_label_classification"
    elif task.kind == "regression":
        options = {"num_labels": 1, "problem_type": "regression"}
    with loading("model", init):
        model, info = heads[task.kind].from_pretrained(
            init,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    encoder = f"{model.base_model_prefix}."
    lost = [key for key in new if is_trained or (key.startswith(encoder) and ".pooler." not in key)]
    if lost:
        what = f"{len(lost)} tensors are missing or of another shape, first {lost[0]}"
        raise ModelError(f"model {init!r}: {what}")
    return model


def inputs_of(batch: Batch) -> Batch:
    """What the model is called with: everything but the targets."""
    return {name: tensor for name, tensor in batch.items() if name not in TARGETS}


def logits_of(task: Task, outputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One tensor of logits, or two for question answering: starts and ends."""
    names = ("start_logits", "end_logits") if task.kind == "question-answering" else ("logits",)
    return tuple(outputs[name] for name in names)


def task_loss(task: Task, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Mean loss, fp32: cross-entropy (of starts and ends: their mean) or squared error."""
    logits = [tensor.float() for tensor in logits_of(task, outputs)]
    targets = [batch[name] for name in TARGETS if name in batch]
    if task.kind == "regression":
        return mse_loss(logits[0].squeeze(-1), targets[0])
    losses = [cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
    return torch.stack(losses).mean()
