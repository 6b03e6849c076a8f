"""Examples of a task, checked as they are read: a mistake is named by file and line."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow import Schema, int64
from pyarrow.parquet import read_schema

from opfa.data.lines import check_plain
from opfa.data.order import HELD_OUT, generator
from opfa.data.records import no_column, read_records
from opfa.errors import DataError, not_plain, opening, shown
from opfa.extras import importing
from opfa.hub.reach import offline, problem_of_hub, tell_of_cache
from opfa.tasks.checks import Check, ColumnError, MisplacedError, Names, Row
from opfa.tasks.recipe import Task

MOST_BYTES = 4 << 30  # that one split takes in memory before it is tokenized


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One checked split, by column."""

    source: str
    places: list[str]  # such as "line 17", for messages
    texts: list[Any]  # Any: str, or a list of words
    pairs: list[Any] | None  # Any: str, or a list of choices
    labels: list[Any]  # Any: names of classes, lists of them, numbers, or SQuAD's answers
    names: Names  # those of the data set's own ClassLabel feature, if it has one

    def sha256(self) -> str:
        """Digest of what a model can learn from, whatever file it came from."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.pairs or self.texts, self.labels, strict=True):
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "Examples":
        """Some of them, in this order."""
        names = ("places", "texts", "pairs", "labels")
        columns = {name: column for name in names if (column := getattr(self, name)) is not None}
        return replace(self, **{name: [c[i] for i in indices] for name, c in columns.items()})

    def held_out(
        self, fraction: float, by_context: bool, key: str
    ) -> tuple["Examples", "Examples"]:
        """Two parts, the second one held out, as the recipe's `key` says; the same in every run.
        `by_context` never divides a context's questions.
        """
        groups = self.pairs if by_context and self.pairs else list(range(len(self.texts)))
        names = list(dict.fromkeys(groups))
        num_held = round(fraction * len(names))
        if not 0 < num_held < len(names):
            whole = f"{len(names)} {'contexts' if by_context else 'examples'}"
            what = f"{key} = {fraction} of {whole} is {num_held}; both parts need some"
            raise DataError(f"{self.source}: {what}")
        order = generator(0, HELD_OUT).permutation(len(names)).tolist()
        held = {names[index] for index in order[:num_held]}
        kept = [i for i, group in enumerate(groups) if group not in held]
        rest = self.select([i for i, group in enumerate(groups) if group in held])
        return self.select(kept), replace(rest, source=f"{self.source} (held out)")


def read(task: Task, split: str, check: Check) -> Examples:
    """Read and check one split: a file, or a split of the task's Hub data set."""
    check_files(task, split)
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
        except ColumnError as error:
            column = str(error)
            key = f"task.{_key_of(task, column)}"
            raise no_column(source, places[-1], dict(row), column, key) from None
        except ValueError as error:
            raise DataError(f"{source}, {places[-1]}: {error}") from None
        num_bytes += size_of((places[-1], checked[-1]))
        if num_bytes > MOST_BYTES:
            what = f"the examples up to here take more than {MOST_BYTES:,} bytes of memory"
            raise DataError(f"{source}, {places[-1]}: {what}, the most that one may have")
    if misplaced:
        num = f"{len(misplaced)} of {len(places)} examples"
        what = f"{num} have an answer that is not in the context; the first: {misplaced[0]}"
        raise DataError(f"{source}: {what}")
    if not checked:
        raise DataError(f"{source}: there are no examples in it")
    texts, pairs, labels = (list(column) for column in zip(*checked, strict=True))
    pairs = None if pairs[0] is None else pairs
    return Examples(
        source=source, places=places, texts=texts, pairs=pairs, labels=labels, names=names
    )


def check_files(task: Task, only: str | None = None) -> None:
    """Raise `DataError` where a key of [task], or only one of this value, names no plain file; of a
    task without a Hub data set.
    """
    files = {"train": task.train, "validation": task.validation}
    files |= {f"more_validation.{name}": split for name, split in task.more_validation.items()}
    for key, split in files.items():
        if task.hub or not isinstance(split, str) or only not in (None, split):
            continue
        if problem := not_plain(Path(split)):
            raise DataError(f"task.{key}: {split[:200]}: {problem}")


def _key_of(task: Task, column: str) -> str:
    """The key of [task] that names a column."""
    keys = ("text", "text_pair", "train_text", "label")
    return next((key for key in keys if getattr(task, key) == column), "choices")


def _id(row: Row) -> str:
    name = row["id"]
    return name[:80] if isinstance(name, str) else shown(name)


def size_of(value: object) -> int:
    """Bytes of memory that what a file holds takes."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(map(size_of, value.values()))
    return size + (sum(map(size_of, value)) if isinstance(value, list | tuple) else 0)


def _columns(task: Task) -> list[str]:
    """Those that a task reads; nothing else in its data matters."""
    names = (task.text, task.text_pair, task.train_text, *task.choices, task.label, "id")
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
    """The names of classes that `datasets` wrote into a schema, if it did."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = ((metadata.get("info") or {}).get("features") or {}).get(label)
    names = _class_names(feature)
    kind = schema.field(label).type if names else None
    is_true = kind is not None and getattr(kind, "value_type", kind) == int64()
    return names if is_true else ()


def _class_names(feature: Any) -> Names:  # Any: what JSON can hold
    """The names in the JSON form of a ClassLabel, or of a list of them."""
    if isinstance(feature, dict):
        feature = feature.get("feature", feature)
    is_named = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return tuple(name.strip() for name in feature["names"]) if is_named else ()


def _hub_rows(task: Task, split: str) -> tuple[Names, Iterator[tuple[str, Row]]]:
    assert task.hub is not None, "only called for a Hub data set"
    features, rows = hub_rows("task.hub", task.hub, task.hub_config, split, _columns(task))
    return _class_names(features.get(task.label)), rows


def hub_rows(
    key: str, name: str, config: str | None, split: str, columns: Sequence[str]
) -> tuple[dict[str, Any], Iterator[tuple[str, Row]]]:  # Any: what JSON can hold
    """The features of a split of a Hub data set, as `datasets` writes them, and its rows: each with
    where it stands ("row 7"), all names of columns, and the values of these. `key` named it.
    """
    with importing(f"{key} = {name!r}", "opfa[datasets]"):
        from datasets import load_dataset
    what = f"{name} [{split}]"
    problem = "" if Path(name).exists() else problem_of_hub()
    try:
        with opening(what, DataError), offline() if problem else contextlib.nullcontext():
            dataset = load_dataset(name, config, split=split)
    except DataError as error:
        if problem:
            raise DataError(f"{what}: can't be read: {problem}") from error
        raise
    if problem:
        tell_of_cache(problem)
    names = dataset.column_names
    wanted = [column for column in dict.fromkeys(columns) if column in names]

    def rows() -> Iterator[tuple[str, Row]]:
        with opening(what, DataError):
            for index, row in enumerate(dataset.select_columns(wanted) if wanted else dataset):
                yield f"row {index}", {**dict.fromkeys(names), **dict(row)}

    return dict(dataset.features.to_dict()), rows()
