"""SQuAD's answers and scores, by the definitions of the official scripts of v1.1 and v2.0.

The answer is the context's span with the highest start + end logit over all windows of a question,
among the `n_best` starts and ends of each. Where questions may have none (Rajpurkar et al., 2018),
"" is the answer when the lowest start + end logit of [CLS] leads by more than a threshold. Scores:
0..100, the best over the answers of a question.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from torch import Tensor

from opfa.tasks.features import Split
from opfa.tasks.predictions import AnswerPrediction, softmax
from opfa.tasks.recipe import Task

Span = tuple[float, int, int]  # start + end logit, first and last token
Measure = Callable[[str, str], float]


def answers(task: Task, logits: tuple[Tensor, ...], split: Split) -> list[AnswerPrediction]:
    """Each question's answer, "" for none."""
    found = []
    for best in _decode(task, logits, split):
        has_none = task.has_unanswerable and best.lead > task.no_answer_threshold
        start, end = (0, 0) if has_none else best.place
        text, score = ("", best.none_score) if has_none else (best.text, best.score)
        found.append(AnswerPrediction(prediction=text, score=score, start=start, end=end))
    return found


def score(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """The task's metrics; a best one comes with its threshold."""
    golds = [labels["text"] for labels in split.examples.labels]
    spans, leads = decode(task, logits, split)
    if not task.has_unanswerable:
        measures: dict[str, Measure] = {"exact_match": exact_match, "squad_f1": squad_f1}
        return {name: _mean(_best(measures[name], spans, golds)) for name in task.metrics}
    has_answer = np.array([bool(answers) for answers in golds])
    golds = [[gold for gold in answers if normalize(gold)] or [""] for answers in golds]
    given = _given(task, spans, leads)
    scores: dict[str, float] = {}
    for name, measure in {"exact_match": exact_match, "squad_f1": squad_f1_v2}.items():
        values = _best(measure, given, golds)
        best, threshold = _best_threshold(_best(measure, spans, golds), spans, leads, has_answer)
        scores |= {
            name: _mean(values),
            f"has_answer_{name}": _mean(values[has_answer]),
            f"best_{name}": best,
            f"best_{name}_threshold": threshold,
        }
        scores["no_answer_accuracy"] = _mean(values[~has_answer])
    extra = [f"{name}_threshold" for name in task.metrics if name.startswith("best_")]
    return {name: scores[name] for name in (*task.metrics, *extra)}


def _given(task: Task, spans: list[str], leads: list[float]) -> list[str]:
    if not task.has_unanswerable:
        return spans
    pairs = zip(spans, leads, strict=True)
    return ["" if lead > task.no_answer_threshold else span for span, lead in pairs]


def _mean(values: np.ndarray) -> float:
    return 100.0 * fmean(values.tolist()) if values.size else 0.0


def _best(measure: Measure, given: Sequence[str], golds: Sequence[Sequence[str]]) -> np.ndarray:
    pairs = zip(given, golds, strict=True)
    return np.array([max(measure(text, gold) for gold in answers) for text, answers in pairs])


def _best_threshold(
    values: np.ndarray, spans: Sequence[str], leads: Sequence[float], has_answer: np.ndarray
) -> tuple[float, float]:
    """The best score of any threshold, and that threshold; `values` are the spans' scores.

    As the official script: answer no question first, then one by one, the surest first. Its first
    threshold, 0, is for probabilities; here it is below all logits.
    """
    total = best = float((~has_answer).sum())
    threshold = min(leads) - 1.0
    for index in np.argsort(leads, kind="stable"):
        total += float(values[index]) if has_answer[index] else -float(bool(spans[index]))
        if total > best:
            best, threshold = total, float(leads[index])
    return 100.0 * best / len(spans), threshold


def decode(task: Task, logits: tuple[Tensor, ...], split: Split) -> tuple[list[str], list[float]]:
    """The best span's text for each question, and by how much [CLS] leads over it."""
    found = _decode(task, logits, split)
    return [best.text for best in found], [best.lead for best in found]


@dataclass
class _Best:
    """The best span of a question, and the least that speaks for no answer."""

    total: float = -np.inf  # start + end logit
    text: str = ""
    place: tuple[int, int] = (0, 0)  # in characters
    score: float = 0.0
    none: float = np.inf  # start + end logit of [CLS]
    none_score: float = 0.0

    @property
    def lead(self) -> float:
        return self.none - self.total


def _decode(task: Task, logits: tuple[Tensor, ...], split: Split) -> list[_Best]:
    contexts = split.examples.pairs
    assert contexts is not None, "the recipe asks for text_pair"
    found = [_Best() for _ in contexts]
    columns = (split.features[name] for name in ("example", "context", "offsets", "cls"))
    windows = zip(*(tensor.numpy() for tensor in logits), strict=True)
    for window, example, context, offsets, cls in zip(windows, *columns, strict=True):
        best = found[example]
        start, end = (padded[: len(offsets)] for padded in window)
        none = float(start[cls] + end[cls])
        if none < best.none:
            best.none, best.none_score = none, _score(start, end, cls, cls)
        total, first, last = _best_span(start, end, context, task.n_best, task.answer_tokens)
        if total > best.total:
            best.total, best.place = total, (offsets[first][0], offsets[last][1])
            best.text = contexts[example][slice(*best.place)]
            best.score = _score(start, end, first, last)
    return found


def _score(start: np.ndarray, end: np.ndarray, first: int, last: int) -> float:
    """p(start) * p(end) over the tokens of a window."""
    return float(softmax(start)[first] * softmax(end)[last])


def _best_span(
    start: np.ndarray, end: np.ndarray, context: Sequence[int], n_best: int, answer_tokens: int
) -> Span:
    """The window's best span; its logit is -inf if none of the n_best is possible."""
    starts = np.argsort(-start, kind="stable")[:n_best, None]
    ends = np.argsort(-end, kind="stable")[None, :n_best]
    is_possible = (starts >= context[0]) & (ends < context[1])
    is_possible &= (ends >= starts) & (ends < starts + answer_tokens)
    total = np.where(is_possible, start[starts] + end[ends], -np.inf)
    row, column = np.unravel_index(total.argmax(), total.shape)
    return float(total[row, column]), int(starts[row, 0]), int(ends[0, column])


def normalize(answer: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both have the same normal form, else 0."""
    return float(normalize(prediction) == normalize(answer))


def squad_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms (v1.1)."""
    words, gold = normalize(prediction).split(), normalize(answer).split()
    num_same = (Counter(words) & Counter(gold)).total()
    return 2 * num_same / (len(words) + len(gold)) if num_same else 0.0


def squad_f1_v2(prediction: str, answer: str) -> float:
    """The same, but two empty normal forms agree (v2.0)."""
    if not (normalize(prediction) and normalize(answer)):
        return exact_match(prediction, answer)
    return squad_f1(prediction, answer)
