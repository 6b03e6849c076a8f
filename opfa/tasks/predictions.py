"""What a model says of one example: a type for each kind of task, whose fields become columns.

A score is the probability of what is said, and `probabilities` are those of everything that could
have been: softmax of the logits, as transformers' `pipeline(top_k=None)` gives them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from opfa.tasks.classes import OUTSIDE
from opfa.tasks.features import NO_LABEL, Split
from opfa.tasks.recipe import Task

ALL = "probabilities"  # the field that is a column only where it is asked for


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one example, whatever the kind of task."""

    prediction: Any  # of each kind its own type

    def columns(self, *, has_all: bool = False) -> dict[str, Any]:
        """Its fields by name; with `has_all` also the probabilities."""
        return {name: getattr(self, name) for name in names_of(type(self), has_all=has_all)}


@dataclass(frozen=True, kw_only=True)
class ClassPrediction(Prediction):
    """The likeliest class."""

    prediction: str
    score: float
    probabilities: dict[str, float]  # by class, in the order of the model


@dataclass(frozen=True, kw_only=True)
class NumberPrediction(Prediction):
    """A number."""

    prediction: float


@dataclass(frozen=True, kw_only=True)
class VectorPrediction(Prediction):
    """The vector of a text [hidden size], of length 1 where the model normalizes."""

    prediction: list[float]


@dataclass(frozen=True, kw_only=True)
class AnswerPrediction(Prediction):
    """A part of the context: characters `start` to `end`, both 0 where the question has no answer.

    The score is p(first token) * p(last token) in its window; of no answer, of [CLS] for both.
    """

    prediction: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class TagsPrediction(Prediction):
    """A tag for each word; a word that was cut off, or has no token, is outside with score 0."""

    prediction: list[str]
    score: list[float]
    probabilities: list[dict[str, float]]  # by tag; empty where a word was cut off


@dataclass(frozen=True, kw_only=True)
class ChoicePrediction(Prediction):
    """The position of the likeliest choice."""

    prediction: int
    score: float
    probabilities: list[float]  # of each choice


def names_of(kind: type[Prediction], *, has_all: bool) -> list[str]:
    """The columns of a kind of predictions."""
    return [field.name for field in fields(kind) if has_all or field.name != ALL]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, fp32."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def classes(_: Task, logits: tuple[Tensor, ...], split: Split) -> list[ClassPrediction]:
    """Each example's class."""
    rows = logits[0].numpy()
    return [
        ClassPrediction(
            prediction=split.classes[best],
            score=shares[best],
            probabilities=dict(zip(split.classes, shares, strict=True)),
        )
        for best, shares in zip(rows.argmax(-1).tolist(), softmax(rows).tolist(), strict=True)
    ]


def numbers(_: Task, logits: tuple[Tensor, ...], __: Split) -> list[NumberPrediction]:
    """Each example's number."""
    return [NumberPrediction(prediction=value) for value in logits[0].squeeze(-1).tolist()]


def choices(_: Task, logits: tuple[Tensor, ...], __: Split) -> list[ChoicePrediction]:
    """Each example's choice."""
    rows = logits[0].numpy()
    return [
        ChoicePrediction(prediction=best, score=shares[best], probabilities=shares)
        for best, shares in zip(rows.argmax(-1).tolist(), softmax(rows).tolist(), strict=True)
    ]


def tags(_: Task, logits: tuple[Tensor, ...], split: Split) -> list[TagsPrediction]:
    """A tag for each word."""
    columns = split.features["words"], split.features["labels"], split.examples.labels
    return [
        _tagged(row, words, labels, len(tags), split.classes)
        for row, words, labels, tags in zip(logits[0].numpy(), *columns, strict=True)
    ]


def _tagged(
    logits: np.ndarray,
    words: Sequence[int],
    labels: Sequence[int],
    num_words: int,
    classes: Sequence[str],
) -> TagsPrediction:
    rows = logits[[place for place, label in enumerate(labels) if label != NO_LABEL]]
    likely: list[int] = rows.argmax(-1).tolist()
    found = zip(words, likely, softmax(rows).tolist(), strict=True)
    likeliest, scores = [OUTSIDE] * num_words, [0.0] * num_words
    probabilities: list[dict[str, float]] = [{} for _ in range(num_words)]
    for word, best, shares in found:
        likeliest[word], scores[word] = classes[best], shares[best]
        probabilities[word] = dict(zip(classes, shares, strict=True))
    return TagsPrediction(prediction=likeliest, score=scores, probabilities=probabilities)
