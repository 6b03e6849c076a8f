"""A task as data: kinds of tasks as a table, splits, the model with its head, and the loss."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opfa.data.order import HELD_OUT, generator
from opfa.errors import DataError, ModelError
from opfa.models.configs import load_config
from opfa.models.encoders import HEADS, load_weights, of_encoder
from opfa.models.fit import fit_tokenizer
from opfa.models.pretraining import dropouts, keep_values
from opfa.models.skeleton import try_out
from opfa.tasks import beginnings, features, scores, squad
from opfa.tasks import classes as classing
from opfa.tasks import examples as reading
from opfa.tasks.examples import Check, Examples
from opfa.tasks.features import DECODING, NO_LABEL, NOWHERE, TARGETS, Batch, Build, Split
from opfa.tasks.recipe import Task

CHUNK = 1_000  # examples that are tokenized at once, if they aren't long
CHUNK_CHARACTERS = 4 << 20  # with their windows about 500 MB
UNKNOWN = 0.2  # more tokens that are none of the vocabulary's are worth a warning
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All that tells one kind of task from another: how an example is checked and tokenized, the
    head with its outputs, the scores, and what is answered.
    """

    check: Check
    build: Build
    misfit: str  # what is wrong with an example that doesn't fit
    head: Any  # one of transformers' Auto classes, which share no base
    head_name: str
    outputs: tuple[str, ...] = ("logits",)
    has_classes: bool = False
    score: Callable[[Task, tuple[Tensor, ...], Split], dict[str, float]]
    answers: Callable[[Task, tuple[Tensor, ...], Split], list[Any]]  # one for each example


