"""A task as data: kinds of tasks as a table, splits, the model with its head, and the loss."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opfa.errors import ModelError
from opfa.models.configs import load_config
from opfa.models.encoders import ENCODER, HEADS, load_weights, of_encoder, skeleton
from opfa.models.fit import fit_padding
from opfa.models.pretraining import dropouts, keep_values
from opfa.models.sentences import VECTOR, write_pooling
from opfa.models.skeleton import check_positions, try_out
from opfa.tasks import checks, embeddings, features, predictions, scores, squad
from opfa.tasks import classes as classing
from opfa.tasks import examples as reading
from opfa.tasks.batches import in_context, inputs_of, num_targets, targets_of
from opfa.tasks.checks import Ask, Check
from opfa.tasks.examples import Examples
from opfa.tasks.features import DECODING, Batch, Build, Split
from opfa.tasks.predictions import Prediction
from opfa.tasks.recipe import Task
from opfa.tasks.rows import Rows

CUT = "are longer than sequence_tokens = {0.sequence_tokens}; the rest of them is cut off"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All that distinguishes one kind of task from another."""

    check: Check
    check_training: Check | None = None  # where training examples are others
    ask: Ask  # what an example says apart from its label
    blank: Callable[[Any], Any] = lambda _: 0  # in the place of a label; Any: what was asked
    build: Build
    misfit: str = CUT  # what is wrong with an example that doesn't fit
    head: Any  # one of transformers' Auto classes, which share no base
    outputs: tuple[str, ...] = ("logits",)
    given: tuple[str, ...] = ()  # what the model itself must give, where that is not `outputs`
    has_classes: bool = False
    score: Callable[[Task, tuple[Tensor, ...], Split], dict[str, float]]
    answers: Callable[[Task, tuple[Tensor, ...], Split], Sequence[Prediction]]  # one each


