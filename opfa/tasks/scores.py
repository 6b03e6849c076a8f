"""Scores of classes, numbers and tags, 0..1, correlations -1..1, as GLUE and CoNLL define them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import accuracy_score as tag_accuracy
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score as entity_precision
from seqeval.metrics import recall_score as entity_recall
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from opfa.tasks import predictions
from opfa.tasks.features import Split
from opfa.tasks.recipe import Task

NO_WARNING: dict[str, Any] = {"zero_division": 0}  # Any: seqeval annotates it as str only
TAG_SCORES: dict[str, Any] = {
    "entity_f1": partial(entity_f1, **NO_WARNING),
    "entity_precision": partial(entity_precision, **NO_WARNING),
    "entity_recall": partial(entity_recall, **NO_WARNING),
    "accuracy": tag_accuracy,
}


def of_classes(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """Metrics of the likeliest class, or choice."""
    targets, indices = np.asarray(split.features["labels"]), logits[0].argmax(-1).numpy()
    scores = {"accuracy": accuracy_score, "matthews": matthews_corrcoef, "f1": _f1(task, split)}
    return {name: float(scores[name](targets, indices)) for name in task.metrics}


def _f1(task: Task, split: Split) -> Callable[[np.ndarray, np.ndarray], Any]:
    """F1 of the task's or data set's second class of two (the model may have them the other way
    round); else the macro mean.
    """
    stated, classes = task.classes or split.examples.names, split.classes
    kept = {"labels": range(len(classes)), "zero_division": 0}
    if len(classes) != 2:
        return partial(f1_score, average="macro", **kept)
    second = classes.index(stated[1]) if set(stated) == set(classes) else 1
    return partial(f1_score, average="binary", pos_label=second, **kept)


def of_numbers(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """Correlations of the predicted numbers with those of the examples."""
    return correlations(task, logits[0].squeeze(-1).numpy(), split)


def correlations(task: Task, values: np.ndarray, split: Split) -> dict[str, float]:
    """Of one number for each example; one with a constant is undefined and counts as 0."""
    targets = np.asarray(split.features["labels"])
    return {name: _correlation(name, values, targets) for name in task.metrics}


def _correlation(name: str, values: np.ndarray, targets: np.ndarray) -> float:
    if np.ptp(values) == 0.0 or np.ptp(targets) == 0.0:
        return 0.0
    measure = {"pearson": pearsonr, "spearman": spearmanr}[name]
    return float(measure(values, targets)[0])


def of_tags(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """CoNLL's scores of whole entities, and the accuracy of single tags. Every word counts."""
    predicted = [found.prediction for found in predictions.tags(task, logits, split)]
    golds = split.examples.labels
    return {name: float(TAG_SCORES[name](golds, predicted)) for name in task.metrics}
