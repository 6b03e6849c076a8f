"""The way up: names that the Hub accepts, and the upload of a release."""

import contextlib
from collections.abc import Collection
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from opfa.errors import RunError
from opfa.hub import manifest
from opfa.hub.reach import problem_of_hub
from opfa.hub.results import PushResult


def is_name(name: str) -> bool:
    """Whether the Hub accepts a name for a repository."""
    with contextlib.suppress(RunError):
        check_name(name, "")
        return True
    return False


def check_name(name: str, what: str) -> None:
    """Raise `RunError` about `what` unless the Hub accepts this name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RunError(f"{what} {name!r}: not a name that the Hub accepts: {error}") from error


def push(
    directory: Path, name: str, *, endpoint: str | None = None, private: bool = False
) -> PushResult:
    """Upload a verified release as one commit that replaces all that was there; its address."""
    check_name(name, "the repository")
    files: Collection[str] = manifest.check(directory).files
    again = f"the release is whole; to try again: opfa push {directory} {name}"
    if problem := problem_of_hub(endpoint):
        raise RunError(f"{name}: not uploaded: {problem}; {again}")
    try:
        api = HfApi(endpoint=endpoint)
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=directory,
            commit_message="Release, by opfa",
            allow_patterns=[*files, manifest.MANIFEST],  # names without wildcards
            delete_patterns="*",  # what this commit doesn't bring; never .gitattributes
        )
    except (HTTPError, ValueError, OSError) as error:  # a refused card is a ValueError
        raise RunError(f"{name}: not uploaded: {str(error).strip()}; {again}") from error
    return PushResult(name=name, directory=directory, address=str(commit.commit_url))
