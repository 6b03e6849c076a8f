"""What an input asks, by kind of task: checked as `opfa predict` checks it (opfa/tasks/checks.py).

An input is a row by column, or a text alone. A list of two is a text and its pair or its choices;
for tags a list is one of words.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

LONGEST_CONTEXT = 1 << 20  # characters
SHOWN = 100  # characters of a value in a message
Row = Mapping[str, Any]  # Any: unchecked
Asked = tuple[Any, Any]  # Any: a text and its pair, by kind of task


def row_of(task: SimpleNamespace, item: Any) -> Row:  # Any: unchecked
    """An input by column."""
    if isinstance(item, dict):
        return item
    second = task.choices[0] if len(task.choices) == 1 else task.text_pair
    is_words = task.kind == "token-classification"
    if isinstance(item, list) and not is_words:
        if second is None or len(item) != 2:
            what = "give a text, or an object by column"
            what = what if second is None else "a list has two parts, a text and its pair"
            raise ValueError(f"{str(item)[:SHOWN]}: {what}")
        return {task.text: item[0], second: item[1]}
    return {task.text: item}


def texts(task: SimpleNamespace, row: Row) -> Asked:
    """A text, or a pair of texts."""
    if task.text_pair is None:
        return _text(row, task.text), None
    both = _text(row, task.text, True), _text(row, task.text_pair, True)
    if not "".join(both).strip():
        raise ValueError(f"{task.text!r} and {task.text_pair!r} are both empty")
    return both


def each(task: SimpleNamespace, row: Row) -> Asked:
    """A text that gets a vector, or two that are compared."""
    pair = None if task.text_pair is None else _text(row, task.text_pair)
    return _text(row, task.text), pair


def words(task: SimpleNamespace, row: Row) -> Asked:
    """A list of words, or a text that is cut at its blanks."""
    value = row.get(task.text)
    if isinstance(value, str) and value.strip():
        return value.split(), None
    found = _list(row, task.text)
    if not all(isinstance(word, str) and word.strip() for word in found):
        raise ValueError(f"{task.text!r} has a word that is no text or empty")
    return found, None


def choices(task: SimpleNamespace, row: Row) -> Asked:
    """A text, and its choices with how each begins."""
    is_list = len(task.choices) == 1
    found = _list(row, task.choices[0]) if is_list else [_value(row, c) for c in task.choices]
    start = _text(row, task.text_pair) + " " if task.text_pair else ""
    if len(found) < 2 or not all(isinstance(c, str) and (start + c).strip() for c in found):
        raise ValueError(f"{', '.join(map(repr, task.choices))} must be two or more texts")
    return _text(row, task.text), [start + choice for choice in found]


def question(task: SimpleNamespace, row: Row) -> Asked:
    """A question and its context."""
    both = _text(row, task.text), _text(row, task.text_pair)
    for column, text in zip((task.text, task.text_pair), both, strict=True):
        if len(text) > LONGEST_CONTEXT:
            most = f"windows are made of at most {LONGEST_CONTEXT:,}"
            raise ValueError(f"{column!r} has {len(text):,} characters; {most}")
    return both


ASK: dict[str, Callable[[SimpleNamespace, Row], Asked]] = {
    "classification": texts,
    "regression": texts,
    "question-answering": question,
    "token-classification": words,
    "multiple-choice": choices,
    "embedding": each,
}


def _value(row: Row, column: str) -> Any:  # Any: unchecked
    if column not in row:
        there = ", ".join(map(str, row))[:SHOWN]
        raise ValueError(f"has no column {column!r}; there are {there or 'none'}")
    if row[column] is None or row[column] == "":
        raise ValueError(f"{column!r} is {'missing' if row[column] is None else 'empty'}")
    return row[column]


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = "" if may_be_empty and row.get(column) == "" else _value(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is not a text (got {str(value)[:SHOWN]})")
    if not (value.strip() or may_be_empty):
        raise ValueError(f"{column!r} is empty")
    return value


def _list(row: Row, column: str) -> list[Any]:  # Any: unchecked
    value = _value(row, column)
    if not (isinstance(value, list) and value):
        shown = str(value)[:SHOWN]
        raise ValueError(f"{column!r} is not a list, or an empty one (got {shown})")
    return value
