"""Pruning of heads, neurons and layers of a fine-tuned model, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opfa.api.progress import progress
from opfa.api.recipes import AnyRecipe, Overrides, task_recipe_of
from opfa.storage.files import check_new

if TYPE_CHECKING:
    from opfa.downstream.results import DepthResult, StructuredResult

CostName = Literal["macs", "milliseconds", "parameters"]


@progress()
def prune_structured(
    model: str | Path,
    output: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    keep: float,
    of: CostName = "macs",
    score: Literal["fisher", "magnitude"] = "fisher",
    examples: int = 8192,
    batch: int = 1,
    tokens: int | None = None,
) -> "StructuredResult":
    """Prune whole heads and neurons of a fine-tuned model, without training, into `output`.

    The model keeps the share `keep` of its multiply-adds, of its milliseconds in torch on this
    machine, or of its parameters. The first and the last count heads and neurons alone. They are
    of `batch` sequences of `tokens` tokens, by default those of the recipe's task. What a unit is
    worth is the Fisher information of its gate on training examples of the recipe's task (by
    default of the run's own), or its magnitude. The output matrices are then fitted by least
    squares. The zeros have the old shape; `opfa.shrink` makes smaller matrices of them.
    Raises `RecipeError` for settings, `RunError` for a budget that can't be met, and `ModelError`.
    """
    check_new(Path(output))
    checked = task_recipe_of(model, recipe, overrides)
    from opfa.downstream.budget import Budget

    given = {"keep": keep, "of": of, "score": score, "examples": examples, "batch": batch}
    budget = Budget.check({**given, **({} if tokens is None else {"tokens": tokens})}, "prune")
    from opfa.downstream.structured import prune_structured as execute

    return execute(str(model), checked, Path(output), budget)


@progress()
def prune_layers(
    model: str | Path,
    output: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    layers: int,
    examples: int = 8192,
) -> "DepthResult":
    """Keep so many layers of a fine-tuned model, those that its loss needs most, in `output`.

    What a layer is worth is the Fisher information of its gate, on training examples of the
    recipe's task, by default of the run's own. Any transformers loads the result. It has to be
    fine-tuned again. Raises `RunError` where there are not more layers, and `ModelError`.
    """
    check_new(Path(output))
    checked = task_recipe_of(model, recipe, overrides)
    from opfa.downstream.depth import prune_layers as execute

    return execute(str(model), checked, Path(output), layers, examples)
