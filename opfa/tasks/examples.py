"""Examples of a task, checked as they are read.

A mistake in line 40,000 is found before a GPU works, and is named by file and line. A class is
known by its name, without blanks at its ends; a number in the data is such a name or, where no
class is called by a number, a position in `task.classes`. A pair may have one empty half (QQP has
two of these), never two.
"""

import hashlib
import json
import math
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, List, load_dataset
from pyarrow import Schema
from pyarrow.parquet import read_schema

from opfa.data.lines import check_plain
from opfa.data.records import read_records
from opfa.errors import DataError, opening, shown
from opfa.tasks.recipe import Task

MOST_BYTES = 4 << 30  # that one split takes in memory before it is tokenized
LONGEST_CONTEXT = 1 << 20  # characters; each question about it has a thousand windows of 384 tokens
Row = Mapping[str, Any]  # Any: whatever the data hold
Names = tuple[str, ...]
Parts = tuple[Any, Any, Any]  # Any: text, pair and label of an example, by kind of task
Check = Callable[[Task, Row, Names], Parts]  # raises ValueError, "'column' is ..."


class MisplacedError(ValueError):
    """An answer that is not in its context; these are counted."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One checked split, by column.

    `texts` are texts, or lists of words; `pairs` are texts, or lists of choices; `labels` are class
    names, lists of them, numbers, or SQuAD's answers.
    """

    source: str
    places: list[str]  # such as "line 17", for messages
    texts: list[Any]  # Any: str or list[str]
    pairs: list[Any] | None
    labels: list[Any]
    names: Names  # those of the data set's own ClassLabel feature, if it has one

    def sha256(self) -> str:
        """Digest of what a model can learn from, whatever file it came from."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.pairs or self.texts, self.labels, strict=True):
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "Examples":
        """Some of them, in this order."""

        def at(column: list[Any]) -> list[Any]:
            return [column[index] for index in indices]

        pairs = self.pairs and at(self.pairs)
        columns = {"places": at(self.places), "texts": at(self.texts), "labels": at(self.labels)}
        return replace(self, pairs=pairs, **columns)


def read(task: Task, split: str, check: Check) -> Examples:
    """Read and check one split: a file, or a split of the task's Hub data set."""
    source = f"{task.hub} [{split}]" if task.hub else split
    names, rows = _hub_rows(task, split) if task.hub else _file_rows(task, Path(split))
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{source}: class {twice[0]!r} stands twice among its classes' names")
    places, checked, misplaced, num_bytes = [], [], [], 0
    for where, row in rows:
        places.append(f"{where}, id {_id(row)}" if "id" in row else where)
        try:
            checked.append(check(task, row, names))
        except MisplacedError as error:
            misplaced.append(f"{places[-1]}: {error}" if not misplaced else "")
            continue
        except ValueError as error:
            raise DataError(f"{source}, {places[-1]}: {error}") from None
        num_bytes += _num_bytes((places[-1], checked[-1]))
        if num_bytes > MOST_BYTES:
            raise DataError(
                f"{source}, {places[-1]}: the examples up to here take more than {MOST_BYTES:,} "
                "bytes of memory, which is the most that one split may have"
            )
    if misplaced:
        num = (
            f"{len(misplaced)} of {len(places)} examples have an answer that is not in the context"
        )
        raise DataError(f"{source}: {num}; the first: {misplaced[0]}")
    if not checked:
        raise DataError(f"{source}: there are no examples in it")
    texts, pairs, labels = (list(column) for column in zip(*checked, strict=True))
    return Examples(
        source=source,
        places=places,
        texts=texts,
        pairs=None if pairs[0] is None else pairs,
        labels=labels,
        names=names,
    )


def _id(row: Row) -> str:
    name = row["id"]
    return name[:80] if isinstance(name, str) else shown(name)


