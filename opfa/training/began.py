"""What a run began with: digests of its data and of the models that it read.

They are in `environment.json`. A resume goes on with the same, or is refused.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opfa.errors import RunError, opening
from opfa.storage import seal
from opfa.storage.seal import Files
from opfa.training.checkpoint import start_digest
from opfa.training.finished import changed_model

FILE = "environment.json"
Facts = Mapping[str, Any]  # what `environment.json` holds
log = logging.getLogger(__name__)


def models(read: Mapping[str, str | None]) -> dict[str, Any]:
    """The facts about models, by the recipe's keys; those of the Hub have no digest. Warns of one
    that was changed after the run that wrote it.
    """
    found = {key: Path(name) for key, name in read.items() if name and Path(name).is_dir()}
    for key, directory in found.items():
        if changed := changed_model(directory):
            log.warning("%s = %s: is not what its run wrote: %s", key, directory, changed)
    files = {key: seal.model_files(directory) for key, directory in found.items()}
    return {"start_sha256": start_digest(read.get("model.init")), seal.FILES: files}


def check(run: Path, facts: Facts) -> None:
    """Refuse to go on with other data or models than those that a run began with; nothing was
    trained where nothing is recorded.
    """
    path = run / FILE
    if not path.exists():
        return
    before = seal.read_json(path)
    with opening(path, RunError, "is damaged"):
        data, now = _digests(before["data"]), _digests(facts["data"])
        changed = [name for name in now if data[name] != now[name]]
        pairs = [_tokenizers(before, facts), *_models(before, facts)]
    if changed:
        raise RunError(f"{run}: the {' and '.join(changed)} examples have changed meanwhile")
    for name, old, new in pairs:
        if found := seal.differences(old, new):
            raise RunError(f"{run}: {name} is not what the run began with: {found}")


def _digests(data: Facts) -> dict[str, str]:
    """Of training and validation examples; upstream they stand beside their sizes."""
    splits = data.get("splits")
    return {name: split["sha256"] for name, split in splits.items()} if splits else dict(data)


def _models(before: Facts, now: Facts) -> list[tuple[str, Files, Files]]:
    if seal.FILES in before:
        there = now[seal.FILES]
        return [(name, old, there.get(name, {})) for name, old in before[seal.FILES].items()]
    old, new = before.get("start_sha256"), now["start_sha256"]  # of an older version
    return [("model.init", {"its weights": old}, {"its weights": str(new)})] if old else []


def _tokenizers(before: Facts, now: Facts) -> tuple[str, Files, Files]:
    """Of the prepared examples, where they list their files."""
    old, new = (_tokenizer_of(facts["data"]) for facts in (before, now))
    return "data", old, new if old else {}


def _tokenizer_of(data: Facts) -> dict[str, str]:
    files = data.get(seal.FILES, {})
    return {name: files[name] for name in files if name.startswith("tokenizer/")}
