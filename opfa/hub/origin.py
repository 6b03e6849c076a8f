"""Where a model comes from: a local directory, a web server, or the Hub.

A source knows what files the model must have, before any of them is taken, and brings one at a
time. Nothing is believed of what it brings: whoever asked holds each file to what was said first.
A name is looked for as a local directory, then in the index, then on the Hub, as transformers does.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import httpx2

from opfa.errors import ModelError, RunError, redacted
from opfa.hub import manifest
from opfa.hub.index import released
from opfa.hub.manifest import MANIFEST, MAX_MANIFEST_BYTES
from opfa.hub.repository import HubModel
from opfa.hub.transfer import Advance, fetch, fetch_small, is_loopback


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
        self.files = manifest.parse(self.manifest, where=f"{redacted(self._url)}/{MANIFEST}").files

    def bring(self, file: str, path: Path, advance: Advance, *, is_again: bool) -> None:
        """Get a file, or what is missing of it."""
        fetch(f"{self._url}/{file}", path, self.files[file].size, advance)


def source_of(name: str, revision: str | None, endpoint: str | None) -> Source:
    """Find out what a name means, and ask there what the model consists of."""
    is_directory = Path(name).is_dir()
    known = None if is_directory else next((m for m in released() if m.name == name), None)
    place = name if known is None else known.source
    is_url = "://" in place
    if (is_directory or is_url) and (revision or endpoint):
        raise RunError(f"{redacted(name)}: --revision and --endpoint are for names of the Hub")
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
        raise ModelError(f"{redacted(url)}: not a URL: {error}") from error
    is_near = parsed.scheme == "http" and is_loopback(parsed.host)
    if not parsed.host or not (parsed.scheme == "https" or is_near):
        raise ModelError(f"{redacted(url)}: only https:// is taken")
    if parsed.query or parsed.fragment:
        raise ModelError(f"{redacted(url)}: give the address of a directory, without '?' and '#'")
    return url.rstrip("/")