def _num_bytes(value: object) -> int:
    """What an example takes in memory."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(map(_num_bytes, value.values()))
    return size + (sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0)


def _columns(task: Task) -> list[str]:
    """Those that a task reads; nothing else in its data matters."""
    names = (task.text, task.text_pair, *task.choices, task.label, "id")
    return [name for name in names if name is not None]


def _file_rows(task: Task, file: Path) -> tuple[Names, Iterator[tuple[str, Row]]]:
    names: Names = ()
    if file.suffix == ".parquet":
        check_plain(file)
        with opening(file, DataError):
            schema = read_schema(file)
        with opening(file, DataError, "the names of its classes can't be read"):
            names = _names_in(schema, task.label)
    return names, read_records(file, columns=_columns(task))


def _names_in(schema: Schema, label: str) -> Names:
    """The names of classes that datasets keeps in a schema; other columns may be of types that it
    doesn't know.
    """
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = ((metadata.get("info") or {}).get("features") or {}).get(label)
    if feature is None:
        return ()
    features = Features.from_dict({label: feature})
    is_true = features.arrow_schema.field(label).type == schema.field(label).type
    return _class_names(features, label) if is_true else ()


def _class_names(features: Features, label: str) -> Names:
    feature = features.get(label)
    if isinstance(feature, List):
        feature = feature.feature
    is_named = isinstance(feature, ClassLabel)
    return tuple(name.strip() for name in feature.names) if is_named else ()


def _hub_rows(task: Task, split: str) -> tuple[Names, Iterator[tuple[str, Row]]]:
    assert task.hub is not None, "only called for a Hub data set"
    with opening(f"{task.hub} [{split}]", DataError):
        dataset = load_dataset(task.hub, task.hub_config, split=split)
    names = dataset.column_names
    wanted = [name for name in dict.fromkeys(_columns(task)) if name in names]

    def rows() -> Iterator[tuple[str, Row]]:
        with opening(f"{task.hub} [{split}]", DataError):
            for index, row in enumerate(dataset.select_columns(wanted) if wanted else dataset):
                yield f"row {index}", {**dict.fromkeys(names), **dict(row)}

    return _class_names(dataset.features, task.label), rows()


def classified(task: Task, row: Row, names: Names) -> Parts:
    """A text or a pair of texts, and the name of its class."""
    return *_texts(task, row), _class(task, _value(row, task.label), names)


def measured(task: Task, row: Row, _: Names) -> Parts:
    """A text or a pair of texts, and a finite number."""
    value = _value(row, task.label)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{task.label!r} is not a finite number (got {shown(value)})")
    return *_texts(task, row), number


def tagged(task: Task, row: Row, names: Names) -> Parts:
    """A list of words, and the tag of each."""
    words, tags = _list(row, task.text), _list(row, task.label)
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"{task.text!r} has a word that is no text or empty (got {shown(words)})")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words in {task.text!r}, {len(tags)} tags in {task.label!r}")
    return words, None, [_class(task, tag, names) for tag in tags]


def chosen(task: Task, row: Row, _: Names) -> Parts:
    """A text, its choices, and the position of the right one (a number from 0, or a letter)."""
    lists = len(task.choices) == 1
    choices = _list(row, task.choices[0]) if lists else [_value(row, c) for c in task.choices]
    start = _text(row, task.text_pair) + " " if task.text_pair else ""
    if len(choices) < 2 or not all(isinstance(c, str) and (start + c).strip() for c in choices):
        raise ValueError(f"{', '.join(map(repr, task.choices))} must be two or more texts")
    value = _value(row, task.label)
    value = value.strip() if isinstance(value, str) else value
    letters = string.ascii_uppercase[: len(choices)]
    position = letters.find(value) if isinstance(value, str) and len(value) == 1 else -1
    if position < 0 and re.fullmatch(r"\d{1,9}", str(value)):
        position = int(value)
    if not 0 <= position < len(choices):
        allowed = f"0 to {len(choices) - 1}, or A to {letters[-1]}"
        raise ValueError(f"{task.label!r} must be {allowed} (got {shown(value)})")
    return _text(row, task.text), [start + choice for choice in choices], position


def answered(task: Task, row: Row, _: Names) -> Parts:
    """A question, its context, and SQuAD's answers, each where it says."""
    assert task.text_pair is not None, "the recipe asks for it"
    question, context = _text(row, task.text), _text(row, task.text_pair)
    for column, text in ((task.text, question), (task.text_pair, context)):
        if len(text) > LONGEST_CONTEXT:
            raise ValueError(
                f"{column!r} has {len(text):,} characters; windows are made of at most "
                f"{LONGEST_CONTEXT:,}"
            )
    fields = _value(row, task.label)
    fields = fields if isinstance(fields, dict) else {}
    texts, starts = fields.get("text"), fields.get("answer_start")
    least = 0 if task.has_unanswerable else 1
    if not (isinstance(texts, list) and isinstance(starts, list)) or len(texts) != len(starts):
        raise ValueError(f"{task.label!r} must be {{'text': [...], 'answer_start': [...]}}")
    if len(texts) < least:
        raise ValueError(
            f"{task.label!r} must hold at least one answer; task.has_unanswerable = true lets "
            "questions have none"
        )
    answers = [
        _answer(task, context, text, start) for text, start in zip(texts, starts, strict=True)
    ]
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return question, context, {"text": texts, "answer_start": starts}


def _answer(task: Task, context: str, text: object, start: object) -> tuple[str, int]:
    """An answer without the blanks at its ends, and where it begins."""
    if not (isinstance(text, str) and isinstance(start, int) and text.strip() and start >= 0):
        raise ValueError(
            f"{task.label!r} must hold texts and positions (got {shown(text)} and {shown(start)})"
        )
    if not context.startswith(text, start):
        raise MisplacedError(
            f"{task.label!r} says {shown(text)}, which is not at character {start} of the context"
        )
    return text.strip(), start + len(text) - len(text.lstrip())


def _value(row: Row, column: str) -> Any:  # Any: unchecked
    if column not in row:
        raise ValueError(f"no column {column!r}; there are {shown(list(row))[1:-1]}")
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


def _texts(task: Task, row: Row) -> tuple[str, str | None]:
    if task.text_pair is None:
        return _text(row, task.text), None
    texts = _text(row, task.text, True), _text(row, task.text_pair, True)
    if not "".join(texts).strip():
        raise ValueError(f"{task.text!r} and {task.text_pair!r} are both empty")
    return texts


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
