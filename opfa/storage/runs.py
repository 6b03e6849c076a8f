"""A run directory in the place of a model: RUN means RUN/model, and RUN/recipe.toml its recipe.

This is the one place that knows, so every command and every key that takes a model takes a run.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opfa.errors import ModelError
from opfa.storage.foreign import CONFIG, WEIGHT_FILES

MODEL, RECIPE, RESULTS = "model", "recipe.toml", "results.json"


def model_in(directory: Path) -> Path:
    """RUN/model for a run, and any other directory itself; raises `ModelError` for a run without
    a model of its own: one that isn't finished, or several together.
    """
    is_run = (directory / RECIPE).is_file()
    is_model = os.path.lexists(directory / CONFIG) and not is_run
    if is_model or any(any(directory.glob(pattern)) for pattern in WEIGHT_FILES):
        return directory
    if (directory / MODEL).is_dir():
        return directory / MODEL
    if is_run and (best := _best(directory)):
        raise ModelError(f"{directory}: holds several runs; the best is {directory / best}")
    if is_run and (directory / "checkpoints").is_dir():
        raise ModelError(f"{directory}: is a run that isn't finished, so it has no model yet")
    return directory


def recipe_beside(name: str | Path) -> Path | None:
    """The recipe of a run or a release: in its directory, or above RUN/model; None without one."""
    directory = Path(name)
    places = [directory / RECIPE]
    if directory.absolute().name == MODEL:
        places.append(directory.absolute().parent / RECIPE)
    return next((path for path in places if path.is_file()), None)


def shortened(value: Any) -> Any:  # Any: what JSON can hold
    """The same without the directories of whoever ran it: the last two parts of absolute paths."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~"))
    return "/".join(Path(value).parts[-2:]).lstrip("/") if is_path else value


def _best(directory: Path) -> str:
    """The best of several runs; empty where it isn't known."""
    try:
        return str(json.loads((directory / RESULTS).read_bytes()).get("best_run") or "")
    except (OSError, ValueError, AttributeError):
        return ""
