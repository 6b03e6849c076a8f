"""A whole search on a tiny model."""

import json
from pathlib import Path

import pytest
from searching import search_recipe, tuned  # noqa: F401 - a fixture

import opfa
from opfa.search.results import SearchResult

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


def test_it_runs(tuned: Path, examples: Path, tmp_path: Path) -> None:
    recipe = search_recipe(tuned, examples)
    found = opfa.search_models(recipe, tmp_path / "out", workers=1)
    print(found)
    print(list((tmp_path / "out").rglob("*")))
    again = opfa.search_models(recipe, tmp_path / "out", workers=1, resume=True, take=1)
    print(again)
