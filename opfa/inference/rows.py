"""Rows in and out of a prediction: a file, standard input or values in memory; JSON Lines or CSV.

A row is what the input says, by column. New columns come after it, and never replace one of its
own.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from opfa.data.json_records import Record
from opfa.data.lines import check_plain
from opfa.data.records import (
    READERS,
    Reader,
    kind_of,
    no_column,
    read_by,
    read_lines_or_json,
    read_records,
    read_texts,
)
from opfa.errors import DataError, RunError, shown
from opfa.tasks.predictions import ALL
from opfa.tasks.recipe import Task

STDIN = Path("/dev/stdin")
InputFormat = Literal["lines", "jsonl", "csv", "tsv"]
OutputFormat = Literal["jsonl", "csv"]
Item = str | Sequence[Any] | Mapping[str, Any]  # Any: a text, or a list of them, by kind of task


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that can be read again, unless they come from standard input."""

    name: str
    rows: Callable[[], Iterator[tuple[str, Record]]]
    is_lasting: bool = True
    is_lines: bool = False  # of one text each


def of_file(file: Path | None, form: InputFormat | None, task: Task) -> Source:
    """A file, by its ending if no form is given; None is standard input, where the first line says
    whether it is JSON Lines or plain lines.
    """
    if file is None:
        reader = _reader(form, task)
        return Source(
            name="standard input",
            rows=lambda: read_by(reader, STDIN),
            is_lasting=False,
            is_lines=form in (None, "lines"),
        )
    if form is None and kind_of(file) == ".txt":
        form = "lines"
    if form is not None:
        reader = _reader(form, task)
        is_lines = form == "lines"
        return Source(name=str(file), rows=lambda: _plain_file(file, reader), is_lines=is_lines)
    if kind_of(file) not in READERS:
        known = ", ".join((*READERS, "or say --input-format"))
        raise DataError(f"{file}: unknown kind of file; known are {known}")
    return Source(name=str(file), rows=lambda: read_records(file))


def _reader(form: InputFormat | None, task: Task) -> Reader:
    if form is None:
        return lambda file, _: read_lines_or_json(file, task.text)
    if form == "lines":
        return lambda file, _: read_texts(file, task.text)
    return READERS[f".{form}"]


def _plain_file(file: Path, reader: Reader) -> Iterator[tuple[str, Record]]:
    check_plain(file)
    yield from read_by(reader, file)


def of_items(items: Any, task: Task) -> Source:
    """Values in memory, in a list, a column of pandas or an array of numpy: each is a text, a tuple
    of a text and its pair (or its choices), a list of words, or a mapping by column.
    """
    what = "give a list of texts, or a pathlib.Path for a file"
    if isinstance(items, str | bytes):
        raise DataError(f"inputs = {shown(items)}: {what}")
    if getattr(items, "ndim", 0) == 1 and hasattr(items, "tolist"):  # of numpy or pandas
        items = items.tolist()
    if not isinstance(items, Sequence):
        raise DataError(f"inputs: is a {type(items).__name__}; {what}")
    second = task.choices[0] if len(task.choices) == 1 else task.text_pair

    def rows() -> Iterator[tuple[str, Record]]:
        for index, item in enumerate(items):
            if isinstance(item, Mapping):
                row = dict(item)
            elif isinstance(item, tuple):
                if second is None or len(item) != 2:
                    what = "a tuple is a text and its pair, and this task has single texts"
                    what = what if second is None else "a tuple has two parts"
                    raise DataError(f"inputs[{index}] = {shown(item)}: {what}")
                row = {task.text: item[0], second: item[1]}
            else:
                row = {task.text: item}
            yield f"[{index}]", row

    return Source(name="inputs", rows=rows)


def check_columns(task: Task, source: Source, row: Record) -> None:
    """Refuse rows without a column that the task reads; the options that name them are said."""
    is_question = task.kind == "question-answering"
    text, pair = ("--question", "--context") if is_question else ("--text", "--pair")
    wanted = [(text, task.text), (pair, task.text_pair)]
    wanted += [("--choices", column) for column in task.choices]
    for option, column in wanted:
        if column is None or column in row:
            continue
        if source.is_lines and list(row) == [task.text]:
            formats = "JSON Lines or CSV (--input-format)"
            what = f"a line is one text, and {task.kind} needs {column!r} too; give {formats}"
            raise DataError(f"{source.name}: {what}")
        raise no_column(source.name, "line 1", row, column, f"{option} names another")


def joined(row: Record, new: Mapping[str, Any], prefix: str, where: str) -> Record:
    """A row with its new columns; raises `DataError` where it has one of them already."""
    named = {f"{prefix}{name}": value for name, value in new.items()}
    if twice := [name for name in named if name in row]:
        what = f"has a column {twice[0]!r} already; --prefix puts a text before the new ones"
        raise DataError(f"{where}: {what}")
    return {**row, **named}


class JsonLines:
    """One object a line."""

    def __init__(self, stream: TextIO) -> None:
        """Write to this stream."""
        self._stream = stream

    def write(self, row: Record, where: str) -> None:
        """Write a row."""
        self._stream.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


class Csv:
    """A line for each row, by the columns of the first one; lists are written as JSON, and the
    probabilities of classes have a column each.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to this stream."""
        self._writer = csv.writer(stream, lineterminator="\n")
        self._names: list[str] = []

    def write(self, row: Record, where: str) -> None:
        """Write a row, and before the first one the header."""
        cells: dict[str, Any] = {}
        for name, value in row.items():
            if name.endswith(ALL) and isinstance(value, dict):
                cells |= {f"{name}.{key}": share for key, share in value.items()}
            else:
                cells[name] = value
        if not self._names:
            self._names = list(cells)
            self._writer.writerow(self._names)
        if other := cells.keys() - set(self._names):
            what = f"the column {min(other)!r} isn't in the first row; JSON Lines can hold that"
            raise DataError(f"{where}: {what}")
        self._writer.writerow([_cell(cells.get(name)) for name in self._names])


WRITERS = {"jsonl": JsonLines, "csv": Csv}


def output_format(output: Path | None, form: OutputFormat | None) -> OutputFormat:
    """By the ending of the file; JSON Lines on standard output."""
    endings: dict[str, OutputFormat] = {".csv": "csv", ".jsonl": "jsonl"}
    if form is not None or output is None:
        return form or "jsonl"
    if output.suffix not in endings:
        what = "ends neither with .jsonl nor with .csv; say --format jsonl or --format csv"
        raise RunError(f"--output {output}: {what}")
    return endings[output.suffix]


def _cell(value: Any) -> str:  # Any: what rows hold
    if value is None or isinstance(value, str):
        return value or ""
    value = _plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:  # Any: what rows hold
    """What JSON can hold: no NaN, and dates and whatever else Parquet knows as texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
