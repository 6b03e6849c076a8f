"""What files must be: SHA-256 of what a run or `opfa prepare` wrote, and readers that check it.

`done.json` lists the files that a finished run is judged by, `corpus.json` those of prepared
examples. "sealed" is the SHA-256 of the rest of a JSON file. Older files have neither.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from opfa.errors import OpfaError, RunError, opening, redacted
from opfa.recipe import Section
from opfa.storage.files import write_text

Files = Mapping[str, str]  # SHA-256 by name
SEAL = "sealed"
FILES = "files_sha256"
SHOWN = 3  # problems in one message
# Directories that transformers and sentence-transformers look into.
FOLDERS = ("additional_chat_templates", "1_Pooling")
# What some class of transformers reads, whether it is usual for encoders or not.
DECIDES = re.compile(
    r"\.(json|jinja|safetensors|model|spm|vocab|codes|bpe|tiktoken)$"
    r"|^(pytorch|adapter)_model.*\.bin$"
    r"|(vocab|merges|dict|bpe|token)[^/]*\.txt$"
)


class File(Section):
    """What a file must be: its size and SHA-256."""

    size: int = Field(ge=0, le=1 << 50)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    def problem(self, path: Path) -> str | None:
        """How a file on disk differs from what it must be; None where it does not."""
        problem = problem_of_size(path, self.size)
        if problem is None and digest(path) != self.sha256:
            return f"has another SHA-256 than {self.sha256[:12]}..."
        return problem


def problem_of_size(path: Path, size: int) -> str | None:
    """Why a file on disk can't be one of this size; None where it can."""
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    return None if found == size else f"has {found:,} bytes, not {size:,}"


def some(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are: a hostile file may have thousands."""
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_of(directory: Path) -> list[str]:
    """Every file of a directory, but hidden ones, which tools leave."""
    names = [p.relative_to(directory) for p in sorted(directory.rglob("*")) if not p.is_dir()]
    return [n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts)]


def files_of(directory: Path) -> dict[str, str]:
    """Those files with their SHA-256."""
    return {name: digest(directory / name) for name in names_of(directory)}


def model_files(directory: Path, also: Collection[str] = ()) -> dict[str, str]:
    """The files that decide what a model in this directory answers, and those of `also`."""
    inner = (path for folder in FOLDERS for path in directory.glob(f"{folder}/*"))
    paths = sorted([*directory.glob("*"), *inner])
    names = {path.relative_to(directory).as_posix(): path for path in paths if path.is_file()}
    return {
        name: digest(path)
        for name, path in names.items()
        if name in also or (DECIDES.search(name) and not name.startswith("."))
    }


def one_digest(files: Files) -> str:
    """SHA-256 over the names and digests of files."""
    lines = (f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def differences(before: Files, now: Files) -> str:
    """How files differ from what they were, in words; empty where they don't."""
    found = [f"{name} is missing" for name in before if name not in now]
    found += [f"{n} has changed" for n, was in before.items() if now.get(n, was) != was]
    found += [f"{name} is new" for name in now if name not in before]
    return some(found)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, and a seal that notices when one of them is changed."""
    rest = {key: value for key, value in values.items() if key != SEAL}
    return {**rest, SEAL: hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


def write_sealed(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file with its seal, whole or not at all; returns what it says."""
    result = sealed(redacted(values))
    write_text(path, json.dumps(result, indent=2) + "\n")
    return result


def read_json(path: Path, kind: type[OpfaError] = RunError) -> dict[str, Any]:
    """A JSON object; raises an error of this kind where it can't be read or its seal is broken."""
    with opening(path, kind):
        values = json.loads(path.read_bytes().decode("utf-8"))
    if not isinstance(values, dict):
        raise kind(f"{path}: can't be read: not a JSON object")
    # a list of files is never written without a seal
    if (SEAL in values or FILES in values) and sealed(values) != values:
        raise kind(f"{path}: is damaged, or was edited: its seal doesn't fit what it says")
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe that a run wrote; raises `RunError` where it can't be read."""
    with opening(path, RunError):
        return tomllib.loads(path.read_bytes().decode("utf-8"))
