"""What an example of each kind of task must be.

A class is known by its name, without blanks at its ends; a number in the data is such a name or,
where no class is called by a number, a position in `task.classes`. A pair may have one empty half
(QQP has two of these), never two. A check raises ValueError, "'column' is ...". What an example
asks is read apart from its label, since `opfa predict` has none.
"""

import math
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from opfa.errors import shown
from opfa.tasks.recipe import Task

LONGEST_CONTEXT = 1 << 20  # characters; each question about it has a thousand windows of 384 tokens
Row = Mapping[str, Any]  # Any: whatever the data hold
Names = tuple[str, ...]
Asked = tuple[Any, Any]  # Any: text and pair of an example, by kind of task
Parts = tuple[Any, Any, Any]  # and its label
Ask = Callable[[Task, Row], Asked]
Check = Callable[[Task, Row, Names], Parts]


class ColumnError(ValueError):
    """A column that isn't there; the text is its name."""


class MisplacedError(ValueError):
    """An answer that is not in its context; these are counted."""


def classified(task: Task, row: Row, names: Names) -> Parts:
    """A text or a pair of texts, and the name of its class."""
    return *asked_texts(task, row), _class(task, _value(row, task.label), names)


def measured(task: Task, row: Row, _: Names) -> Parts:
    """A text or a pair of texts, and a finite number."""
    return *asked_texts(task, row), _number(task, row)


def embedded(task: Task, row: Row, _: Names) -> Parts:
    """A pair of texts, and its grade where the metrics need one."""
    return _pair(task, row, is_graded=task.validation_form == "graded pairs")


def embedded_training(task: Task, row: Row, _: Names) -> Parts:
    """What the loss needs: a pair and its grade, a pair, or a text or two for a teacher."""
    if task.train_text is not None:
        return _text(row, task.train_text), None, 1.0
    return _pair(task, row, is_graded=task.train_form == "graded pairs")


def _pair(task: Task, row: Row, *, is_graded: bool) -> Parts:
    """Two texts, both not empty, and their grade; 1 where there are no grades."""
    grade, most = _number(task, row) if is_graded else 1.0, task.highest_grade or 1.0
    if is_graded and task.loss == "cosine" and abs(grade) > most:
        what = f"must be within -{most:g} and {most:g}, cosines of -1 and 1 (task.highest_grade)"
        raise ValueError(f"{task.label!r} {what} (got {grade:g})")
    return *asked_each(task, row), grade


def _number(task: Task, row: Row) -> float:
    value = _value(row, task.label)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{task.label!r} is not a finite number (got {shown(value)})")
    return number


def tagged(task: Task, row: Row, names: Names) -> Parts:
    """A list of words, and the tag of each."""
    (found, _), tags = asked_words(task, row), _list(row, task.label)
    if len(found) != len(tags):
        raise ValueError(f"{len(found)} words in {task.text!r}, {len(tags)} tags in {task.label!r}")
    return found, None, [_class(task, tag, names) for tag in tags]


def chosen(task: Task, row: Row, _: Names) -> Parts:
    """A text, its choices, and the position of the right one (a number from 0, or a letter)."""
    text, choices = asked_choices(task, row)
    value = _value(row, task.label)
    value = value.strip() if isinstance(value, str) else value
    letters = string.ascii_uppercase[: len(choices)]
    position = letters.find(value) if isinstance(value, str) and len(value) == 1 else -1
    if position < 0 and re.fullmatch(r"\d{1,9}", str(value)):
        position = int(value)
    if not 0 <= position < len(choices):
        allowed = f"0 to {len(choices) - 1}, or A to {letters[-1]}"
        raise ValueError(f"{task.label!r} must be {allowed} (got {shown(value)})")
    return text, choices, position


def answered(task: Task, row: Row, _: Names) -> Parts:
    """A question, its context, and SQuAD's answers, each where it says."""
    asked, context = asked_question(task, row)
    fields = _value(row, task.label)
    fields = fields if isinstance(fields, dict) else {}
    texts, starts = fields.get("text"), fields.get("answer_start")
    least = 0 if task.has_unanswerable else 1
    if not (isinstance(texts, list) and isinstance(starts, list)) or len(texts) != len(starts):
        raise ValueError(f"{task.label!r} must be {{'text': [...], 'answer_start': [...]}}")
    if len(texts) < least:
        advice = "task.has_unanswerable = true lets questions have none"
        raise ValueError(f"{task.label!r} must hold at least one answer; {advice}")
    pairs = zip(texts, starts, strict=True)
    answers = [_answer(task, context, text, start) for text, start in pairs]
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return asked, context, {"text": texts, "answer_start": starts}


