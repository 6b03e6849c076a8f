"""Download: a released model from the Hub, from a web server or from a directory, whole or not at
all.

Every file is written to the output's temporary place and checked for size and digest. Only when all
are right does the directory get its name, by one rename. Of two processes with one output the
second waits, and then finds it complete. Nothing that comes is executed or unpickled, and a
configuration that asks for code of its own is refused.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opfa.errors import ModelError, RunError, opening
from opfa.hub import manifest
from opfa.hub.manifest import MANIFEST
from opfa.hub.origin import source_of
from opfa.hub.repository import Source
from opfa.hub.transfer import guarded
from opfa.storage.files import check_new, sync_all, work_directory
from opfa.storage.foreign import (
    INDEXES,
    MOST_CONFIG,
    asks_for_code,
    check_content,
    code_refused,
    weight_files,
)

WAITING = "another process downloads to here; waiting for it"
log = logging.getLogger(__name__)


def download(
    name: str, output: Path, *, revision: str | None = None, endpoint: str | None = None
) -> dict[str, Any]:
    """Bring a released model into a new directory, and verify it; returns its figures.

    The name is one of `opfa list`, of the Hub, a URL, or a local directory. An output that holds
    the same release already is left as it is.
    """
    if not output.is_dir():
        check_new(output)
    output = output.absolute()
    with guarded():
        source = source_of(name, revision, endpoint)
        with work_directory(output, WAITING) as work:
            if os.path.lexists(output):
                _check_same(output, source)
                log.info("%s: is complete already", output)
            else:
                _check_space(source, output)
                _fill(source, work, name)
                sync_all(work)
                os.replace(work, output)
    digest = None if source.manifest is None else hashlib.sha256(source.manifest).hexdigest()
    return {
        "name": name,
        "directory": str(output),
        "files": len(source.files),
        "bytes": _num_bytes(source),
        "manifest_sha256": digest,
    }


def _check_space(source: Source, output: Path) -> None:
    needed, free = _num_bytes(source), shutil.disk_usage(output.parent).free
    if needed > free:
        raise RunError(f"{output}: {needed:,} bytes are needed, {free:,} are free here")


def _num_bytes(source: Source) -> int:
    return sum(file.size for file in source.files.values())


def _fill(source: Source, work: Path, name: str) -> None:
    """Bring every file into an empty directory, the small ones first, and verify each."""
    configurations = [file for file in source.files if file.endswith("config.json")]
    for file in configurations:
        if source.files[file].size > MOST_CONFIG:
            raise ModelError(f"{name}: {file} has more than {MOST_CONFIG:,} bytes")
    small = [file for file in source.files if file.endswith(".json")]
    large = [file for file in source.files if file not in small]
    _bring_all(source, small, work, name)
    for file in configurations:
        _check_code(work / file, f"{name}: {file}")
    _check_whole(source, work, name)
    _bring_all(source, large, work, name)
    for file in large:
        check_content(work / file, f"{name}: {file}")
    if source.manifest is not None:
        (work / MANIFEST).write_bytes(source.manifest)


def _bring_all(source: Source, files: Iterable[str], work: Path, name: str) -> None:
    for file in files:
        if problem := _bring(source, file, work / file):
            raise ModelError(f"{name}: {file} {problem}; it is not what was released")
        log.info("%s: %s", name, file)


def _bring(source: Source, file: str, path: Path) -> str | None:
    """Bring a file, and look what is wrong with it. One that is wrong is brought once more: what a
    cache holds may be damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = None
    for is_again in (False, True):
        source.bring(file, path, is_again=is_again)
        problem = source.files[file].problem(path)
        if problem is None:
            return None
        log.info("%s %s", file, problem)
    return problem


def _check_code(path: Path, what: str) -> None:
    with opening(what, ModelError, "is not valid JSON"):
        values = json.loads(path.read_bytes())
    if asked := asks_for_code(values):
        raise code_refused(what, asked)


def _check_whole(source: Source, work: Path, name: str) -> None:
    """Refuse a model whose own index, or the numbers of its files, say that some are missing."""
    files = [file for file in source.files if Path(file).suffix in (".safetensors", ".bin")]
    if files or any(index in source.files for index in INDEXES):
        weight_files(source.files, name, lambda file: (work / file).read_bytes())


def _check_same(output: Path, source: Source) -> None:
    """Refuse an existing output, unless it is what would be downloaded."""
    problems = [file for file, expected in source.files.items() if expected.problem(output / file)]
    files = {*source.files, *([] if source.manifest is None else [MANIFEST])}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    is_same = source.manifest is None or (
        MANIFEST in found and manifest.read_bytes(output) == source.manifest
    )
    if problems or found != files or not is_same:
        raise RunError(
            f"{output}: exists already, and is not this release; give a new directory, or remove it"
        )
