"""Recipes by name, from anywhere, and the text of a recipe with other values."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from opfa.errors import RecipeError
from opfa.recipe import override_value
from opfa.storage import shipped as place
from opfa.storage.recipe_text import changed, commands_in, for_file, what_it_is
from opfa.storage.shipped import find_recipe, recipe_files

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*/*.toml"))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose folders `a` and `b` have a recipe `same` each, and `a` one `other`."""
    for name in ("a/same", "b/same", "a/other"):
        file = tmp_path / f"opfa/recipes/{name}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(place, "PACKAGE", tmp_path / "opfa")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "opfa/recipes"


@pytest.mark.parametrize("name", ["sst2", "downstream/sst2"])
def test_a_name_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == find_recipe(Path(name)) == RECIPES / "downstream/sst2.toml"


def test_a_file_of_this_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sst2").write_text("")
    assert find_recipe("sst2") == Path("sst2")
    Path("rte").symlink_to("nowhere")  # its reader says so
    assert find_recipe("rte") == Path("rte")


def test_a_directory_of_this_name_is_a_run_and_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sst2").mkdir()
    assert find_recipe("sst2") == RECIPES / "downstream/sst2.toml"


def test_a_name_that_two_recipes_have_is_refused_with_both(two: Path) -> None:
    assert list(recipe_files()) == ["other", "a/same", "b/same"]
    with pytest.raises(
        RecipeError, match="^same: more than one recipe .*: a/same and b/same; give"
    ):
        find_recipe("same")
    assert find_recipe("b/same") == two / "b/same.toml"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sst", "did you mean 'sst2' or 'sst2-qat'"),
        ("upstream/bert-base-95", "did you mean 'bert-base-90' or 'bert-base-85'"),
        ("nothing-like-it-at-all", "this name; opfa recipes lists them"),
        ("", "this name; opfa recipes lists them"),
        ("x" * 5000, "this name; opfa recipes lists them"),
        ("a\0b", "this name"),
    ],
)
def test_an_unknown_name_is_one_short_message_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=near) as error:
        find_recipe(name)
    assert "can't read this recipe: no such file" in str(error.value)
    assert len(str(error.value)) < 600


def test_a_misspelt_path_is_never_another_recipe(two: Path) -> None:
    assert find_recipe("other") == two / "a/other.toml"
    with pytest.raises(RecipeError, match="no such file; the one that comes with opfa is called o"):
        find_recipe("recipes/a/other.toml")
    assert find_recipe("mine.toml") == Path("mine.toml")  # its reader says that there is none


# the text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_says_in_one_line_what_it_is(path: Path) -> None:
    what = what_it_is(path.read_text())
    assert what.endswith((".", "?")) and 20 < len(what) < 120


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        inner = f"{prefix}{key}"
        found += leaves(value, f"{inner}.") if isinstance(value, dict) else [inner]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_any_value_of_any_recipe_is_changed_and_taken_out_in_its_text(path: Path) -> None:
    text = path.read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert changed(text, tomllib.loads(text), "x.toml") == text
    for new in ("'a # b'", "[1, 2.5, true]", ""):
        for first in (0, 1):  # every second one
            values = tomllib.loads(text)
            for key in leaves(values)[first::2]:
                override_value(values, f"{key}={new}")
            values = {key: value for key, value in values.items() if value != {}}
            found = changed(text, values, "x.toml")
            assert tomllib.loads(found) == values
            assert new == "" or [c for c in found.splitlines() if c.startswith("#")] == comments


def test_comments_stay_where_they_are_and_a_new_key_is_the_last_of_its_section() -> None:
    text = (
        '# head\nname = "a" # the # name\n\n[b]\n# of c # too\nc = [ # list\n  1,\n]\nd = 2\n\n'
        "# of j\n# too\n[j] # j\n# of k\nk = true # k\n"
    )
    values = {
        **{"name": "#", "seed": 3, "b": {"c": [2], "d": 2, "e": {"f": "g"}, "l": 0.5}},
        **{"g": {"h": {"i": []}}, "j": {"k": 1}},
    }
    assert changed(text, values, "x.toml") == (
        '# head\nname = "#" # the # name\nseed = 3\n\n[b]\n# of c # too\nc = [2]\nd = 2\nl = 0.5\n'
        '\n[b.e]\nf = "g"\n\n# of j\n# too\n[j] # j\n# of k\nk = 1 # k\n\n[g.h]\ni = []\n'
    )


def test_a_section_goes_with_its_comments_and_the_next_one_keeps_its_own() -> None:
    text = 'name = "a"\n\n[b] # b\n# of b\nc = 1\n\n# of d\n[d]\ne = 1\n'
    found = changed(text, {"name": "a", "d": {"e": 1}}, "x.toml")
    assert found == 'name = "a"\n\n# of d\n[d]\ne = 1\n'


@pytest.mark.parametrize("values", [{"a": {}}, {"a": {"b": {"c": None}}}])
def test_a_text_that_can_not_be_changed_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="x.toml: its text can't be changed like this"):
        changed("[a.b]\nc = 1\n", values, "x.toml")


def test_a_recipe_of_ones_own_speaks_of_itself() -> None:
    text = (RECIPES / "own/my-encoder.toml").read_text()
    found = for_file(text, "my-encoder", Path("sub/mine.toml"), "keys.json")
    assert found.startswith("#:schema keys.json\n# Your own encoder")
    assert commands_in(found) == [
        "opfa prepare sub/mine.toml --output prepared/mine",
        "opfa pretrain sub/mine.toml --output runs/mine",
    ]
    assert tomllib.loads(found) == tomllib.loads(text)
    sst2 = (RECIPES / "downstream/sst2.toml").read_text()
    mine = for_file(sst2, "sst2", Path("mine.toml"), "keys.json")
    assert commands_in(mine) == ["opfa finetune mine.toml --output runs/mine"]
    assert tomllib.loads(mine) == tomllib.loads(sst2)
