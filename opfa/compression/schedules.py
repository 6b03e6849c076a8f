"""Schedules: pure functions of the step, so that a resumed run can't disagree with an unbroken one.

Sparsity follows Zhu & Gupta (2017), eq. 1, from `start` to `end`:
    s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (t1 - t0)) ** 3
Until `hold_until` a mask may exchange weights at constant sparsity. With rewinding (Renda et al.,
2020) each mask update of the ramp sets the decay of the learning rate back to its beginning. In
cycles (Kurtic et al., 2022, "The Optimal BERT Surgeon") the rate also ends there each time:
    r_t = r_high + (r_low - r_high) * (t - a) / (b - 1 - a), from update a to the next one, b

A recipe may say steps or shares of the run. They become steps once, where the run's length is known
(`Ramp.over`, `in_steps`); everything else sees integers. transformers' Trainer reads `warmup_steps`
and `logging_steps` in the same way. Two types, so that no code can take a share for a step.
"""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from opfa.recipe import Section


def _steps_or_share(least: int) -> BeforeValidator:
    """Steps from `least` on, or a share of the run; 0.0 only where 0 is allowed too."""

    def check(value: Any) -> int | float:  # Any: whatever JSON can hold
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        if isinstance(value, float) and 0.0 <= value <= 1.0 and (value or not least):
            return value
        share = f"{'above' if least else 'from'} 0.0 up to 1.0"
        raise ValueError(
            f"must be steps, an integer greater than or equal to {least}, or a share of the run, "
            f"a number with a point {share}"
        )

    return BeforeValidator(check)


Moment = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, le=1.0)], _steps_or_share(0)
]
Interval = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0.0, le=1.0)], _steps_or_share(1)
]


def in_steps(value: float, steps: int, least: int = 0) -> int:
    """Steps of a run of `steps`: an integer is meant so, a float is a share, which is rounded."""
    return value if isinstance(value, int) else max(least, round(value * steps))


def _check_order(start: float, end: float, hold_until: float | None) -> None:
    """Refuse moments in a wrong order; all are steps, or all are shares."""
    if end < start:
        raise ValueError(f"end = {end}: the ramp must not end before start = {start}")
    if hold_until is not None and hold_until < end:
        what = "the last mask update must not come before the end of the ramp, or the target"
        raise ValueError(f"hold_until = {hold_until}: {what} would not be reached (end = {end})")


def _check_levels(initial: float, target: float) -> None:
    if target < initial:
        raise ValueError(f"target = {target}: must not be below initial = {initial}")


class Gradual(Section):
    """Gradual sparsity, in steps: a cubic ramp, then mask updates at full sparsity, then fixed
    masks. Step t means "after t optimizer steps". `start == end` prunes in one shot.
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
        _check_order(self.start, self.end, self.hold_until)
        _check_levels(self.initial, self.target)
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

    def ramp_at(self, step: int) -> float:
        """How far the ramp is: 0 up to `start`, 1 from `end` on, cubic between."""
        return self.model_copy(update={"initial": 0.0, "target": 1.0}).sparsity_at(step)

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

    def updates_before(self, step: int) -> int:
        """How many mask updates there are before `step`, which is one."""
        return -(-(step - self.start) // self.every)

    def last_ramp_update(self, step: int) -> int | None:
        """The newest mask update of the ramp at or before `step`; None before the first."""
        if step < self.start:
            return None
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self.every

    def next_ramp_update(self, step: int) -> int | None:
        """The first mask update of the ramp after `step`; None after the last."""
        if step < self.start:
            return self.start
        if step >= self.end:
            return None
        return min(self.end, step + self.every - (step - self.start) % self.every)


class Ramp(Section):
    """Gradual sparsity: a cubic ramp, then mask updates at full sparsity, then fixed masks. Step t
    means "after t optimizer steps"; 0.5 is half of the run, 1 its first step and 1.0 its end.
    `start == end` prunes in one shot.
    """

    start: Moment = 0
    """The first mask update, in finished steps or as a share of the run."""
    end: Moment
    """The end of the ramp; equal to `start`: one shot."""
    hold_until: Moment | None = None
    """The last mask update; by default `end`."""
    every: Interval = 1
    """Steps between mask updates, or their share of the run."""
    initial: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Sparsity of the first update."""
    target: float = Field(ge=0.0, lt=1.0)
    """Sparsity at the end of the ramp."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_levels(self.initial, self.target)
        moments = (self.start, self.end, self.hold_until)
        if len({type(moment) for moment in moments if moment}) < 2:  # 0 is 0 in both
            _check_order(*moments)
        return self

    def over(self, steps: int) -> Gradual:
        """The same in steps of a run of `steps`; raises `ValueError` where their order is wrong."""
        moments = {"start": self.start, "end": self.end, "hold_until": self.hold_until}
        given = {name: moment for name, moment in moments.items() if moment is not None}
        found = {name: in_steps(moment, steps) for name, moment in given.items()}
        try:
            _check_order(found["start"], found["end"], found.get("hold_until"))
        except ValueError as error:
            said = ", ".join(f"{name} = {moment}" for name, moment in given.items())
            raise ValueError(f"{error}, of {steps:,} steps ({said})") from None
        every = in_steps(self.every, steps, 1)
        return Gradual(**found, every=every, initial=self.initial, target=self.target)


class LearningRate(Section):
    """Linear warm-up to `peak`, then linear decay to `lowest` at `steps`; or in cycles, each of
    which has `lowest` in its last step.
    """

    peak: float = Field(gt=0.0)
    lowest: float = Field(default=0.0, ge=0.0)
    warmup_steps: int = Field(ge=0)
    steps: int = Field(ge=1)
    rewind_at: Gradual | None = None
    is_cyclic: bool = False  # down to `lowest` between the updates that rewind it

    def rates(self) -> list[float]:
        """The rate of each step."""
        return [self.at(step) for step in range(self.steps)]

    def at(self, step: int) -> float:
        """The rate of the step that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        start, end = self._decay(step)
        if start >= end:
            return self.peak
        return self.lowest + (self.peak - self.lowest) * max(0.0, (end - step) / (end - start))

    def _decay(self, step: int) -> tuple[int, int]:
        """Where the decay began that `step` is in, and where it has reached `lowest`."""
        start, end = self.warmup_steps, self.steps
        if self.rewind_at is not None:
            start = max(start, self.rewind_at.last_ramp_update(step) or 0)
            if self.is_cyclic:
                end = (self.rewind_at.next_ramp_update(step) or end) - 1
        return start, end
