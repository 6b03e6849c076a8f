"""Which evaluation was the best so far, and whether to stop: a function of the evaluation rows."""

from collections.abc import Iterable, Mapping
from typing import Any


class Best:
    """The best evaluation of a run; higher is better, and of equals the first."""

    def __init__(self, metric: str, *, first_step: int = 0, patience: int | None = None) -> None:
        """`first_step`: earlier evaluations don't count. `patience`: evaluations without a new best
        until it is time to stop.
        """
        self.metric, self.first_step, self.patience = metric, first_step, patience
        self.step: int | None = None
        self.value = -float("inf")
        self.num_since = 0

    def see(self, row: Mapping[str, Any]) -> bool:
        """Whether this evaluation is a new best."""
        if row["step"] < self.first_step:
            return False
        if row[self.metric] > self.value:
            self.step, self.value, self.num_since = row["step"], row[self.metric], 0
            return True
        self.num_since += 1
        return False

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """See the evaluations of an earlier launch again."""
        for row in rows:
            if row.get("eval"):
                self.see(row)

    @property
    def is_time_to_stop(self) -> bool:
        """Whether patience is over."""
        return self.patience is not None and self.num_since >= self.patience
