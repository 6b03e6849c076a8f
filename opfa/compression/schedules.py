"""Schedules: pure functions of the step, so that a resumed run can't disagree with an unbroken one.

Sparsity follows Zhu & Gupta (2017), eq. 1, from `start` to `end`:
    s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (t1 - t0)) ** 3
Until `hold_until` a mask may exchange weights at constant sparsity. With rewinding (Renda et al.,
2020) each mask update of the ramp sets the decay of the learning rate back to its beginning.
"""

from typing import Self

from pydantic import Field, model_validator

from opfa.recipe import Section


class Gradual(Section):
    """Gradual sparsity: a cubic ramp, then mask updates at full sparsity, then fixed masks.

    Step t means "after t optimizer steps". `start == end` prunes in one shot.
    """

    start: int = Field(default=0, ge=0)
    """The first mask update, in finished steps."""
    end: int = Field(ge=0)
    """The end of the ramp; equal to `start`: one shot."""
    hold_until: int | None = Field(default=None, ge=0)
    """The last mask update; by default `end`."""
    every: int = Field(default=1, ge=1)
    """Steps between mask updates."""
    initial: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Sparsity of the first update."""
    target: float = Field(ge=0.0, lt=1.0)
    """Sparsity at the end of the ramp."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end = {self.end}: the ramp must not end before start = {self.start}")
        if self.last_update < self.end:
            what = "the last mask update must not come before the end of the ramp, or the target"
            what += f" would not be reached (end = {self.end})"
            raise ValueError(f"hold_until = {self.hold_until}: {what}")
        if self.target < self.initial:
            raise ValueError(f"target = {self.target}: must not be below initial = {self.initial}")
        return self

    @property
    def last_update(self) -> int:
        """The last step at which a mask may change."""
        return self.end if self.hold_until is None else self.hold_until

    def sparsity_at(self, step: int) -> float:
        """The fraction of zeros that the ramp asks for after `step` steps."""
        if step < self.start:
            return 0.0
        if step >= self.end:
            return self.target
        if step == self.start:
            return self.initial  # the formula's rounding could prune one weight more or less
        remaining = 1 - (step - self.start) / (self.end - self.start)
        return self.target + (self.initial - self.target) * remaining**3

    def sparsities(self, steps: int) -> list[float]:
        """The sparsity after each of so many steps: of the newest mask update."""
        found, newest = [], self.sparsity_at(0) if self.is_update(0) else 0.0
        for step in range(1, steps + 1):
            newest = self.sparsity_at(step) if self.is_update(step) else newest
            found.append(newest)
        return found

    def is_update(self, step: int) -> bool:
        """Whether masks are recomputed after `step` steps. The end of the ramp always is one."""
        if not self.start <= step <= self.last_update:
            return False
        return (step - self.start) % self.every == 0 or step in (self.end, self.last_update)

    def last_ramp_update(self, step: int) -> int | None:
        """The newest mask update of the ramp at or before `step`; None before the first."""
        if step < self.start:
            return None
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self.every


class LearningRate(Section):
    """Linear warm-up to `peak`, then linear decay to zero at `steps`."""

    peak: float = Field(gt=0.0)
    warmup_steps: int = Field(ge=0)
    steps: int = Field(ge=1)
    rewind_at: Gradual | None = None

    def rates(self) -> list[float]:
        """The rate of each step."""
        return [self.at(step) for step in range(self.steps)]

    def at(self, step: int) -> float:
        """The rate of the step that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        decay_start = self.warmup_steps
        if self.rewind_at is not None:
            decay_start = max(decay_start, self.rewind_at.last_ramp_update(step) or 0)
        if decay_start >= self.steps:
            return self.peak
        return self.peak * max(0.0, (self.steps - step) / (self.steps - decay_start))