def asked_texts(task: Task, row: Row) -> Asked:
    """A text, or a pair of texts."""
    if task.text_pair is None:
        return _text(row, task.text), None
    both = _text(row, task.text, True), _text(row, task.text_pair, True)
    if not "".join(both).strip():
        raise ValueError(f"{task.text!r} and {task.text_pair!r} are both empty")
    return both


def asked_each(task: Task, row: Row) -> Asked:
    """A text, or two that are embedded each by itself."""
    pair = None if task.text_pair is None else _text(row, task.text_pair)
    return _text(row, task.text), pair


def asked_words(task: Task, row: Row) -> Asked:
    """A list of words."""
    found = _list(row, task.text)
    if not all(isinstance(word, str) and word.strip() for word in found):
        raise ValueError(f"{task.text!r} has a word that is no text or empty (got {shown(found)})")
    return found, None


def asked_sentence(task: Task, row: Row) -> Asked:
    """A list of words, or a text that is cut at its blanks."""
    value = row.get(task.text)
    if isinstance(value, str) and value.strip():
        return value.split(), None
    return asked_words(task, row)


def asked_choices(task: Task, row: Row) -> Asked:
    """A text, and its choices with how each begins."""
    lists = len(task.choices) == 1
    choices = _list(row, task.choices[0]) if lists else [_value(row, c) for c in task.choices]
    start = _text(row, task.text_pair) + " " if task.text_pair else ""
    if len(choices) < 2 or not all(isinstance(c, str) and (start + c).strip() for c in choices):
        raise ValueError(f"{', '.join(map(repr, task.choices))} must be two or more texts")
    return _text(row, task.text), [start + each for each in choices]


def asked_question(task: Task, row: Row) -> Asked:
    """A question and its context."""
    assert task.text_pair is not None, "the recipe asks for it"
    asked, context = _text(row, task.text), _text(row, task.text_pair)
    for column, text in ((task.text, asked), (task.text_pair, context)):
        if len(text) > LONGEST_CONTEXT:
            most = f"windows are made of at most {LONGEST_CONTEXT:,}"
            raise ValueError(f"{column!r} has {len(text):,} characters; {most}")
    return asked, context


def _answer(task: Task, context: str, text: object, start: object) -> tuple[str, int]:
    """An answer without the blanks at its ends, and where it begins."""
    if not (isinstance(text, str) and isinstance(start, int) and text.strip() and start >= 0):
        found = f"{shown(text)} and {shown(start)}"
        raise ValueError(f"{task.label!r} must hold texts and positions (got {found})")
    if not context.startswith(text, start):
        what = f"which is not at character {start} of the context"
        raise MisplacedError(f"{task.label!r} says {shown(text)}, {what}")
    return text.strip(), start + len(text) - len(text.lstrip())


def _value(row: Row, column: str) -> Any:  # Any: unchecked
    if column not in row:
        raise ColumnError(column)
    if row[column] is None or row[column] == "":
        raise ValueError(f"{column!r} is {'missing' if row[column] is None else 'empty'}")
    return row[column]


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = "" if may_be_empty and row.get(column) == "" else _value(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is not a text (got {shown(value)})")
    if not (value.strip() or may_be_empty):
        raise ValueError(f"{column!r} is empty")
    return value


def _list(row: Row, column: str) -> list[Any]:  # Any: unchecked
    value = _value(row, column)
    if not (isinstance(value, list) and value):
        raise ValueError(f"{column!r} is not a list, or an empty one (got {shown(value)})")
    return value


def _class(task: Task, value: Any, names: Names) -> str:  # Any: unchecked
    if not isinstance(value, str | int):
        raise ValueError(f"{task.label!r} is neither a name nor an integer (got {shown(value)})")
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if not (name := str(value).strip()):
        raise ValueError(f"{task.label!r} is empty")
    return name
