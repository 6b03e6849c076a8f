"""The rows that a run logs: which keys are no numbers, and which rows are evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

NO_NUMBERS = ("step", "split", "eval", "final")
Row = Mapping[str, Any]  # Any: a number or a text


def by_kind(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of training, and those of evaluations."""
    evaluations = [row for row in rows if row.get("eval")]
    return [row for row in rows if not row.get("eval")], evaluations
