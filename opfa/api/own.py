"""Recipes to begin with, as functions: which are shipped, and a new one for data of one's own."""

import os
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from opfa.api.recipes import Overrides, words_of
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RecipeError
from opfa.recipe import Recipe, command_of, override_value, read_small, read_values
from opfa.report.tables import Result, Row, Table
from opfa.search.recipe import SearchRecipe
from opfa.storage.files import check_new, write_text
from opfa.storage.recipe_text import changed, commands_in, for_file, what_it_is
from opfa.storage.shipped import find_recipe, recipe_files, shipped
from opfa.upstream.recipe import PretrainRecipe

GROUPS = {
    "own": "your own data",
    "downstream": "tasks",
    "search": "searches",
    "upstream": "pre-training",
}
OWN = "own"  # the folder of the recipes for data and models of one's own
CLASSES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "search": SearchRecipe,
}


class Listed(Row):
    """A shipped recipe."""

    name: str
    command: str
    what: str
    file: str


class Listing(Result):
    """Shipped recipes."""

    recipes: list[Listed]

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """A table for each group."""
        groups: dict[str, list[tuple[str, str, str]]] = {}
        for each in self.recipes:
            folder = Path(each.file).parent.name
            is_8bit = each.name.endswith("-qat")
            group = "8 bits" if is_8bit else GROUPS.get(folder, folder)
            groups.setdefault(group, []).append((each.name, each.command, each.what))
        for group, rows in groups.items():
            yield Table((group, "command", "what it is"), rows)


class Written(Result):
    """A recipe of one's own that was written."""

    file: str
    recipe: str = Field(description="The shipped recipe that it is made of.")
    settings: list[str]
    columns: dict[str, str] = Field(description="Keys of [task] that were found in the data.")
    problems: list[str] = Field(description="What is still to be edited.")
    next: list[str] = Field(description="What to run.")

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """Where it is, and what to run next."""
        yield f"{self.file}: a recipe made of {self.recipe}"
        yield from (f"  found in the data: task.{k} = {c!r}" for k, c in self.columns.items())
        yield from (f"  to be edited: {problem}" for problem in self.problems)
        yield "next:"
        yield from (f"  {command}" for command in self.next)


def list_recipes(folder: str = "*") -> Listing:
    """The recipes that come with opfa, those for one's own data first."""
    found = []
    for name, path in recipe_files().items():
        if folder in ("*", path.parent.name):
            command = command_of(read_values(path)) or ""
            what = what_it_is(read_small(path, name, "recipe"))
            row = Listed(name=name, command=command, what=what, file=str(path))
            found.append((path.parent.name != OWN, row))
    return Listing(recipes=[row for _, row in sorted(found, key=lambda each: each[0])])


def new_recipe(name: str, file: str | Path | None = None, overrides: Overrides = ()) -> Written:
    """Write a copy of the shipped recipe `name` with other values as a new file, NAME.toml.

    It must be one that would be accepted. Columns that go without saying are filled in.
    Raises `RecipeError` for a value that can't be, and `RunError` for a file that exists.
    """
    source, settings = find_recipe(name), words_of(overrides)
    file = Path(f"{source.stem}.toml" if file is None else file)
    check_new(file, "file")
    if file.suffix != ".toml" or not str(file.absolute()).isprintable():
        raise RecipeError(f"{str(file)!r}: a recipe's file is called NAME.toml")
    command = command_of(read_values(source))
    if command is None:
        raise RecipeError(f"{source}: has neither [corpus] nor [task], or both")
    text = read_small(source, str(source), "recipe")
    text = for_file(text, source.stem, file, _schema(command, file.absolute().parent))
    values = tomllib.loads(text)
    values["name"] = file.stem
    if values.get("data") == f"prepared/{source.stem}":
        values["data"] = f"prepared/{file.stem}"
    for setting in settings:
        override_value(values, setting)
    CLASSES[command].check(values, str(file))
    columns, problems = _columns(values.get("task", {}), settings)
    values.get("task", {}).update(columns)
    text = changed(text, values, str(file))
    write_text(file, text)
    next_ = [f"opfa check {shlex.quote(str(file))}", *commands_in(text)]
    return Written(
        file=str(file),
        recipe=source.stem,
        settings=list(settings),
        columns=columns,
        problems=problems,
        next=next_,
    )


def _columns(
    task: Mapping[str, Any], settings: Sequence[str]
) -> tuple[dict[str, str], list[str]]:  # Any: checked values
    """What the data's own columns say, and what they don't."""
    from opfa.tasks.columns import missing_columns, told_columns

    given = {setting.partition("=")[0].strip().removeprefix("task.") for setting in settings}
    missing, free = missing_columns(task)
    found = {} if given & {*missing} else told_columns(task, missing, free)
    has = f"{task.get('train')} has {', '.join(map(repr, free))}"
    return found, [f"task.{key} = {task[key]!r}: {has}" for key in missing if key not in found]


def _schema(command: str, folder: Path) -> str:
    """Where editors find the keys, from a folder: a relative path within a clone."""
    schema = shipped(f"recipes/schema/{command}.json")
    is_near = folder.is_relative_to(schema.parents[2])
    return Path(os.path.relpath(schema, folder) if is_near else schema).as_posix()
