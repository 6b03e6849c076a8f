"""Search for sub-networks of a fine-tuned model by several aims."""

from pathlib import Path
from typing import TYPE_CHECKING

from opfa.api.progress import progress
from opfa.api.recipes import AnyRecipe, Overrides, recipe_of
from opfa.errors import RunError
from opfa.search.recipe import SearchRecipe
from opfa.training.run import check_output

if TYPE_CHECKING:
    from opfa.search.results import SearchResult


@progress()
def search_models(
    recipe: AnyRecipe,
    output: str | Path,
    overrides: Overrides = (),
    *,
    take: int = 0,
    workers: int | None = None,
    resume: bool = False,
) -> "SearchResult":
    """Search the heads, neurons and layers of a fine-tuned model for a front of smaller models,
    each better than every other one in something, in the directory `output`.

    The recipe is one of fine-tuning: `model.init` is the fine-tuned model, and [search] says what
    may go, what should be low beside the task's error, and how many models are judged (NSGA-II, Deb
    et al. 2002). `take` points of the front are trained on as [training] says, and measured on the
    validation split once. So many `workers` judge at a time, by default one for each core; what is
    found doesn't depend on it. `resume` goes on where a search stopped, also with more evaluations.
    A recipe of one point, as the front has them, makes this point's model.

    Raises `RecipeError`, `ModelError`, and `RunError` where no model keeps to the limits. Needs
    `opfa[search]`.
    """
    checked = recipe_of(SearchRecipe, recipe, overrides)
    check_output(Path(output), checked, resume)  # here too, before torch is imported
    for name, value, least in (("take", take, 0), ("workers", workers, 1)):
        if value is not None and value < least:
            raise RunError(f"{name} = {value}: must be {least} or more")
    from opfa.search.search import search as execute

    return execute(checked, Path(output), workers=workers, take=take, resume=resume)
