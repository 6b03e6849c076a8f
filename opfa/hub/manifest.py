"""The release manifest, `release.json`: which files a released model has, their sizes and SHA-256.

It names plain data only: no pickle, no Python, nothing hidden, no name that could lead out of the
directory, and no two that some file system takes for the same. Names that begin with a dot are what
tools leave in a directory; `check` does not look at them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from opfa.errors import ModelError
from opfa.recipe import Section
from opfa.storage.files import write_text
from opfa.storage.seal import File, digest, some

MANIFEST = "release.json"
FORMAT = "opfa-release/1"
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILES = 1000
MAX_NAME = 255
SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".toml", ".png", ".model", ".jinja")
ALSO = ("LICENSE",)
PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class Manifest(Section):
    """What `release.json` says."""

    format: Literal["opfa-release/1"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")
    files: dict[str, File] = Field(min_length=1, max_length=MAX_FILES)
    facts: dict[str, Any] = {}  # Any: what JSON can hold

    @field_validator("files")
    @classmethod
    def _are_plain(cls, files: dict[str, File]) -> dict[str, File]:
        problems = [problem for name in files if (problem := problem_of_name(name))]
        taken: dict[str, str] = {}
        for name in files:
            other = taken.setdefault(name.lower(), name)
            if other != name:
                problems.append(f"{name!r} and {other!r} are the same name on some file systems")
        for name in files:
            parents = (str(parent) for parent in list(Path(name.lower()).parents)[:-1])
            if inside := next((taken[parent] for parent in parents if parent in taken), None):
                problems.append(f"{name!r} is inside {inside!r}, which is a file")
        if problems:
            raise ValueError(some(problems))
        return files


def problem_of_name(name: str) -> str | None:
    """Why a file of this name is refused; None where it is not."""
    parts = name.split("/")
    shown = repr(name[:80])
    if len(name) > MAX_NAME:
        return f"{shown}... is longer than {MAX_NAME} characters"
    if not all(PART.fullmatch(part) for part in parts):
        return f"{shown} is not a plain relative name of letters, digits, '.', '_' and '-'"
    if not (name.endswith(SUFFIXES) or parts[-1] in ALSO):
        return f"{shown} is not an accepted kind of file ({' '.join((*SUFFIXES, *ALSO))})"
    if name.lower() == MANIFEST:
        return f"{shown} can't list itself"
    return None


def write(
    directory: Path, name: str, facts: dict[str, Any], known: Mapping[str, str] | None = None
) -> Manifest:
    """Write a directory's `release.json`. Files whose SHA-256 is `known` aren't read."""
    files = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if relative == MANIFEST or path.is_dir():
            continue
        if path.is_symlink() or not path.is_file():
            raise ModelError(f"{path}: not a plain file, so it can't be released")
        if problem := problem_of_name(relative):
            raise ModelError(f"{directory}: can't be released: {problem}")
        sha256 = (known or {}).get(relative) or digest(path)
        files[relative] = File(size=path.stat().st_size, sha256=sha256)
    try:
        manifest = Manifest(format=FORMAT, name=name, files=files, facts=facts)
    except ValidationError as error:
        raise ModelError(f"{directory}: can't be released: {_explain(error)}") from None
    text = manifest.model_dump_json(indent=2) + "\n"
    parse(text, where=str(directory / MANIFEST))
    write_text(directory / MANIFEST, text)
    return manifest


def parse(text: str | bytes, where: str = MANIFEST) -> Manifest:
    """Read a manifest from anywhere; raises `ModelError` unless all of it is as it must be."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise ModelError(f"{where}: more than {MAX_MANIFEST_BYTES:,} bytes; no manifest is so long")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ModelError(f"{where}: not a release manifest: {_explain(error)}") from None


def read(directory: Path) -> Manifest:
    """The manifest of a released directory."""
    return parse(read_bytes(directory), where=str(directory / MANIFEST))


def read_bytes(directory: Path) -> bytes:
    """The manifest of a released directory, byte for byte, as its digest needs it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ModelError(f"{directory}: has no {MANIFEST}, so it is not a released model")
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def check(directory: Path) -> Manifest:
    """A released directory's manifest; raises `ModelError` that names the files which differ, are
    missing, or are not in it.
    """
    manifest = read(directory)
    found = {name: file.problem(directory / name) for name, file in manifest.files.items()}
    problems = [f"{name} {problem}" for name, problem in found.items() if problem]
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        known = relative.as_posix() in manifest.files or str(relative) == MANIFEST
        if not (path.is_dir() or is_hidden or known):
            problems.append(f"{relative} is not in {MANIFEST}")
    if problems:
        raise ModelError(f"{directory}: not what its {MANIFEST} says: {some(problems)}")
    return manifest


def _explain(error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part)[:80] for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] not in ("value_error", "json_invalid"):
            message += f" (got {detail['input']!r:.60})"
        problems.append(f"{key}: {message}" if key else message)
    return some(problems)
