"""Where a command that uses a model finds it by the name that the index gives it."""

import os
from pathlib import Path

from opfa.hub.index import Released, known


def place_of(name: str) -> str:
    """The directory of a model of the index, any other name as it is.

    Such a model is beside its card in a clone. Elsewhere it is downloaded once, into the folder
    `opfa` of huggingface_hub's cache. A path that exists is never a name. Raises `ModelError` and
    `RunError` as `download` does.
    """
    model = None if os.path.lexists(name) else known(name)
    if model is None or model.source == name:  # of the Hub, where its own cache has it
        return name
    return str(model.directory or _downloaded(model))


def _downloaded(model: Released) -> Path:
    """Its directory in the cache; a directory there is whole, since all files were checked."""
    from huggingface_hub import constants  # here, since every command waits for this file

    from opfa.hub.download import download

    kept = Path(constants.HF_HOME, "opfa", f"{model.name}-{str(model.manifest_sha256)[:16]}")
    if not kept.is_dir():
        download(model.name, kept)
    return kept
