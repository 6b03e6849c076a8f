"""Answers by kind of task, as opfa/tasks/predictions.py and squad.py make them of logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .asking import Asked
from .model import Model

OUTSIDE = "O"  # the tag of a word that was cut off
ALL = "probabilities"
Answer = dict[str, Any]  # Any: what JSON can hold


def classes(model: Model, asked: Sequence[Asked], has_all: bool) -> list[Answer]:
    """Each input's likeliest class."""
    outputs = model.outputs([[model.encoded(*pair)] for pair in asked], "logits")
    return [_named(model.task.classes, row, has_all) for (row,) in outputs]


def numbers(model: Model, asked: Sequence[Asked], _: bool) -> list[Answer]:
    """Each input's number."""
    outputs = model.outputs([[model.encoded(*pair)] for pair in asked], "logits")
    return [{"prediction": float(row[0])} for (row,) in outputs]


def choices(model: Model, asked: Sequence[Asked], has_all: bool) -> list[Answer]:
    """The position of each input's likeliest choice."""
    num = len(asked[0][1])
    for index, (_, of_one) in enumerate(asked):
        if len(of_one) != num:
            raise ValueError(f"inputs[{index}]: has {len(of_one)} choices, the first one {num}")
    groups = [[model.encoded(text, choice) for choice in of_one] for text, of_one in asked]
    found = []
    for (row,) in model.outputs(groups, "logits"):
        best, shares = int(row.argmax()), softmax(row).tolist()
        answer = {"prediction": best, "score": shares[best]}
        found.append({**answer, ALL: shares} if has_all else answer)
    return found


def vectors(model: Model, asked: Sequence[Asked], _: bool) -> list[Answer]:
    """The vector of each text; of each pair the cosine."""
    texts = [text for pair in asked for text in pair if text is not None]
    outputs = model.outputs([[model.encoded(text)] for text in texts], "sentence_embedding")
    rows = iter(row for (row,) in outputs)
    return [
        {"prediction": next(rows).tolist() if pair is None else _cosine(next(rows), next(rows))}
        for _, pair in asked
    ]


def tags(model: Model, asked: Sequence[Asked], has_all: bool) -> list[Answer]:
    """A tag for each word, which stands on its first token."""
    encodings = [model.words(words) for words, _ in asked]
    outputs = model.outputs([[encoding] for encoding in encodings], "logits")
    found = []
    for (words, _), encoding, (rows,) in zip(asked, encodings, outputs, strict=True):
        answer: Answer = {"prediction": [OUTSIDE] * len(words), "score": [0.0] * len(words)}
        if has_all:
            answer[ALL] = [{} for _ in words]
        of_token = encoding.word_ids
        for place, (word, before) in enumerate(zip(of_token, [None, *of_token], strict=False)):
            if word is not None and word != before:
                for key, value in _named(model.task.classes, rows[place], has_all).items():
                    answer[key][word] = value
        found.append(answer)
    return found


@dataclass
class _Best:
    """The best span of a question, and the least that speaks for no answer."""

    total: float = -np.inf  # start + end logit
    place: tuple[int, int] = (0, 0)  # in characters
    score: float = 0.0
    none: float = np.inf  # start + end logit of [CLS]
    none_score: float = 0.0


def spans(model: Model, asked: Sequence[Asked], _: bool) -> list[Answer]:
    """Each question's answer: the span of its context with the highest start + end logit."""
    task, windows, owners = model.task, [], []
    for index, (question, context) in enumerate(asked):
        try:
            of_one = model.windows(question, context)
        except ValueError as error:
            raise ValueError(f"inputs[{index}]: {error}") from None
        windows += of_one
        owners += [index] * len(of_one)
    outputs = model.outputs([[window] for window in windows], "start_logits", "end_logits")
    found = [_Best() for _ in asked]
    for window, owner, logits in zip(windows, owners, outputs, strict=True):
        size = len(window.ids)
        start, end = (row[:size] for row in logits)
        best, cls = found[owner], window.ids.index(task.cls_token_id)
        if (none := float(start[cls] + end[cls])) < best.none:
            best.none, best.none_score = none, _span_score(start, end, cls, cls)
        total, first, last = _best_span(task, start, end, window.sequence_ids)
        if total > best.total:
            best.total, best.score = total, _span_score(start, end, first, last)
            best.place = window.offsets[first][0], window.offsets[last][1]
    return [_answer(task, best, context) for best, (_, context) in zip(found, asked, strict=True)]


def _answer(task: Any, best: _Best, context: str) -> Answer:  # Any: a namespace
    has_none = task.has_unanswerable and best.none - best.total > task.no_answer_threshold
    (start, end), score = ((0, 0), best.none_score) if has_none else (best.place, best.score)
    return {"prediction": context[start:end], "score": score, "start": start, "end": end}


def _best_span(
    task: Any, start: np.ndarray, end: np.ndarray, parts: Sequence[int | None]
) -> tuple[float, int, int]:  # Any: a namespace
    """Logit, first and last token of the window's best span; -inf if none is possible."""
    context = parts.index(1) if 1 in parts else len(parts)
    stop = context + parts.count(1)
    starts = np.argsort(-start, kind="stable")[: task.n_best, None]
    ends = np.argsort(-end, kind="stable")[None, : task.n_best]
    is_possible = (starts >= context) & (ends < stop)
    is_possible &= (ends >= starts) & (ends < starts + task.answer_tokens)
    total = np.where(is_possible, start[starts] + end[ends], -np.inf)
    row, column = np.unravel_index(total.argmax(), total.shape)
    return float(total[row, column]), int(starts[row, 0]), int(ends[0, column])


def _span_score(start: np.ndarray, end: np.ndarray, first: int, last: int) -> float:
    """p(first) * p(last) over the tokens of a window."""
    return float(softmax(start)[first] * softmax(end)[last])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, fp32."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _named(names: Sequence[str], logits: np.ndarray, has_all: bool) -> Answer:
    """The likeliest class, its probability, and perhaps those of all."""
    best, shares = int(logits.argmax()), softmax(logits).tolist()
    answer = {"prediction": names[best], "score": shares[best]}
    return {**answer, ALL: dict(zip(names, shares, strict=True))} if has_all else answer


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    lengths = (max(float(np.linalg.norm(vector)), 1e-8) for vector in (one, other))
    return float(one @ other) / float(np.prod(list(lengths)))


ANSWER: dict[str, Callable[[Model, Sequence[Asked], bool], list[Answer]]] = {
    "classification": classes,
    "regression": numbers,
    "question-answering": spans,
    "token-classification": tags,
    "multiple-choice": choices,
    "embedding": vectors,
}
