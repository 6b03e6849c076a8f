"""Patterns: which tensors are pruned, and over what the target sparsity is counted.

The default is the paper's: the weight of every `nn.Linear` of the encoder. Embeddings, the pooler
and all heads stay dense: fine-tuning throws heads away, and not every task's model has a pooler.
Several patterns may be parts of one pruning, such as blocks for attention and neurons elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import regex  # as `re`, but with a limit on time
from pydantic import Field, ValidationInfo, field_validator

from opfa.compression.grains import AnyGrain, Grain, Weight
from opfa.compression.measured import Activation, Curvature, Fisher
from opfa.compression.movement import Movement, SoftMovement
from opfa.compression.schedules import Gradual, Ramp
from opfa.compression.scores import Magnitude
from opfa.errors import RecipeError, brief, first_line
from opfa.recipe import Section

if TYPE_CHECKING:  # recipes hold patterns, and a recipe is read without waiting for torch
    from torch import nn

# The path of a linear layer that belongs to a numbered encoder layer, in every family known:
# bert.encoder.layer.0.…, distilbert.transformer.layer.0.…, model.layers.0.…
ENCODER_LAYER = r"(^|\.)layers?\.\d+\."
LONGEST_RULE = 500  # characters
BLOCK = re.compile(r"(\d{1,9})x(\d{1,9})")  # a grain's short form
LONGEST_SECONDS = 0.2  # to look for a rule in one name; a nested repetition may take for ever

Schedule = TypeVar("Schedule", Gradual, Ramp)
# All that a recipe may name.
AnyScore = Annotated[
    Magnitude | Activation | Curvature | Fisher | Movement | SoftMovement,
    Field(discriminator="kind"),
]


class Pattern(Section):
    """Which weights are pruned. A pruned weight keeps its value, and a later update takes it back
    if live ones have come to be worth less; not if `monotone`.
    """

    include: tuple[str, ...] = (ENCODER_LAYER,)
    """Regular expressions, searched for in the names of linear layers."""
    exclude: tuple[str, ...] = ()
    """Of those, the ones to leave dense."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each tensor (heads and neurons: each layer) reaches the target, or all together."""
    monotone: bool = False
    """A pruned weight never comes back."""
    # Their defaults are not written, so that recipes without them keep their digests.
    score: AnyScore = Field(default=Magnitude(), exclude_if=lambda score: score == Magnitude())
    """What each weight is worth."""
    grain: AnyGrain = Field(default=Weight(), exclude_if=lambda grain: grain == Weight())
    """Which weights are pruned together."""
    where: ClassVar[str] = "pruning.pattern."  # a recipe has it

    @field_validator("score", "grain", mode="before", json_schema_input_type=str | dict[str, Any])
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:  # Any: before it is checked
        """`"magnitude"` is short for `{ kind = "magnitude" }`, and `"32x32"` for a block."""
        if not isinstance(value, str):
            return value
        if info.field_name == "grain" and (block := BLOCK.fullmatch(value)):
            return {"kind": "block", "rows": int(block[1]), "columns": int(block[2])}
        return {"kind": value}

    @field_validator("include", "exclude")
    @classmethod
    def _check(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            if len(rule) > LONGEST_RULE:
                what = f"{brief(rule)!r}: {len(rule):,} characters"
                raise ValueError(f"{what}, at most {LONGEST_RULE} are accepted")
            try:
                re.compile(rule)
                regex.compile(rule)
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                what = f"not a regular expression: {first_line(error)}"
                raise ValueError(f"{brief(rule)!r}: {what}") from error
        return rules

    def layers(self, model: "nn.Module", key: str = "pruning.") -> "dict[str, nn.Linear]":
        """The matching linear layers by module path; `RecipeError` when a rule matches nothing.

        `key` is what the names of keys begin with in messages.
        """
        from torch import nn

        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        included = [_matches(f"{key}include", rule, linear) for rule in self.include]
        excluded = [_matches(f"{key}exclude", rule, linear) for rule in self.exclude]
        names = set().union(*included) - set().union(*excluded)
        if not names:
            rules = f"{key}include = {list(self.include)}, exclude = {list(self.exclude)}"
            raise RecipeError(f"{rules}: no linear layer is left to prune")
        return {name: layer for name, layer in linear.items() if name in names}

    def schedule(self, whole: Schedule) -> Schedule:
        """The schedule of what this pattern prunes."""
        return whole


class PartPattern(Pattern):
    """A part of the model: all that `[pruning.pattern]` may say, also score and grain, and a target
    of its own.
    """

    target: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Sparsity of this part at the end of the ramp; by default that of the schedule."""

    def schedule(self, whole: Schedule) -> Schedule:
        """Up to its own target, if it has one."""
        return whole if self.target is None else whole.model_copy(update={"target": self.target})


class Bound(NamedTuple):
    """A pattern for one model: the linear layers that it prunes, and their grain."""

    pattern: Pattern
    grain: Grain
    layers: "dict[str, nn.Linear]"


def bind(
    model: "nn.Module", patterns: Sequence[Pattern], grain: Grain | None = None
) -> list[Bound]:
    """What each pattern prunes. `grain` replaces the patterns' own. Raises `RecipeError` where a
    grain doesn't fit its matrices, and for a matrix that two patterns name.
    """
    found: list[Bound] = []
    for index, pattern in enumerate(patterns):
        is_part = isinstance(pattern, PartPattern)
        key = f"pruning.parts.{index}." if is_part else pattern.where
        layers = pattern.layers(model, key) if is_part else pattern.layers(model)
        try:
            own, names = (grain or pattern.grain).of(model, layers)
        except RecipeError as error:
            raise RecipeError(f"{key}{error}") from None
        for before, other in enumerate(found):
            if twice := [name for name in names if name in other.layers]:
                what = f"{twice[0]} is pruned by pruning.parts.{before} already; exclude it in one"
                raise RecipeError(f"{key}include = {list(pattern.include)}: {what}")
        found.append(Bound(pattern, own, {name: layers[name] for name in names}))
    return found


def _matches(key: str, rule: str, layers: "Mapping[str, nn.Module]") -> set[str]:
    try:
        names = {name for name in layers if regex.search(rule, name, timeout=LONGEST_SECONDS)}
    except TimeoutError as error:
        what = f"takes more than {LONGEST_SECONDS:g} s for the name of one layer"
        raise RecipeError(f"{key} = {brief(rule)!r}: {what}; write it simpler") from error
    if not names:
        some = ", ".join(list(layers)[:3])
        what = f"matches no linear layer (there are {some}, …)"
        raise RecipeError(f"{key} = {rule!r}: {what}")
    return names
