"""Where a model comes from: a local directory, or by the index a web server or the Hub."""

import hashlib
import io
import re
import shutil
from pathlib import Path
from typing import IO

import httpx2

from opfa.errors import ModelError, RunError
from opfa.hub import manifest
from opfa.hub.cache import NO_DIRECTORY, refuse_path
from opfa.hub.index import known
from opfa.hub.manifest import MANIFEST, MAX_MANIFEST_BYTES
from opfa.hub.repository import HubModel, Source
from opfa.hub.transfer import fetch, reaching

LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|::1")


class Directory(Source):
    """A released model in a local directory."""

    def __init__(self, directory: Path) -> None:
        """Check it as a whole."""
        self._directory = directory
        self.files = manifest.check(directory).files
        self.manifest = manifest.read_bytes(directory)

    def bring(self, file: str, path: Path, *, is_again: bool) -> None:
        """Copy a file."""
        shutil.copyfile(self._directory / file, path)


class Website(Source):
    """A released model behind a URL."""

    def __init__(self, url: str) -> None:
        """Get its manifest."""
        self._url = _checked_url(url)
        content = io.BytesIO()
        self._fetch(MANIFEST, content, MAX_MANIFEST_BYTES, is_exact=False)
        self.manifest = content.getvalue()
        self.files = manifest.parse(self.manifest, where=f"{self._url}/{MANIFEST}").files

    def bring(self, file: str, path: Path, *, is_again: bool) -> None:
        """Download a file."""
        with path.open("wb") as target:
            self._fetch(file, target, self.files[file].size)

    def _fetch(self, file: str, target: IO[bytes], limit: int, *, is_exact: bool = True) -> None:
        where = f"{self._url}/{file}"
        with reaching(where, "not available from its server"):
            fetch(where, target, limit, is_exact=is_exact)


def source_of(name: str, revision: str | None, endpoint: str | None) -> Source:
    """Find out what a name means, and ask there what the model consists of."""
    model = None if Path(name).is_dir() else known(name)
    place = name if model is None else str(model.directory or model.source or "")
    if not place:
        what = f"is in a clone of opfa, as model_cards/{name}, and has no address yet"
        raise ModelError(f"{name}: {what}")
    is_directory = Path(place).is_dir()
    is_url = "://" in place
    if (is_directory or is_url) and (revision or endpoint):
        raise RunError(f"{name}: --revision and --endpoint are for names of the Hub")
    if endpoint is not None and not endpoint.startswith(("https://", "http://")):
        raise RunError(f"--endpoint {endpoint}: not the URL of a Hub; it begins with https://")
    if is_directory:
        source: Source = Directory(Path(place))
    else:
        if not is_url:
            refuse_path(place, NO_DIRECTORY)
        source = Website(place) if is_url else HubModel(place, revision, endpoint)
    wanted = model and model.manifest_sha256
    if wanted and hashlib.sha256(source.manifest or b"").hexdigest() != wanted:
        what = f"the {MANIFEST} of {place} is not the one that opfa knows ({wanted[:12]}...)"
        raise ModelError(f"{name}: {what}; a newer opfa may know it, or someone has changed it")
    return source


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ModelError(f"{url}: not a URL: {error}") from error
    is_near = parsed.scheme == "http" and LOOPBACK.fullmatch(parsed.host)
    if not parsed.host or not (parsed.scheme == "https" or is_near):
        raise ModelError(f"{url}: only https:// is accepted")
    if parsed.query or parsed.fragment:
        raise ModelError(f"{url}: give the address of a directory, without '?' and '#'")
    return url.rstrip("/")
