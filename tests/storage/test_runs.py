"""A run directory stands for its model and its recipe."""

import json
from pathlib import Path

import pytest

from opfa.errors import ModelError
from opfa.storage.runs import model_in, recipe_beside, shortened


def run_in(directory: Path) -> Path:
    (directory / "model").mkdir(parents=True)
    (directory / "recipe.toml").touch()
    return directory


def test_a_run_is_its_model_and_anything_else_is_itself(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    assert model_in(run) == run / "model"
    assert model_in(run / "model") == run / "model"
    assert model_in(tmp_path / "nothing") == tmp_path / "nothing"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_model_with_a_directory_called_model_is_no_run(tmp_path: Path, file: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / file).touch()
    assert model_in(tmp_path) == tmp_path


def test_a_run_that_something_was_exported_into_is_still_one(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    (run / "config.json").touch()
    assert model_in(run) == run / "model"


def test_a_run_without_a_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert model_in(tmp_path) == tmp_path  # whatever it is
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(ModelError, match="is a run that isn't finished"):
        model_in(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"best_run": "seed-43"}))
    with pytest.raises(ModelError, match=r"holds several runs; the best is .*/seed-43$"):
        model_in(tmp_path)


def test_the_recipe_of_a_run_is_found_from_its_model_too(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    assert recipe_beside(run) == recipe_beside(str(run / "model")) == run / "recipe.toml"
    assert recipe_beside(tmp_path) is None
    (tmp_path / "plain").mkdir()
    assert recipe_beside(tmp_path / "plain") is None


def test_only_absolute_paths_are_shortened() -> None:
    values = {"a": "/home/me/data/train.csv", "b": ["~/models/x", "org/name", 3], "c": None}
    assert shortened(values) == {"a": "data/train.csv", "b": ["models/x", "org/name", 3], "c": None}
