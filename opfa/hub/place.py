"""Where a command that uses a model finds it by the name that the index gives it."""

import os
from pathlib import Path

from huggingface_hub import constants

from opfa.hub.download import download
from opfa.hub.index import known


def place_of(name: str) -> str:
    """The directory of a model of the index, any other name as it is.

    Such a model is beside its card in a clone. Elsewhere it is downloaded once, into the folder
    `opfa` of huggingface_hub's cache. A path that exists is never a name. Raises `ModelError` and
    `RunError` as `download` does.
    """
    model = None if os.path.lexists(name) else known(name)
    if model is None or model.source == name:  # of the Hub, where its own cache has it
        return name
    if model.directory is not None:
        return str(model.directory)
    kept = Path(constants.HF_HOME, "opfa", f"{name}-{str(model.manifest_sha256)[:16]}")
    if not kept.is_dir():  # else it is whole: it got its name after all files were checked
        download(name, kept)
    return str(kept)
