"""A whole search on a tiny model."""

from pathlib import Path

import pytest
from searching import questions, search_recipe, tuned  # noqa: F401 - fixtures

import opfa

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


def test_it_runs(tuned: Path, questions: Path, tmp_path: Path) -> None:
    recipe = search_recipe(tuned, questions)
    found = opfa.search_models(recipe, tmp_path / "out", workers=1)
    print(found)
    print(list((tmp_path / "out").rglob("*")))
    again = opfa.search_models(recipe, tmp_path / "out", workers=1, resume=True, take=1)
    print(again)
