"""The index: released models that the project knows, as `model_cards/index.json` lists them.

One of ours has the SHA-256 of its release manifest, so its name means these files and no others. A
figure that nobody has measured here is null.
"""

from pydantic import Field, TypeAdapter, ValidationError

from opfa.errors import ModelError
from opfa.recipe import Section
from opfa.storage.shipped import shipped

INDEX = shipped("model_cards/index.json")


class Released(Section):
    """A released model."""

    name: str
    source: str  # a Hub name or a URL
    manifest_sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    task: str
    sparsity: float | None = Field(ge=0, le=1)
    bytes: int | None = Field(ge=0)
    results: dict[str, float | None] | None
    base_model: str
    licence: str | None


def released() -> list[Released]:
    """All models of the index."""
    try:
        return TypeAdapter(list[Released]).validate_json(INDEX.read_bytes())
    except ValidationError as error:
        raise ModelError(f"{INDEX}: not an index of models: {error}") from error
