"""`metrics.jsonl`: one JSON object for each logged step of a run, and the one reader of it.

`split` says of which examples a row's numbers are: those of the step ("training"), training
examples that were held out to choose a model by ("held_out"), or the validation split. `loss` is
what the run minimizes, in every row that has it. Rows of earlier versions have no `split`; their
evaluations under a teacher had a `loss` without the teacher's part.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from opfa.errors import RunError
from opfa.storage.files import new_file, sync

FILE = "metrics.jsonl"
TRAINING, HELD_OUT, VALIDATION = "training", "held_out", "validation"  # values of `split`
Row = dict[str, Any]  # step and split, eval of an evaluation, then numbers


def read(run: Path) -> list[Row]:
    """All rows of a run. A kill may have cut the last line; other damage raises `RunError`."""
    path = run / FILE
    lines = _bytes(path).splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break  # cut by a kill
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}, line {number}: is damaged: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise RunError(f"{path}, line {number}: is damaged: not a row with a step")
        rows.append(row)
    return rows


def append(run: Path, row: Row) -> None:
    """Add one row."""
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def state(run: Path) -> dict[str, Any]:
    """What a resume point notes of all rows so far, which are on the disk from now on."""
    if (path := run / FILE).exists():
        sync(path)
    found = _bytes(path)
    return {"bytes": len(found), "sha256": hashlib.sha256(found).hexdigest()}


def forget_after(run: Path, step: int, known: dict[str, Any] | None) -> None:
    """Drop the rows after the resume point of `step`, which noted `known`; without it all rows."""
    path = run / FILE
    kept = b""
    if known is not None:
        kept = _bytes(path)[: known["bytes"]]
        if hashlib.sha256(kept).hexdigest() != known["sha256"]:
            raise RunError(
                f"{path}: its rows up to step {step} are not those that the run wrote (damaged, "
                "cut or edited); restore the file, or start anew in another directory"
            )
    with new_file(path) as work:
        work.write_bytes(kept)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
