"""A model on the Hugging Face Hub or a mirror of it: what its files must be, and how to get them.

All through huggingface_hub and its cache, so that tokens, `HF_ENDPOINT`, proxies and
`HF_HUB_OFFLINE` work as users know them, and `from_pretrained` finds the files afterwards. Each
file is asked for at one commit and held to the release manifest, or to the Hub's own listing where
a repository has none. What a cache holds is not trusted either: a file that differs is got once
more, and then refused.

An own download of the Hub's files would resume at the byte after a kill as well; huggingface_hub
does so within a process only, and after a kill begins the file that it was at again. It was
rejected, because it would leave the cache empty, and with it everything that works offline.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Self, TypeVar

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RevisionResolutionError,
)

from opfa.errors import ModelError, RunError
from opfa.hub.listing import Blob, cached, checked, listed
from opfa.hub.manifest import ALSO, MANIFEST, MAX_MANIFEST_BYTES, SUFFIXES, File, Manifest, parse
from opfa.hub.transfer import PASSING, Advance, Patience

COMMIT = re.compile(r"[0-9a-f]{40}")
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
Result = TypeVar("Result")


class HubModel:
    """A model's files at one commit: what they must be, and how to get them."""

    def __init__(self, name: str, revision: str | None, endpoint: str | None) -> None:
        """Ask for the manifest, or else for the Hub's listing."""
        self.name = name
        self.manifest: bytes | None = None
        self.files: Mapping[str, File | Blob]
        self._endpoint = endpoint
        self._revision = revision or constants.DEFAULT_REVISION
        with _one_message(name):
            try:
                self.files = self._manifest().files
            except RemoteEntryNotFoundError:
                self.files = self._listing()
            except LocalEntryNotFoundError:
                found = try_to_load_from_cache(name, MANIFEST, revision=self._revision)
                if found is None or isinstance(found, str):
                    raise
                self.files = self._cached_listing()  # it is known that there is no manifest

    def bring(self, file: str, path: Path, advance: Advance, *, is_again: bool) -> None:
        """Copy a file out of the cache, after it was downloaded into it if need be."""
        with _one_message(f"{self.name}, {file}"):
            try:
                path_in_cache = self._cached(
                    file, self.files[file].size, advance, is_forced=is_again
                )
            except RemoteEntryNotFoundError:
                raise ModelError(
                    f"{self.name}: its {MANIFEST} lists {file}, which the repository doesn't have"
                ) from None
            path.parent.mkdir(parents=True, exist_ok=True)
            copyfile(path_in_cache, path)

    def _manifest(self) -> Manifest:
        path = self._cached(MANIFEST, MAX_MANIFEST_BYTES)
        try:
            manifest = self._parsed(path)
        except ModelError:
            if constants.is_offline_mode():
                raise
            path = self._cached(MANIFEST, MAX_MANIFEST_BYTES, is_forced=True)
            manifest = self._parsed(path)
        self._revision = path.parent.name  # the cache's layout: snapshots/COMMIT/release.json
        return manifest

    def _parsed(self, path: Path) -> Manifest:
        with path.open("rb") as file:
            self.manifest = file.read(MAX_MANIFEST_BYTES + 1)
        return parse(self.manifest, where=f"{self.name}, {MANIFEST}")

    def _listing(self) -> dict[str, Blob]:
        api = HfApi(endpoint=self._endpoint)
        ask = functools.partial(
            api.model_info,
            self.name,
            revision=self._revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        try:
            info = _patiently(f"{self.name}, its list of files", ask)
            blobs = listed(self.name, info.siblings or ())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.name}: no listing of a Hub: {error!r:.200}") from error
        self._revision = checked(COMMIT, info.sha, "commit", self.name)
        return blobs

    def _cached_listing(self) -> dict[str, Blob]:
        patterns = [*(f"*{suffix}" for suffix in SUFFIXES), *ALSO]
        folder = snapshot_download(
            self.name, revision=self._revision, allow_patterns=patterns, local_files_only=True
        )
        self._revision = Path(folder).name
        return cached(self.name, Path(folder))

    def _cached(
        self, file: str, limit: int, advance: Advance = lambda _: None, *, is_forced: bool = False
    ) -> Path:
        """A file's path in the cache; downloaded where it isn't there, or in any case."""
        if is_forced and constants.is_offline_mode():
            raise RunError("is damaged in the cache, and HF_HUB_OFFLINE forbids to get it anew")
        meter = Meter(f"{self.name}, {file}", limit, advance)

        def ask() -> str:
            meter.restart()
            self._check_offer(file, limit, is_forced)
            return hf_hub_download(
                self.name,
                file,
                revision=self._revision,
                endpoint=self._endpoint,
                force_download=is_forced,
                tqdm_class=meter,  # type: ignore[arg-type] - anything that makes a bar will do
            )

        path = Path(_patiently(f"{self.name}, {file}", ask))
        advance(limit - meter.num_bytes)
        return path

    def _check_offer(self, file: str, limit: int, is_forced: bool) -> None:
        """Look at what the Hub would send, before any of it is taken."""
        if COMMIT.fullmatch(self._revision) and not is_forced:
            found = try_to_load_from_cache(self.name, file, revision=self._revision)
            if isinstance(found, str):
                return
        url = hf_hub_url(self.name, file, revision=self._revision, endpoint=self._endpoint)
        try:
            offer = get_hf_file_metadata(url, endpoint=self._endpoint)
        except (httpx2.HTTPError, OSError):
            return  # hf_hub_download meets the same, and knows what the cache can do about it
        if offer.size is not None and offer.size > limit:
            raise ModelError(
                f"{self.name}, {file}: the Hub would send {offer.size:,} bytes, but at most "
                f"{limit:,} are expected"
            )
        if offer.commit_hash is not None:  # both become names in the cache
            checked(COMMIT, offer.commit_hash, "commit", self.name)
        if offer.etag is not None:
            checked(PLAIN, offer.etag, "ETag", self.name)


