"""Where the recipes and the model cards are: in a wheel inside `opfa/`, in a clone at the top."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """A file or folder under `recipes` or `model_cards`, such as `recipes/quickstart`."""
    inside = PACKAGE / name
    return inside if inside.exists() else PACKAGE.parent / name
