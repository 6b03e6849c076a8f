"""Download: a released model from the Hub, from a web server or from a directory, whole or not at
all.

Every file is brought into `.NAME.incomplete` beside the output, held to size and digest, and only
when all are right does the directory get its name, by one rename. What an interruption leaves is
used by the next attempt: whole files are not asked for again, half ones go on where they ended. Of
two processes with one output the second waits, and then finds it complete. Nothing that comes is
executed or unpickled, and a configuration that asks for code of its own is refused.

`snapshot_download` to a local directory was rejected: it knows no release manifest, names files
before they were looked at, and takes code and pickles along.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from opfa.errors import ModelError, RunError, opening, redacted
from opfa.hub import manifest
from opfa.hub.manifest import MANIFEST
from opfa.hub.origin import Source, source_of
from opfa.hub.transfer import Advance
from opfa.storage.files import check_new, writing
from opfa.storage.foreign import (
    INDEXES,
    MOST_CONFIG,
    asks_for_code,
    check_content,
    code_refused,
    weight_files,
)
from opfa.storage.temporary import held, is_plain, remove

KEPT = "what has come is kept, and the same command goes on with it"
WAITING = "another process downloads to here; waiting for it"
log = logging.getLogger(__name__)


def download(
    name: str, output: Path, *, revision: str | None = None, endpoint: str | None = None
) -> dict[str, Any]:
    """Bring a released model into a new directory, and verify it; what came, in figures.

    The name is one of `opfa list`, of the Hub, a URL, or a local directory. An output that holds
    the same release already is left as it is.
    """
    if not output.is_dir():
        check_new(output)
    output = output.absolute()
    with writing(output, KEPT):
        source = source_of(name, revision, endpoint)
        with held(output, WAITING) as aside:
            if os.path.lexists(output):
                _check_same(output, source)
                log.info("%s: is complete already", output)
            else:
                _fill(source, aside, name)
                os.replace(aside, output)
    digest = None if source.manifest is None else hashlib.sha256(source.manifest).hexdigest()
    return {
        "name": name,
        "directory": str(output),
        "files": len(source.files),
        "bytes": sum(file.size for file in source.files.values()),
        "manifest_sha256": digest,
    }


def _fill(source: Source, directory: Path, name: str) -> None:
    """Bring every file into a directory that may have some already, and verify each."""
    if directory.is_symlink() or not directory.is_dir():
        remove(directory)
    directory.mkdir(exist_ok=True)
    for path in sorted(directory.rglob("*"), reverse=True):
        is_wanted = path.relative_to(directory).as_posix() in source.files
        if not is_plain(path) or is_wanted == path.is_dir():
            remove(path)
    needed = sum(file.size for file in source.files.values())
    here = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory).free
    if needed - here > free:
        raise RunError(f"{directory}: {needed - here:,} bytes are needed, {free:,} are free here")
    for file in _configurations(source):
        if source.files[file].size > MOST_CONFIG:
            raise ModelError(f"{redacted(name)}: {file} has more than {MOST_CONFIG:,} bytes")
    small = [file for file in source.files if file.endswith(".json")]
    large = [file for file in source.files if file not in small]
    with _progress(name, needed) as advance:
        _bring_all(source, small, directory, name, advance)
        for file in _configurations(source):
            _check_plain(directory / file, f"{redacted(name)}: {file}")
        _check_whole(source, directory, name)
        _bring_all(source, large, directory, name, advance)
    for file in large:
        check_content(directory / file, f"{redacted(name)}: {file}")
    if source.manifest is not None:
        (directory / MANIFEST).write_bytes(source.manifest)


def _bring_all(
    source: Source, files: list[str], directory: Path, name: str, advance: Advance
) -> None:
    for number, file in enumerate(files, 1):
        if problem := _bring(source, file, directory / file, advance):
            raise ModelError(f"{redacted(name)}: {file} {problem}; it is not what was released")
        log.info("%s: %s (%d of %d)", redacted(name), file, number, len(files))


def _bring(source: Source, file: str, path: Path, advance: Advance) -> str | None:
    """Bring a file unless it is there, and look what is wrong with it.

    One that is wrong is brought once more, from its beginning: what an earlier attempt left, or a
    cache holds, may be of another release.
    """
    expected = source.files[file]
    if expected.problem(path) is None:
        advance(expected.size)
        return None
    problem = None
    for is_again in (False, True):
        source.bring(file, path, advance, is_again=is_again)
        problem = expected.problem(path)
        if problem is None:
            return None
        log.info("%s %s", file, problem)
        advance(-expected.size)
        path.unlink()
    return problem


def _configurations(source: Source) -> list[str]:
    return [file for file in source.files if file.endswith("config.json")]


def _check_plain(path: Path, what: str) -> None:
    with opening(what, ModelError, "is not valid JSON"):
        values = json.loads(path.read_bytes())
    if asked := asks_for_code(values):
        raise code_refused(what, asked)


def _check_whole(source: Source, directory: Path, name: str) -> None:
    """Refuse a model whose own index, or the numbers of its files, say that some are missing."""
    files = [file for file in source.files if Path(file).suffix in (".safetensors", ".bin")]
    if files or any(index in source.files for index in INDEXES):
        weight_files(source.files, redacted(name), lambda file: (directory / file).read_bytes())


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


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Advance]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        task = progress.add_task(redacted(name), total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