class Meter:
    """What huggingface_hub takes for a progress bar: passes the bytes on, and stops an answer that
    is longer than it may be.
    """

    def __init__(self, what: str, limit: int, advance: Advance) -> None:
        """Count from nothing."""
        self.num_bytes = 0
        self._what = what
        self._limit = limit
        self._advance = advance

    def __call__(self, **_: object) -> Self:
        """Be the bar that is asked for."""
        return self

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def restart(self) -> None:
        """Forget what came."""
        self._advance(-self.num_bytes)
        self.num_bytes = 0

    def update(self, num_bytes: float = 1) -> None:
        """Count bytes; raises `ModelError` when there are too many."""
        self.num_bytes += int(num_bytes)
        self._advance(int(num_bytes))
        if self.num_bytes > self._limit:
            raise ModelError(f"{self._what}: sends more than the {self._limit:,} bytes expected")

    def update_transfer(self, num_bytes: float = 1) -> None:
        """Bytes on the wire; they are fewer or the same."""

    def set_postfix_str(self, *_: object, **__: object) -> None:
        """No text."""

    set_transfer_postfix_str = set_postfix_str

    def close(self) -> None:
        """Nothing to close."""


def _patiently(what: str, ask: Callable[[], Result]) -> Result:
    patience = Patience(what)
    while True:
        try:
            return ask()
        except (httpx2.TransportError, HfHubHTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            is_cut_off = type(error) is OSError and error.errno is None  # its check of the length
            if not (isinstance(error, httpx2.TransportError) or is_cut_off or status in PASSING):
                raise
            patience.wait(error)


@contextmanager
def _one_message(what: str) -> Iterator[None]:
    """Turn each way in which the Hub can fail into one error."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, RevisionResolutionError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine's disk
        raise RunError(f"{what}: not to be had from the Hub: {_reason(error)}") from error
    except ValueError as error:  # HFValidationError, and addresses that are none
        raise ModelError(f"{what}: not to be had from the Hub: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:300] or type(error).__name__
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{text} ({_reason(error.__cause__)})"
    return text
