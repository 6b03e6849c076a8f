"""Movement (Sanh et al., 2020): scores that are learnt while the model is fine-tuned.

A layer computes with W' = W * M(S). The backward pass takes M for the identity (straight-through),
so a score gets dL/dS = dL/dW' * W (section 4, eq. 2): it grows where a weight moves away from zero.
Gradient and weight are those before masking, so pruned weights go on scoring and may come back.

Scores start at zero and follow AdamW without decay, at a rate of their own on the schedule of the
rest. Scores and moments are the pruner's state: resume points hold them, and the model never does.
What differs from the authors' code, and why, is in README.md.
"""

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from opfa.compression.scores import Part, Score, State
from opfa.recipe import Positive, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from opfa.compression.schedules import Gradual, Ramp

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of AdamW
MOST = 0.995  # of a matrix that a threshold may prune: the authors' code keeps half a percent


class Learnt(Score):
    """Base of both: scores S, which AdamW changes at every step."""

    kept: ClassVar[int] = 3
    learning_rate: Positive = 1e-2
    """The highest learning rate of the scores."""

    def observes(self, step: int) -> bool:
        """At every step of training."""
        return step > 0

    def of(self, part: Part) -> "Tensor":
        """S, unbounded; all 0 before the first step."""
        return _run(part, "score")


class Movement(Learnt):
    """Hard movement: the k lowest scores go; each score learns with its weight."""

    kind: Literal["movement"] = "movement"
    """Its name in a recipe."""

    def check(self, schedule: "Gradual | Ramp") -> None:
        """Refuse to prune before the first step, when all scores are zero."""
        _check_start(self.kind, schedule)

    def observe(self, part: Part, gradient: "Tensor") -> State:
        """AdamW's step."""
        return _learnt(part, gradient * part.weight, self.learning_rate)


class SoftMovement(Learnt):
    """Soft movement: what is at or below a threshold goes, and a penalty decides how much that is.
    `pruning.schedule.target` is the most that may go: 0.995 at most.
    """

    kind: Literal["soft_movement"] = "soft_movement"
    """Its name in a recipe."""
    initial_threshold: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The threshold of sigmoid(S) up to the ramp's start; scores start at 0.5."""
    threshold: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The threshold from the ramp's end on; the ramp between is the schedule's."""
    penalty: Weight
    """Lambda at the ramp's end, of the mean of sigmoid(S); the larger, the more goes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.initial_threshold > self.threshold:
            what = f"must not be above threshold = {self.threshold}"
            raise ValueError(f"initial_threshold = {self.initial_threshold}: {what}")
        return self

    def check(self, schedule: "Gradual | Ramp") -> None:
        """Refuse what a schedule can't say here: sparsity is a result, and has only a limit."""
        _check_start(self.kind, schedule)
        what = f"with score = {self.kind!r} a threshold decides what goes"
        if schedule.initial:
            raise ValueError(f"initial = {schedule.initial}: {what}; leave it out")
        if schedule.target > MOST:
            limit = f"target is the most that may go, and can be {MOST} at most"
            raise ValueError(f"target = {schedule.target}: {what}; {limit}")

    def observe(self, part: Part, gradient: "Tensor") -> State:
        """AdamW's step, with the gradient of lambda * mean(sigmoid(S)) over the matrices' means.

        Lambda grows with the threshold: lambda_t = lambda * tau_t / tau (section 4, soft movement).
        """
        # in fp32 the last bit depends on where a run begins, and so on the number of ranks
        kept = _run(part, "score").double().sigmoid()
        share = self.penalty * self._tau(part.ramp) / self.threshold
        share /= part.matrices * part.shape.numel()
        pressed = (kept * (1 - kept) * share).float()
        return _learnt(part, gradient * part.weight + pressed, self.learning_rate)

    def threshold_at(self, ramp: float) -> float:
        """Of S, not of sigmoid(S), which can't tell low scores apart."""
        tau = self._tau(ramp)
        return math.log(tau / (1 - tau)) if tau else -math.inf

    def _tau(self, ramp: float) -> float:
        return self.initial_threshold + (self.threshold - self.initial_threshold) * ramp


def _check_start(kind: str, schedule: "Gradual | Ramp") -> None:
    if schedule.start == 0 and (schedule.initial or schedule.end == 0):
        what = f"score = {kind!r} is learnt while training, so nothing can go before the first step"
        raise ValueError(f"start = {schedule.start}: {what}; start later")


def _run(part: Part, key: str) -> "Tensor":
    """A run of the state, [n]; zeros before the first step."""
    return part.state[key] if part.state else part.weight.new_zeros(part.weight.shape)


def _learnt(part: Part, gradient: "Tensor", learning_rate: float) -> State:
    """One step of AdamW without decay (Loshchilov & Hutter, 2019), number `part.step`."""
    mean = _run(part, "mean").mul(BETA1).add(gradient, alpha=1 - BETA1)
    square = _run(part, "square").mul(BETA2).addcmul(gradient, gradient, value=1 - BETA2)
    size = square.div(1 - BETA2**part.step).sqrt_().add_(EPSILON)
    rate = learning_rate * part.pace / (1 - BETA1**part.step)
    score = _run(part, "score").addcdiv(mean, size, value=-rate)
    return {"score": score, "mean": mean, "square": square}
