"""Models in huggingface_hub's local cache: found there, or downloaded into it."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from opfa.errors import ModelError
from opfa.hub.reach import problem_of_hub, tell_of_cache
from opfa.hub.transfer import reaching
from opfa.storage.foreign import INDEXES, weight_map

NO_DIRECTORY = "no such directory"
NOWHERE = f"{NO_DIRECTORY}, and not available from the Hub"


def refuse_path(name: str, problem: str) -> None:
    """Raise `ModelError` for a name that can only be a path, and so is no model of the Hub."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: {problem}")


def downloaded(name: str, patterns: Sequence[str]) -> Path:
    """The directory in the cache with the files of a model that match these patterns."""
    refuse_path(name, NO_DIRECTORY)
    problem = problem_of_hub()
    with reaching(name, NOWHERE, ModelError):
        try:
            found = snapshot_download(
                name, allow_patterns=list(patterns), local_files_only=bool(problem)
            )
        except LocalEntryNotFoundError as error:
            if problem:
                raise ModelError(f"{name}: {NOWHERE}: {problem}") from error
            raise
    if problem:
        tell_of_cache(problem)
    return Path(found)


def cached_directory(name: str) -> Path | None:
    """The directory in the cache that has the whole model, if there is one."""
    found = _weights(name)
    return found.parent if found and not _missing(found) else None


def missing_in_cache(name: str) -> list[str]:
    """The files that the index of a model in the cache names and that are not there."""
    found = _weights(name)
    return _missing(found) if found else []


def _weights(name: str) -> Path | None:
    """The weights, or their index, in the cache."""
    with reaching(name, NOWHERE, ModelError):
        for file in ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1]):
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return Path(found)
    return None


def _missing(path: Path) -> list[str]:
    if path.suffix != ".json":
        return []
    shards = set(weight_map(path.read_bytes(), path).values())
    return sorted(shard for shard in shards if not (path.parent / shard).is_file())
