"""Recipes and overrides as Python has them: a file or name, an object or plain values; a mapping
or words.

    opfa.finetune("sst2", "runs/a", {"training.epochs": 0.1, "distillation": None})
    opfa.finetune("sst2.toml", "runs/a", ["training.epochs=0.1", "distillation="])

A mapping is what a notebook expects: values are Python's, so nothing needs quotes in quotes. The
words are those of a command line, so that what worked there can be copied.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RecipeError, RunError, brief
from opfa.hub.place import place_of
from opfa.recipe import KINDS, Recipe, RecipeType, override_value, read_values
from opfa.search.recipe import SearchRecipe
from opfa.storage.runs import recipe_beside
from opfa.storage.shipped import find_recipe
from opfa.toml import toml_value
from opfa.upstream.recipe import PretrainRecipe

Overrides = Mapping[str, Any] | Sequence[str]  # Any: what TOML can hold, a path, or None
Values = Mapping[str, Any]  # of a whole recipe, by section
AnyRecipe = str | Path | Recipe | Values


def recipe_of(kind: type[RecipeType], recipe: AnyRecipe, overrides: Overrides) -> RecipeType:
    """The recipe that a file, an object or values say, overridden and checked."""
    words = words_of(overrides)
    if isinstance(recipe, (str, Path)):
        return kind.read(find_recipe(recipe), words)
    if isinstance(recipe, Recipe) and not isinstance(recipe, kind):
        raise RecipeError(f"recipe: is a {type(recipe).__name__}; a {kind.__name__} is needed here")
    if isinstance(recipe, kind) and not words:
        return recipe
    return kind.checked(_overridden(recipe, words), "recipe", words)


def task_recipe_of(
    model: str | Path, recipe: AnyRecipe | None, overrides: Overrides
) -> FinetuneRecipe:
    """The recipe that is given, or else that of the model's run."""
    found = recipe_beside(place_of(str(model))) if recipe is None else recipe
    if found is None:
        is_here = Path(model).exists()
        what = "is no run, whose recipe would be used" if is_here else "is no directory here"
        raise RunError(f"--recipe: is needed, since {model} {what}")
    return recipe_of(FinetuneRecipe, found, overrides)


def any_recipe_of(recipe: AnyRecipe, overrides: Overrides) -> PretrainRecipe | FinetuneRecipe:
    """The same for a recipe of any kind, which its sections tell."""
    words, where = words_of(overrides), "recipe"
    if isinstance(recipe, (str, Path)):
        values, where = read_values(find_recipe(recipe), words), brief(recipe, 300)
    else:
        values = _overridden(recipe, words)
    if not values.keys() & set(KINDS.values()):
        what = "has neither [corpus], for opfa pretrain, nor [task], for opfa finetune"
        raise RecipeError(f"{where}: {what}")
    kind = PretrainRecipe if "corpus" in values else FinetuneRecipe
    kind = SearchRecipe if "search" in values else kind
    return kind.checked(values, where, words)


def _overridden(recipe: Recipe | Values, words: Sequence[str]) -> dict[str, Any]:
    is_object = isinstance(recipe, Recipe)
    given = recipe.model_dump(mode="json", exclude_none=True) if is_object else recipe
    values = copy.deepcopy(dict(given))
    for word in words:
        override_value(values, word)
    return values


def words_of(overrides: Overrides) -> list[str]:
    """Overrides as `section.key=value`; None removes a key."""
    if isinstance(overrides, str):
        raise RecipeError(f"overrides = {overrides!r}: give a mapping, or a list of such texts")
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={'' if value is None else _toml(value)}" for key, value in overrides.items()]


def _toml(value: Any) -> str:  # Any: as in `Overrides`
    """A value in one line of TOML."""
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, (list, tuple, range)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (str, Path)):
        return toml_value(str(value))
    return json.dumps(value) if isinstance(value, (bool, int, float)) else json.dumps(str(value))