KINDS = {
    "classification": Kind(
        check=checks.classified,
        ask=checks.asked_texts,
        build=features.sequences,
        head=HEADS["SequenceClassification"],
        has_classes=True,
        score=scores.of_classes,
        answers=predictions.classes,
    ),
    "regression": Kind(
        check=checks.measured,
        ask=checks.asked_texts,
        build=features.sequences,
        head=HEADS["SequenceClassification"],
        score=scores.of_numbers,
        answers=predictions.numbers,
    ),
    "question-answering": Kind(
        check=checks.answered,
        ask=checks.asked_question,
        blank=lambda _: {"text": [], "answer_start": []},
        build=features.windows,
        misfit="have an answer that no window holds whole; windows overlap by {0.stride_tokens}",
        head=HEADS["QuestionAnswering"],
        outputs=("start_logits", "end_logits"),
        score=squad.score,
        answers=squad.answers,
    ),
    "token-classification": Kind(
        check=checks.tagged,
        ask=checks.asked_sentence,
        blank=lambda words: [0] * len(words),
        build=features.tagged_words,
        head=HEADS["TokenClassification"],
        has_classes=True,
        score=scores.of_tags,
        answers=predictions.tags,
    ),
    "multiple-choice": Kind(
        check=checks.chosen,
        ask=checks.asked_choices,
        build=features.choices,
        head=HEADS["MultipleChoice"],
        score=scores.of_classes,
        answers=predictions.choices,
    ),
    "embedding": Kind(
        check=checks.embedded,
        check_training=checks.embedded_training,
        ask=checks.asked_each,
        build=features.sentences,
        head=ENCODER,
        outputs=(VECTOR,),
        given=("last_hidden_state",),
        score=embeddings.score,
        answers=embeddings.answers,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The splits of a fine-tuning run."""

    train: Split
    selection: Split  # to compare runs on: the validation split, or training examples held out
    validation: Split
    more: dict[str, Split]


def load(
    task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, holdout: float = 0.0
) -> Data:
    """Read all splits. What is held out doesn't depend on the recipe's seed, so runs compare."""
    kind = KINDS[task.kind]
    embeddings.check_library(task, is_training=True)
    check_positions(skeleton(config), config, task.sequence_tokens)  # before the data are read
    reading.check_files(task)
    read = partial(reading.read, task, check=kind.check)
    train = reading.read(task, task.train, kind.check_training or kind.check)
    classes = classing.of_training(task, train) if kind.has_classes else ()  # of held-out ones too
    whole = train
    if isinstance(task.validation, str):
        validation = read(task.validation)
    else:
        train, validation = _held_out(task, train, task.validation, "task.validation")
    classing.tell(task, whole, classes, len(whole.labels) - len(train.labels))
    examples = {name: read(split) for name, split in task.more_validation.items()}
    split = partial(_split, task, tokenizer, config, classes=classes, whose="the training examples")
    selection = measured = split(validation)
    more = {name: split(part) for name, part in examples.items()}
    if holdout:
        train, held = _held_out(task, train, holdout, "selection.holdout")
        selection = split(held)
    training = split(train)
    columns = [name for name in training.features.column_names if name not in DECODING]
    training = replace(training, features=training.features.select_columns(columns))
    return Data(train=training, selection=selection, validation=measured, more=more)


def _held_out(task: Task, train: Examples, share: float, key: str) -> tuple[Examples, Examples]:
    return train.held_out(share, by_context=task.kind == "question-answering", key=key)


def load_validation(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    choose: Callable[[int], Sequence[int]] | None = None,
    *,
    is_training: bool = False,
) -> Split:
    """The validation split alone, or the training split, classes as in the model; `choose` picks
    indices of so many.
    """
    kind, validation = KINDS[task.kind], task.validation
    embeddings.check_library(task, is_training=False)
    if is_training or not isinstance(validation, str):
        examples = reading.read(task, task.train, kind.check_training or kind.check)
    else:
        examples = reading.read(task, validation, kind.check)
    if not isinstance(validation, str):
        parts = _held_out(task, examples, validation, "task.validation")
        examples = parts[0] if is_training else parts[1]
    if choose is not None:
        examples = examples.select(choose(len(examples.labels)))
    stated = task.classes or examples.names
    classes = classing.of_model(config, stated) if KINDS[task.kind].has_classes else ()
    return _split(task, tokenizer, config, examples, classes=classes, whose="the model")


def _split(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    examples: Examples,
    *,
    classes: tuple[str, ...],
    whose: str,
) -> Split:
    pad_token_id = fit_padding(config, tokenizer, task.sequence_tokens)
    kind, labels = KINDS[task.kind], examples.labels
    if kind.has_classes:
        labels = classing.indices(task, examples, classes, whose)
    if task.kind == "token-classification":
        examples = replace(examples, labels=[[classes[i] for i in tags] for tags in labels])
    chunks, num_misfits = [], 0
    for part in features.parts(examples):
        columns, misfits = kind.build(task, tokenizer, examples, part, labels[part])
        chunks.append(columns)
        num_misfits += misfits
    if num_misfits:
        what = kind.misfit.format(task)
        log.warning("%s: %d of %d examples %s", examples.source, num_misfits, len(labels), what)
    features.check_language(task, tokenizer, examples)
    return Split(
        features=Rows.of(chunks),
        examples=examples,
        classes=classes,
        collate=partial(features.collate, pad_token_id),
    )


def check_head(task: Task, config: PretrainedConfig) -> None:
    """Refuse a checkpoint that was not fine-tuned for this kind of task."""
    if task.kind == "embedding":
        return  # every encoder gives vectors
    head = KINDS[task.kind].head.__name__.removeprefix("AutoModelFor")
    if not any(head in name for name in config.architectures or ()):
        made_for = ", ".join(config.architectures or ("nothing",))
        raise ModelError(f"a model for {made_for} has no head for {task.kind}; fine-tune it first")
    is_number = task.kind == "regression"
    if head == "SequenceClassification" and (config.num_labels == 1) != is_number:
        wanted = "one" if is_number else "two or more"
        what = f"needs {wanted}, and this model has {config.num_labels} output(s)"
        raise ModelError(f"task.kind = {task.kind!r}: {what}")


def load_model(
    task: Task,
    init: str,
    classes: Sequence[str],
    *,
    is_trained: bool = False,
    dropout: float | None = None,
) -> PreTrainedModel:
    """The model with the task's head, in fp32; a head that doesn't fit is made anew. With
    `is_trained` (a teacher, a model to evaluate) everything must fit. `dropout` isn't saved.
    """
    kind, config = KINDS[task.kind], load_config(init)
    changed = dropouts(config, dropout)
    if kind.has_classes and is_trained:
        trained = classing.of_model(config, tuple(classes))
        if trained != tuple(classes):
            theirs, ours = ", ".join(trained), ", ".join(classes)
            what = f"its classes are in another order, {theirs}; the task's are {ours}"
            raise ModelError(f"model {init!r}: {what}")
    options = {"ignore_mismatched_sizes": True, **classing.head_options(task, classes), **changed}
    model, new = load_weights(kind.head, init, config, **options)
    if lost := new if is_trained and task.kind != "embedding" else of_encoder(model, new):
        what = f"{len(lost)} tensors are missing or of another shape, first {lost[0]}"
        raise ModelError(f"model {init!r}: {what}")
    choices = (2,) if task.kind == "multiple-choice" else ()
    outputs = try_out(model, init, (1, *choices, task.sequence_tokens))
    if missing := [name for name in kind.given or kind.outputs if name not in outputs]:
        raise ModelError(f"model {init!r}: a head of another form, it has no {missing[0]}")
    keep_values(model, config, changed)
    return model


def write_more(task: Task, model: PreTrainedModel, directory: Path) -> None:
    """Write the files that a finished model of this kind has beside those of transformers."""
    if task.kind == "embedding":
        hidden, pooling = model.config.hidden_size, embeddings.pooling_of(task)
        write_pooling(pooling, directory, hidden=hidden, tokens=task.sequence_tokens)


def call(task: Task, model: Callable[..., Any], batch: Batch, **options: Any) -> Any:
    """A model's outputs for a batch, by name; `options` are transformers' own."""
    inputs = inputs_of(batch)
    if task.kind == "embedding":
        return embeddings.call(task, model, inputs, **options)
    return model(**inputs, **options)


def logits_of(task: Task, outputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One tensor of logits, or two for question answering: starts and ends."""
    return tuple(outputs[name] for name in KINDS[task.kind].outputs)


def task_loss(task: Task, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Mean over targets in fp32: cross-entropy (the mean of starts and ends) or squared error;
    `embeddings.loss` says what it is there.
    """
    if task.kind == "embedding":
        return embeddings.loss(task, outputs, batch)
    logits = in_context(task, logits_of(task, outputs), batch)
    targets = targets_of(batch)
    if task.kind == "regression":
        return mse_loss(logits[0].squeeze(-1), targets[0])
    losses = [
        cross_entropy(rows.flatten(0, -2), target.flatten(), reduction="sum")
        for rows, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).mean() / max(1, num_targets(batch))
