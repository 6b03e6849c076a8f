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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx2
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from opfa import manifest
from opfa.aside import disk_errors, held
from opfa.hub import HubModel
from opfa.index import released
from opfa.manifest import MANIFEST, MAX_MANIFEST_BYTES
from opfa.recipe import ModelError, RunError
from opfa.transfer import Advance, fetch, fetch_small, is_loopback, shown

CODE_KEYS = ("auto_map", "custom_pipelines")  # of a configuration: where its own code is
MAX_CONFIG_BYTES = 1 << 24
log = logging.getLogger(__name__)


class Expected(Protocol):
    """What a file must be."""

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    def problem(self, path: Path) -> str | None:
        """How a file on disk differs; None where it does not."""
        ...


class Source(Protocol):
    """Where a model comes from."""

    @property
    def manifest(self) -> bytes | None:
        """Its release manifest, as it stands there; None where it has none."""
        ...

    @property
    def files(self) -> Mapping[str, Expected]:
        """All its files."""
        ...

    def bring(self, file: str, path: Path, advance: Advance, *, is_again: bool) -> None:
        """Bring one file to a path."""
        ...


class Directory:
    """A released model in a local directory."""

    def __init__(self, directory: Path) -> None:
        """Check it as a whole."""
        self._directory = directory
        self.files = manifest.check(directory).files
        self.manifest = manifest.read_bytes(directory)

    def bring(self, file: str, path: Path, advance: Advance, *, is_again: bool) -> None:
        """Copy a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._directory / file, path)
        advance(self.files[file].size)


class Website:
    """A released model behind a URL."""

    def __init__(self, url: str) -> None:
        """Get its manifest."""
        self._url = _checked_url(url)
        self.manifest = fetch_small(f"{self._url}/{MANIFEST}", MAX_MANIFEST_BYTES)
        self.files = manifest.parse(self.manifest, where=f"{shown(self._url)}/{MANIFEST}").files

    def bring(self, file: str, path: Path, advance: Advance, *, is_again: bool) -> None:
        """Get a file, or what is missing of it."""
        fetch(f"{self._url}/{file}", path, self.files[file].size, advance)


def download(
    name: str, output: Path, *, revision: str | None = None, endpoint: str | None = None
) -> dict[str, Any]:
    """Bring a released model into a new directory, and verify it; what came, in figures.

    The name is one of `opfa list`, of the Hub, a URL, or a local directory. An output that holds
    the same release already is left as it is.
    """
    output = output.absolute()
    with disk_errors(output):
        source = _source(name, revision, endpoint)
        with held(output) as aside:
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


def _source(name: str, revision: str | None, endpoint: str | None) -> Source:
    """Find out what a name means."""
    is_directory = Path(name).is_dir()
    known = None if is_directory else next((m for m in released() if m.name == name), None)
    place = name if known is None else known.source
    is_url = "://" in place
    if (is_directory or is_url) and (revision or endpoint):
        raise RunError(f"{shown(name)}: --revision and --endpoint are for names of the Hub")
    if endpoint is not None and not endpoint.startswith(("https://", "http://")):
        raise RunError(f"--endpoint {endpoint}: not the URL of a Hub; it begins with https://")
    if is_directory:
        return Directory(Path(name))
    if is_url:
        source: Source = Website(place)
    elif place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise ModelError(f"{name}: no such directory")
    else:
        source = HubModel(place, revision, endpoint and endpoint.rstrip("/"))
    wanted = known and known.manifest_sha256
    if wanted and hashlib.sha256(source.manifest or b"").hexdigest() != wanted:
        raise ModelError(
            f"{name}: the {MANIFEST} of {place} is not the one that opfa knows "
            f"({wanted[:12]}...); a newer opfa may know it, or someone has changed it"
        )
    return source


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ModelError(f"{shown(url)}: not a URL: {error}") from error
    is_near = parsed.scheme == "http" and is_loopback(parsed.host)
    if not parsed.host or not (parsed.scheme == "https" or is_near):
        raise ModelError(f"{shown(url)}: only https:// is taken")
    if parsed.query or parsed.fragment:
        raise ModelError(f"{shown(url)}: give the address of a directory, without '?' and '#'")
    return url.rstrip("/")


def _fill(source: Source, directory: Path, name: str) -> None:
    """Bring every file into a directory that may have some already, and verify each."""
    directory.mkdir(exist_ok=True)
    for path in sorted(directory.rglob("*"), reverse=True):
        is_kept = path.is_dir() or path.relative_to(directory).as_posix() in source.files
        if path.is_symlink() or not is_kept:
            path.unlink()
    needed = sum(file.size for file in source.files.values())
    here = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory).free
    if needed - here > free:
        raise RunError(f"{directory}: {needed - here:,} bytes are needed, {free:,} are free here")
    for file in _configurations(source):
        if source.files[file].size > MAX_CONFIG_BYTES:
            raise ModelError(f"{shown(name)}: {file} has more than {MAX_CONFIG_BYTES:,} bytes")
    with _progress(name, needed) as advance:
        for number, file in enumerate(source.files, 1):
            if problem := _bring(source, file, directory / file, advance):
                raise ModelError(f"{shown(name)}: {file} {problem}; it is not what was released")
            log.info("%s: %d of %d files", shown(name), number, len(source.files))
    for file in _configurations(source):
        _check_plain(directory / file, f"{shown(name)}: {file}")
    if source.manifest is not None:
        (directory / MANIFEST).write_bytes(source.manifest)


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
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what} is not valid JSON: {error}") from error
    asked = [key for key in CODE_KEYS if isinstance(values, dict) and key in values]
    if asked:
        raise ModelError(
            f"{what} asks for code of its own ({', '.join(asked)}), and remote code is never run; "
            "this model is not taken"
        )


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
        task = progress.add_task(shown(name), total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
