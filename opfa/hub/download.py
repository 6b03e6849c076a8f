"""Download: a released model from the Hub, from a web server or from a directory.

Every file comes to the output's temporary place and is checked for size and digest. Only when all
are right does the directory get its name. Nothing that comes is executed or unpickled.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from opfa.errors import ModelError, RunError, opening
from opfa.hub import manifest
from opfa.hub.manifest import MANIFEST
from opfa.hub.origin import source_of
from opfa.hub.repository import Source
from opfa.hub.results import DownloadResult
from opfa.hub.transfer import guarded
from opfa.storage import foreign
from opfa.storage.files import check_new, sync_all, work_directory

WAITING = "another process downloads to here; waiting for it"
log = logging.getLogger(__name__)


def download(
    name: str, output: Path, *, revision: str | None = None, endpoint: str | None = None
) -> DownloadResult:
    """Bring a released model (of `opfa list`, the Hub, a URL or a directory) into a new directory,
    and verify it; returns its figures. An output that is the same release already stays.
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
                needed, free = _num_bytes(source), shutil.disk_usage(output.parent).free
                if needed > free:
                    raise RunError(f"{output}: {needed:,} bytes are needed, {free:,} are free here")
                _fill(source, work, name)
                sync_all(work)
                os.replace(work, output)
    digest = None if source.manifest is None else hashlib.sha256(source.manifest).hexdigest()
    return DownloadResult(
        name=name,
        directory=output,
        files=len(source.files),
        bytes=_num_bytes(source),
        manifest_sha256=digest,
    )


def _num_bytes(source: Source) -> int:
    return sum(file.size for file in source.files.values())


def _fill(source: Source, work: Path, name: str) -> None:
    """Bring every file into an empty directory, the small ones first, and verify each."""
    configurations = [file for file in source.files if file.endswith("config.json")]
    for file in configurations:
        if source.files[file].size > foreign.MOST_CONFIG:
            raise ModelError(f"{name}: {file} has more than {foreign.MOST_CONFIG:,} bytes")
    small = [file for file in source.files if file.endswith(".json")]
    large = [file for file in source.files if file not in small]
    _bring_all(source, small, work, name)
    for file in configurations:
        _check_code(work / file, f"{name}: {file}")
    _check_whole(source, work, name)
    _bring_all(source, large, work, name)
    for file in large:
        foreign.check_content(work / file, f"{name}: {file}")
    if source.manifest is not None:
        (work / MANIFEST).write_bytes(source.manifest)


def _bring_all(source: Source, files: Iterable[str], work: Path, name: str) -> None:
    """Bring files and verify them. A wrong one is brought once more: a cache may be damaged."""
    for file in files:
        path, expected = work / file, source.files[file]
        path.parent.mkdir(parents=True, exist_ok=True)
        source.bring(file, path, is_again=False)
        if problem := expected.problem(path):
            log.info("%s %s", file, problem)
            source.bring(file, path, is_again=True)
            if problem := expected.problem(path):
                raise ModelError(f"{name}: {file} {problem}; it is not what was released")
        log.info("%s: %s", name, file)


def _check_code(path: Path, what: str) -> None:
    with opening(what, ModelError, "is not valid JSON"):
        values = json.loads(path.read_bytes())
    if asked := foreign.asks_for_code(values):
        raise foreign.code_refused(what, asked)


def _check_whole(source: Source, work: Path, name: str) -> None:
    """Refuse a model whose own index, or the numbers of its files, say that some are missing."""
    files = [file for file in source.files if Path(file).suffix in (".safetensors", ".bin")]
    if files or any(index in source.files for index in foreign.INDEXES):
        foreign.weight_files(source.files, name, lambda file: (work / file).read_bytes())


def _check_same(output: Path, source: Source) -> None:
    """Refuse an existing output, unless it is what would be downloaded."""
    problems = [file for file, expected in source.files.items() if expected.problem(output / file)]
    files = {*source.files, *([] if source.manifest is None else [MANIFEST])}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    is_same = source.manifest is None or (
        MANIFEST in found and manifest.read_bytes(output) == source.manifest
    )
    if problems or found != files or not is_same:
        raise RunError(f"{output}: exists already, and is not this release; give a new directory")
