"""Which evaluation was the best so far, and whether to stop, by the rows alone; and its concern."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from opfa.errors import RunError
from opfa.training.concerns import Evaluating
from opfa.training.loop import Progress
from opfa.training.metrics import Row

log = logging.getLogger(__name__)


@dataclass
class Best:
    """The best evaluation of a run; higher is better, and of equals the first."""

    metric: str
    _: KW_ONLY
    first_step: int = 0  # earlier evaluations don't count
    patience: int | None = None  # evaluations without a new best that end a run
    step: int | None = None
    value: float = -float("inf")
    num_since: int = 0

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

    def found(self) -> dict[str, float]:
        """What results.json says of it."""
        assert self.step is not None, "there was no evaluation that counts"
        return {"step": self.step, self.metric: self.value}

    @property
    def is_time_to_stop(self) -> bool:
        """Whether patience is over."""
        return self.patience is not None and self.num_since >= self.patience


@dataclass
class Choosing(Evaluating):
    """Evaluates, asks for a resume point of each new best model, and ends a run without one."""

    best: Best

    def begin(self, at: Progress) -> None:
        """See the evaluations of earlier launches again."""
        if at.step:
            self.best.replay(at.run.rows())
        if self.best.step != at.best_step:
            path = at.run.directory / "metrics.jsonl"
            raise RunError(f"{path}: has lost evaluations; start anew")
        self._end_when_patience_is_over(at)

    def see(self, at: Progress, row: Row) -> None:
        """Log an evaluation, and compare it."""
        super().see(at, row)
        if self.best.see(row):
            at.best_step, at.wants_point = self.best.step, True
        self._end_when_patience_is_over(at)

    def _end_when_patience_is_over(self, at: Progress) -> None:
        if self.best.is_time_to_stop and not at.is_end:
            log.info("step %d: no better for %d evaluations", at.step, self.best.num_since)
            at.is_over = True
