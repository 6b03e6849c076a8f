"""Which evaluation was the best so far, and whether to stop: a function of the evaluation rows; and
the concern that evaluates and chooses.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opfa.errors import RunError
from opfa.training.concerns import Evaluating
from opfa.training.loop import Progress
from opfa.training.metrics import Row

log = logging.getLogger(__name__)


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


class Choosing(Evaluating):
    """Evaluates, asks for a resume point of a new best model, and ends a run that has none for
    long.
    """

    def __init__(
        self, every_steps: int, evaluate: Callable[[], dict[str, float]], best: Best
    ) -> None:
        """`best` sees every evaluation."""
        super().__init__(every_steps, evaluate)
        self._best = best

    def begin(self, at: Progress) -> None:
        """See the evaluations of earlier launches again."""
        if at.step:
            self._best.replay(at.run.rows())
        if self._best.step != at.best_step:
            path = at.run.directory / "metrics.jsonl"
            raise RunError(f"{path}: has lost evaluations; start anew")
        self._end_when_patience_is_over(at)

    def see(self, at: Progress, row: Row) -> None:
        """Log an evaluation, and compare it."""
        super().see(at, row)
        if self._best.see(row):
            at.best_step, at.wants_point = self._best.step, True
        self._end_when_patience_is_over(at)

    def _end_when_patience_is_over(self, at: Progress) -> None:
        if self._best.is_time_to_stop and not at.is_end:
            log.info("step %d: no better for %d evaluations", at.step, self._best.num_since)
            at.is_over = True
