"""Examples of a task, checked as they are read.

A mistake in line 40,000 is found before a GPU works, and is named by file and line. A class is
known by its name; a number in the data is such a name or, where no class is called by a number, a
position in `task.classes`. A pair may have one empty half (QQP has two of these), never two.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_schema

from opfa.downstream.recipe import Task
from opfa.recipe import DataError
from opfa.records import read_records

Row = Mapping[str, Any]  # Any: whatever the data hold


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One checked split, by column; `labels` are class names, numbers, or SQuAD's answers."""

    source: str
    places: list[str]  # such as "line 17", for messages
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]  # Any: str, float or {"text": [...], "answer_start": [...]}
    names: tuple[str, ...]  # those of the data set's own ClassLabel feature, if it has one

    def sha256(self) -> str:
        """Digest of what a model can learn from, whatever file it came from."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.pairs or self.texts, self.labels, strict=True):
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()


def read(task: Task, split: str) -> Examples:
    """Read and check one split: a file, or a split of the task's Hub data set."""
    source = f"{task.hub} [{split}]" if task.hub else split
    names: tuple[str, ...] = ()
    if task.hub:
        rows, names = _hub_rows(task, split)
    else:
        rows = list(read_records(Path(split)))
        if split.endswith(".parquet"):  # datasets keeps the names of classes in the schema
            names = _class_names(Features.from_arrow_schema(read_schema(split)), task.label)
    if not rows:
        raise DataError(f"{source}: there are no examples in it")
    checked = [_check(task, row, names, f"{source}, {place}") for place, row in rows]
    texts, pairs, labels = (list(column) for column in zip(*checked, strict=True))
    return Examples(
        source=source,
        places=[place for place, _ in rows],
        texts=texts,
        pairs=pairs if task.text_pair else None,
        labels=labels,
        names=names,
    )


def _class_names(features: Features, label: str) -> tuple[str, ...]:
    feature = features.get(label)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def _hub_rows(task: Task, split: str) -> tuple[list[tuple[str, Row]], tuple[str, ...]]:
    assert task.hub is not None, "only called for a Hub data set"
    try:
        dataset = load_dataset(task.hub, task.hub_config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{task.hub} [{split}]: can't be read: {reason[0]}") from error
    names = _class_names(dataset.features, task.label)
    rows: list[tuple[str, Any]] = [(f"row {index}", row) for index, row in enumerate(dataset)]
    return rows, names


def _check(task: Task, row: Row, names: tuple[str, ...], where: str) -> tuple[str, str, Any]:
    columns = [task.text, *([task.text_pair] if task.text_pair else [])]
    absent = [name for name in (*columns, task.label) if name not in row]
    if absent:
        raise DataError(f"{where}: no column {absent[0]!r}; there are {', '.join(map(repr, row))}")
    for name in columns:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is not a text (got {row[name]!r})")
    empty = [name for name in columns if not row[name].strip()]
    if len(empty) == len(columns) or (empty and task.kind == "question-answering"):
        raise DataError(f"{where}: {empty[0]!r} is empty")
    value = row[task.label]
    if value is None or value == "":
        raise DataError(f"{where}: {task.label!r} is missing")
    try:
        return row[columns[0]], row[columns[-1]], _label(task, value, names, row[columns[-1]])
    except ValueError as error:
        raise DataError(f"{where}: {task.label!r} {error}") from None


def _label(task: Task, value: Any, names: tuple[str, ...], context: str) -> Any:  # Any: by kind
    if task.kind == "regression":
        return _finite(value)
    if task.kind == "question-answering":
        return _answers(value, context)
    if not isinstance(value, str | int):
        raise ValueError(f"is neither a name nor an integer (got {value!r})")
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value)


def _finite(value: Any) -> float:  # Any: unchecked
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"is not a finite number (got {value!r})")
    return number


def _answers(value: Any, context: str) -> dict[str, list[Any]]:
    fields = value if isinstance(value, dict) else {}
    texts, starts = fields.get("text"), fields.get("answer_start")
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts) > 0):
        raise ValueError("must be {'text': [...], 'answer_start': [...]} with at least one answer")
    for text, start in zip(texts, starts, strict=True):
        if not (isinstance(text, str) and isinstance(start, int) and text and start >= 0):
            raise ValueError(f"must hold texts and positions (got {text!r} and {start!r})")
        if not context.startswith(text, start):
            raise ValueError(f"says {text!r}, which is not at character {start} of the context")
    return {"text": texts, "answer_start": starts}
