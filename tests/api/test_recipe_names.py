"""Recipes and overrides as Python has them."""

from pathlib import Path
from typing import Any

import pytest
from conftest import finetune_recipe, pretrain_recipe

import opfa
from opfa.api.recipes import Overrides, recipe_of, words_of
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RecipeError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(finetune_recipe(tmp_path / "model", tmp_path).to_toml())
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "training.epochs": 2,
            "model.init": Path("a b/model"),
            "task.metrics": ("f1", "accuracy"),
            "distillation": {"teacher": 'a "b"', "soft_weight": 0.25, "cache": False},
            "task.validation": None,
            "task.hub": "glue",
            "task.train": "train",
        },
        [
            "training.epochs=2", "model.init=a b/model", 'task.metrics=["f1", "accuracy"]',
            """distillation={teacher='a "b"', soft_weight=0.25, cache=false}""",
            "task.validation=", "task.hub=glue", "task.train=train",
        ],
    ],
    ids=["mapping", "words"],
)  # fmt: skip
def test_a_mapping_says_the_same_as_the_words_of_a_command_line(
    file: Path, overrides: Overrides
) -> None:
    found = recipe_of(FinetuneRecipe, file, overrides)
    assert (found.training.epochs, found.model.init) == (2.0, "a b/model")
    assert found.task.metrics == ("f1", "accuracy")
    assert found.distillation is not None and found.distillation.teacher == 'a "b"'
    assert found.distillation.soft_weight == 0.25 and not found.distillation.cache
    assert found.task.validation != str(file.parent / "validation.jsonl")


def test_a_file_an_object_and_values_are_the_same_recipe(file: Path) -> None:
    read = recipe_of(FinetuneRecipe, str(file), {"seed": 7})
    values = finetune_recipe(file.parent / "model", file.parent).model_dump(
        mode="json", exclude_none=True
    )
    assert recipe_of(FinetuneRecipe, values, {"seed": 7}) == read
    assert values["seed"] == 42  # what was given stays
    given = FinetuneRecipe.read(file)
    assert recipe_of(FinetuneRecipe, given, {"seed": 7}) == read
    assert recipe_of(FinetuneRecipe, given, ()) is given


def test_text_stays_text(file: Path) -> None:
    assert words_of({"name": "7", "model.init": "true"}) == ['name="7"', 'model.init="true"']
    assert recipe_of(FinetuneRecipe, file, {"name": "7"}).name == "7"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (None, {"training.epocs": 1}, "training.epocs: unknown key; did you mean 'epochs'"),
        (None, {"training.epochs": "many"}, "training.epochs: Input should be a valid number"),
        (None, "seed=7", "give a mapping, or a list of such texts"),
        ("upstream", (), "is a PretrainRecipe; a FinetuneRecipe is needed here"),
        ({"name": "x"}, {}, "model: missing; this key is required"),
        ("nowhere.toml", {}, "nowhere.toml: can't read this recipe"),
    ],
)
def test_mistakes_are_named_by_key(file: Path, recipe: Any, overrides: Any, message: str) -> None:
    if recipe is None:
        recipe = file
    given = pretrain_recipe(file.parent) if recipe == "upstream" else recipe
    with pytest.raises(RecipeError, match=message):
        opfa.finetune(given, file.parent / "out", overrides)
    assert not (file.parent / "out").exists()


def test_check_gives_the_recipe_of_either_kind(file: Path, tmp_path: Path) -> None:
    found = opfa.check(file, {"seed": 3})
    assert isinstance(found, FinetuneRecipe) and found.seed == 3
    assert opfa.check(pretrain_recipe(tmp_path)) == pretrain_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"recipe: has neither \[corpus\]"):
        opfa.check({"name": "x"})
