"""What data and models a run began with (`environment.json`); a resume with others is refused."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opfa.errors import RunError, opening
from opfa.storage import seal
from opfa.storage.runs import model_in
from opfa.storage.seal import Files
from opfa.training.checkpoint import model_digest
from opfa.training.finished import changed_model

FILE = "environment.json"
Facts = Mapping[str, Any]  # what `environment.json` holds
log = logging.getLogger(__name__)


def models(read: Mapping[str, str | None]) -> dict[str, Any]:
    """Digests of the models by the recipe's keys. Warns of one that was changed after its run."""
    there = {key: Path(name) for key, name in read.items() if name and Path(name).is_dir()}
    found = {key: model_in(directory) for key, directory in there.items()}
    for key, directory in found.items():
        if changed := changed_model(directory):
            log.warning("%s = %s: is not what its run wrote: %s", key, directory, changed)
    files = {key: seal.model_files(directory) for key, directory in found.items()}
    init = found.get("model.init")
    start = model_digest(init) if init and any(init.glob("*.safetensors")) else None
    return {"start_sha256": start, seal.FILES: files}


def check(run: Path, facts: Facts) -> None:
    """Refuse to go on with other data or models than a run began with, if it recorded any."""
    path = run / FILE
    if not path.exists():
        return
    before = seal.read_json(path)
    with opening(path, RunError, "is damaged"):
        data, now = _digests(before["data"]), _digests(facts["data"])
        changed = [name for name in now if data[name] != now[name]]
        old, new = (_tokenizer(each["data"]) for each in (before, facts))
        pairs = [("data", old, new if old else {}), *_models(before, facts)]
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


def _tokenizer(data: Facts) -> Files:
    """The tokenizer's files, where prepared examples list them."""
    files = data.get(seal.FILES, {})
    return {name: files[name] for name in files if name.startswith("tokenizer/")}
