"""Which columns of a file a task means, where its recipe names some that the file doesn't have.

`opfa new` writes what is found into the recipe, for its reader to see. Training never guesses.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from opfa.data.records import Record, read_records

KINDS = ("classification", "regression", "embedding")
SEEN = 1_000  # records that are looked at


def missing_columns(task: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The keys of [task] whose columns its `train` lacks, and the columns that none names. Nothing
    where `train` isn't a file of this machine.
    """
    file = _file_of(task)
    if file is None:
        return [], []
    columns = list(_records(file, 1)[0])
    keys = [key for key in ("text", "text_pair", "label") if key in task]
    named = {task[key] for key in keys}
    missing = [key for key in keys if task[key] not in columns]
    return missing, [column for column in columns if column not in named]


def told_columns(
    task: Mapping[str, Any], missing: Sequence[str], free: Sequence[str]
) -> dict[str, str]:
    """What the missing keys can only mean: the one column left, or of two, text and label told
    apart by how many values they have. Nothing where it could be otherwise.
    """
    if len(missing) != len(free) or task.get("kind") not in KINDS:
        return {}
    if len(missing) == 1:
        return {missing[0]: free[0]}
    file = _file_of(task)
    if list(missing) == ["text", "text_pair"]:
        return dict(zip(missing, free, strict=True))  # in the order of the file
    if list(missing) != ["text", "label"] or file is None:
        return {}
    records = _records(file, SEEN)
    label, text = sorted(free, key=lambda column: len({str(row[column]) for row in records}))
    is_clear = len({str(row[label]) for row in records}) < len({str(row[text]) for row in records})
    return {"text": text, "label": label} if is_clear else {}


def _file_of(task: Mapping[str, Any]) -> Path | None:
    train = task.get("train")
    is_file = isinstance(train, str) and "hub" not in task and Path(train).is_file()
    return Path(train) if isinstance(train, str) and is_file else None


def _records(file: Path, most: int) -> list[Record]:
    return [record for _, record in islice(read_records(file), most)]