CUT = "are longer than sequence_tokens = {0.sequence_tokens}; the rest of them is cut off"
KINDS = {
    "classification": Kind(
        check=reading.classified,
        build=features.sequences,
        misfit=CUT,
        head=HEADS["SequenceClassification"],
        head_name="SequenceClassification",
        has_classes=True,
        score=scores.of_classes,
        answers=scores.likeliest,
    ),
    "regression": Kind(
        check=reading.measured,
        build=features.sequences,
        misfit=CUT,
        head=HEADS["SequenceClassification"],
        head_name="SequenceClassification",
        score=scores.of_numbers,
        answers=scores.numbers,
    ),
    "question-answering": Kind(
        check=reading.answered,
        build=features.windows,
        misfit="have an answer that no window holds whole; windows overlap by {0.stride_tokens}",
        head=HEADS["QuestionAnswering"],
        head_name="QuestionAnswering",
        outputs=("start_logits", "end_logits"),
        score=squad.score,
        answers=squad.answers,
    ),
    "token-classification": Kind(
        check=reading.tagged,
        build=features.tagged_words,
        misfit=CUT,
        head=HEADS["TokenClassification"],
        head_name="TokenClassification",
        has_classes=True,
        score=scores.of_tags,
        answers=scores.tags,
    ),
    "multiple-choice": Kind(
        check=reading.chosen,
        build=features.choices,
        misfit=CUT,
        head=HEADS["MultipleChoice"],
        head_name="MultipleChoice",
        score=scores.of_classes,
        answers=scores.likeliest,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The splits of a fine-tuning run.

    `selection` is what runs are compared on: the validation split, or training examples held out.
    """

    train: Split
    selection: Split
    validation: Split
    more: dict[str, Split]


def load(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    holdout: float = 0.0,
) -> Data:
    """Read all splits; classes come from the task or the training split.

    Which examples are held out doesn't depend on the recipe's seed, so that runs compare.
    """
    check = KINDS[task.kind].check
    train, validation = (reading.read(task, name, check) for name in (task.train, task.validation))
    more = {name: reading.read(task, split, check) for name, split in task.more_validation.items()}
    classes = classing.of_training(task, train) if KINDS[task.kind].has_classes else ()
    split = partial(_split, task, tokenizer, config, classes=classes, whose="the training examples")
    splits = {"validation": split(validation), "more": {n: split(e) for n, e in more.items()}}
    splits["selection"] = splits["validation"]
    if holdout:
        train, held = _held_out(task, train, holdout)
        splits["selection"] = split(held)
    training = split(train)
    columns = [name for name in training.features.column_names if name not in DECODING]
    training = replace(training, features=training.features.select_columns(columns))
    return Data(train=training, **splits)


def _held_out(task: Task, train: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Two parts; all questions of one context are in the same one."""
    is_answering = task.kind == "question-answering"
    groups = train.pairs if is_answering and train.pairs else list(range(len(train.texts)))
    names = list(dict.fromkeys(groups))
    num_held = round(fraction * len(names))
    if not 0 < num_held < len(names):
        what = "contexts" if is_answering else "examples"
        raise DataError(
            f"{train.source}: selection.holdout = {fraction} of {len(names)} {what} is "
            f"{num_held}; both parts need some"
        )
    order = generator(0, HELD_OUT).permutation(len(names)).tolist()
    held = {names[index] for index in order[:num_held]}
    parts = [
        [i for i, group in enumerate(groups) if (group in held) == is_held] for is_held in (0, 1)
    ]
    source = f"{train.source} (held out)"
    return train.select(parts[0]), replace(train.select(parts[1]), source=source)


def load_validation(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    choose: Callable[[int], Sequence[int]] | None = None,
) -> Split:
    """Read the validation split alone, with the classes in the order of a trained model; with
    `choose`, the examples at the places that it gives of so many.
    """
    validation = reading.read(task, task.validation, KINDS[task.kind].check)
    if choose is not None:
        validation = validation.select(choose(len(validation.labels)))
    stated = task.classes or validation.names
    classes = classing.of_model(config, stated) if KINDS[task.kind].has_classes else ()
    return _split(task, tokenizer, config, validation, classes=classes, whose="the model")


def _split(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    examples: Examples,
    *,
    classes: tuple[str, ...],
    whose: str,
) -> Split:
    fit_tokenizer(config, tokenizer, task.sequence_tokens)
    pad_token_id = tokenizer.pad_token_id
    if not (isinstance(pad_token_id, int) and tokenizer.is_fast):
        raise ModelError("the tokenizer needs a padding token and the fast (`tokenizers`) form")
    kind = KINDS[task.kind]
    labels = examples.labels
    if kind.has_classes:
        labels = classing.indices(task, examples, classes, whose)
    if task.kind == "token-classification":
        examples = replace(examples, labels=[[classes[i] for i in tags] for tags in labels])
    chunks, num_misfits = [], 0
    for part in _parts(examples):
        columns, misfits = kind.build(task, tokenizer, examples, part, labels[part])
        chunks.append(Dataset.from_dict(dict(columns)))
        num_misfits += misfits
    if num_misfits:
        what = kind.misfit.format(task)
        log.warning("%s: %d of %d examples %s", examples.source, num_misfits, len(labels), what)
    _check_unknown(task, tokenizer, examples)
    return Split(
        features=concatenate_datasets(chunks),
        examples=examples,
        classes=classes,
        collate=partial(features.collate, pad_token_id),
    )


def _parts(examples: Examples) -> Iterator[slice]:
    """All examples, as many at once as are tokenized at once."""
    pairs = examples.pairs or [""] * len(examples.texts)
    start = num_characters = 0
    for index, example in enumerate(zip(examples.texts, pairs, strict=True)):
        num = _num_characters(example)
        if index > start and (index - start == CHUNK or num_characters + num > CHUNK_CHARACTERS):
            yield slice(start, index)
            start, num_characters = index, 0
        num_characters += num
    yield slice(start, len(examples.texts))


def _num_characters(value: str | Sequence[Any]) -> int:  # Any: a text, or texts in lists
    return len(value) if isinstance(value, str) else sum(map(_num_characters, value))


def _check_unknown(task: Task, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
    """Warn of a tokenizer that doesn't know this language."""
    most = beginnings.CHARACTERS * task.sequence_tokens  # the beginning of a text tells
    texts = [t if isinstance(t, str) else " ".join(t[:most]) for t in examples.texts[:CHUNK]]
    sample = [text[:most] for text in texts]
    ids = [i for row in tokenizer(sample, verbose=False)["input_ids"] for i in row]
    share = ids.count(tokenizer.unk_token_id) / len(ids)
    if share > UNKNOWN:
        log.warning("%s: the tokenizer doesn't know %.0f %% of it", examples.source, 100 * share)


def check_head(task: Task, config: PretrainedConfig) -> None:
    """Refuse a checkpoint that was not fine-tuned for this kind of task."""
    head = KINDS[task.kind].head_name
    if not any(head in name for name in config.architectures or ()):
        made_for = ", ".join(config.architectures or ("nothing",))
        raise ModelError(f"a model for {made_for} has no head for {task.kind}; fine-tune it first")
    is_number = task.kind == "regression"
    if head == "SequenceClassification" and (config.num_labels == 1) != is_number:
        wanted = "one" if is_number else "two or more"
        raise ModelError(
            f"task.kind = {task.kind!r}: needs {wanted}, and this model has {config.num_labels} "
            "output(s)"
        )


def load_model(
    task: Task,
    init: str,
    classes: Sequence[str],
    *,
    is_trained: bool = False,
    dropout: float | None = None,
) -> PreTrainedModel:
    """The model with the task's head, fp32, and for training perhaps with another dropout than its
    configuration has, which stays as it is. A head that doesn't fit is made anew.

    With `is_trained` (a teacher, or a model to evaluate) everything must fit, classes included.
    """
    kind, config = KINDS[task.kind], load_config(init)
    changed = dropouts(config, dropout)
    options: dict[str, Any] = {}
    if kind.has_classes:
        trained = classing.of_model(config, tuple(classes)) if is_trained else classes
        if tuple(trained) != tuple(classes):
            raise ModelError(
                f"model {init!r}: its classes are in another order, {', '.join(trained)}; the "
                f"task's are {', '.join(classes)}"
            )
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {name: index for index, name in enumerate(classes)}
    if task.kind == "classification":
        options["problem_type"] = "single_label_classification"
    elif task.kind == "regression":
        options = {"num_labels": 1, "problem_type": "regression"}
    model, new = load_weights(
        kind.head, init, config, ignore_mismatched_sizes=True, **options, **changed
    )
    if lost := new if is_trained else of_encoder(model, new):
        what = f"{len(lost)} tensors are missing or of another shape, first {lost[0]}"
        raise ModelError(f"model {init!r}: {what}")
    shape = (
        (1, 2, task.sequence_tokens)
        if task.kind == "multiple-choice"
        else (1, task.sequence_tokens)
    )
    outputs = try_out(model, init, shape)
    if missing := [name for name in kind.outputs if name not in outputs]:
        raise ModelError(f"model {init!r}: a head of another form, it has no {missing[0]}")
    keep_values(model, config, changed)
    return model


def inputs_of(batch: Batch) -> Batch:
    """What the model is called with: everything but the targets."""
    return {name: tensor for name, tensor in batch.items() if name not in TARGETS}


def targets_of(batch: Batch) -> list[Tensor]:
    """The targets, in the order of the outputs."""
    return [batch[name] for name in TARGETS if name in batch]


def num_targets(batch: Batch) -> int:
    """How many predictions a batch asks for: examples, windows, or words with a tag."""
    return int(is_target(batch).sum())


def is_target(batch: Batch) -> Tensor:
    """Where a batch asks for a prediction; numbers are all asked for."""
    targets = targets_of(batch)[0]
    return (targets != NO_LABEL) | torch.tensor(targets.is_floating_point(), device=targets.device)


def in_context(task: Task, logits: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Logits as the loss takes them, fp32: no answer begins or ends where no token is.

    So padding neither counts nor learns, and the loss is the same however a batch is cut.
    """
    logits = [tensor.float() for tensor in logits]
    if task.kind == "question-answering" and "attention_mask" in batch:
        padding = batch["attention_mask"] == 0
        logits = [tensor.masked_fill(padding, NOWHERE) for tensor in logits]
    return logits


def logits_of(task: Task, outputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One tensor of logits, or two for question answering: starts and ends."""
    return tuple(outputs[name] for name in KINDS[task.kind].outputs)


def task_loss(task: Task, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Mean loss over targets, fp32: cross-entropy (of starts and ends: their mean) or squared
    error.
    """
    logits = in_context(task, logits_of(task, outputs), batch)
    targets = targets_of(batch)
    if task.kind == "regression":
        return mse_loss(logits[0].squeeze(-1), targets[0])
    losses = [
        cross_entropy(rows.flatten(0, -2), target.flatten(), reduction="sum")
        for rows, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).mean() / max(1, num_targets(batch))
