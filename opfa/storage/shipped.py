"""Where recipes and model cards are: in a wheel inside `opfa/`, in a clone at the top.

Recipes are found by name: `sst2`, or `downstream/sst2`, is a file of `recipes/` wherever a command
is typed. A path ending in .toml is never a name, so a misspelt one can't become another recipe.
"""

import difflib
import os
from pathlib import Path

from opfa.errors import RecipeError, brief

PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """A file or folder under `recipes` or `model_cards`, such as `recipes/quickstart`."""
    inside = PACKAGE / name
    return inside if inside.exists() else PACKAGE.parent / name


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name; two files of one name are told apart by their folders."""
    found = shipped("recipes").glob("*/*.toml")
    files = sorted(found, key=lambda path: (path.parent.name, path.stem))
    stems = [path.stem for path in files]
    return {p.stem if stems.count(p.stem) == 1 else f"{p.parent.name}/{p.stem}": p for p in files}


def find_recipe(name: Path | str) -> Path:
    """The file that is meant: one that exists, or else the shipped recipe of this name.

    A directory is never meant, and what ends in .toml is always a path. Raises `RecipeError` with
    near matches for a name that none has, and with all that have it for one that several have.
    """
    text, known = str(name), recipe_files()
    if os.path.lexists(text) and not os.path.isdir(text):
        return Path(text)
    shown = brief(text, 300)
    if text.endswith(".toml"):
        if Path(text).stem in known:
            what = f"no such file; the one that comes with opfa is called {Path(text).stem}"
            raise RecipeError(f"{shown}: can't read this recipe: {what}")
        return Path(text)  # its reader says that there is none
    files = known.values()
    found = [p for p in files if text in (p.stem, f"{p.parent.name}/{p.stem}")]
    if len(found) == 1:
        return found[0]
    if found:
        several = " and ".join(f"{path.parent.name}/{path.stem}" for path in found)
        raise RecipeError(f"{shown}: more than one recipe has this name: {several}; give one")
    if os.path.isdir(text):
        return Path(text)  # its reader says so
    near = _near(text.rpartition("/")[2][:100], list(known))
    advice = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    what = f"no such file, nor has a shipped recipe this name; {advice}opfa recipes lists them"
    raise RecipeError(f"{shown}: can't read this recipe: {what}")


def name_of(file: Path | str) -> str:
    """What a user calls a recipe: its name if this is the file of a shipped one, else its path."""
    return next((n for n, path in recipe_files().items() if path == Path(file)), str(file))


def _near(name: str, known: list[str]) -> list[str]:
    """At most three names like this one: its beginning or its letters."""
    begins = [each for each in known if name and each.startswith(name)]
    return list(dict.fromkeys([*begins, *difflib.get_close_matches(name, known)]))[:3]
