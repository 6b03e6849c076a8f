"""The index: released models that the project knows, as `model_cards/index.json` lists them.

One of ours has the SHA-256 of its release manifest, so its name means these files and no others. A
figure that nobody has measured here is null.
"""

from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from opfa.errors import ModelError
from opfa.hub import manifest
from opfa.recipe import Section
from opfa.storage.shipped import shipped

INDEX = shipped("model_cards/index.json")


class Released(Section):
    """A released model."""

    name: str
    source: str | None  # a Hub name or a URL; None for one that only a clone has
    manifest_sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    task: str
    sparsity: float | None = Field(ge=0, le=1)
    bytes: int | None = Field(ge=0)
    results: dict[str, float | None] | None
    base_model: str
    licence: str | None

    @property
    def directory(self) -> Path | None:
        """The directory of its card, if the weights are there too: so in a clone."""
        place = INDEX.parent / self.name
        if not (place / manifest.MANIFEST).is_file():
            return None
        files = manifest.read(place).files
        return place if all((place / file).is_file() for file in files) else None


def released() -> list[Released]:
    """All models of the index. Raises `ModelError` where it is damaged."""
    try:
        return TypeAdapter(list[Released]).validate_json(INDEX.read_bytes())
    except ValidationError as error:
        raise ModelError(f"{INDEX}: not an index of models: {error}") from error


def known(name: str) -> Released | None:
    """The model of the index that has this name."""
    return next((model for model in released() if model.name == name), None)
