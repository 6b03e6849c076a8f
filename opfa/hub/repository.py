"""A model on the Hugging Face Hub or a mirror of it: what its files must be, and how to get them.

All goes through huggingface_hub's cache, where `from_pretrained` finds the files later, at one
commit. Where there is no release manifest, the Hub's own listing takes its place: SHA-256 of large
files and git's SHA-1 of the others. Pickles are only copied
where there are no other weights, and never opened.
"""

import functools
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from pydantic import Field

from opfa.errors import ModelError, RunError
from opfa.hub import manifest
from opfa.hub.manifest import ALSO, MANIFEST, MAX_FILES, MAX_MANIFEST_BYTES, SUFFIXES
from opfa.hub.reach import problem_of_hub
from opfa.hub.transfer import COMMIT, Meter, patiently, reaching
from opfa.recipe import Section
from opfa.storage.seal import File, problem_of_size

PICKLE = re.compile(r"pytorch_model[A-Za-z0-9_-]*\.bin")
log = logging.getLogger(__name__)


class Blob(Section):
    """What a file must be, as git knows it."""

    size: int = Field(ge=0)
    sha1: str = Field(pattern=r"^[0-9a-f]{40}$")

    def problem(self, path: Path) -> str | None:
        """How a file on disk differs from what it must be; None where it does not."""
        if problem := problem_of_size(path, self.size):
            return problem
        data = path.read_bytes()  # git's own files are small
        digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return None if digest.hexdigest() == self.sha1 else "has another digest on the Hub"


class Source:
    """Where a model comes from: what its files must be, and how to get one."""

    files: Mapping[str, File | Blob]
    manifest: bytes | None = None  # byte for byte; None where there is none

    def bring(self, file: str, path: Path, *, is_again: bool) -> None:
        """Write one file to a path; the caller checks it."""
        raise NotImplementedError


class HubModel(Source):
    """A model's files on the Hub, at one commit."""

    def __init__(self, name: str, revision: str | None, endpoint: str | None) -> None:
        """Ask for the manifest, or else for the Hub's listing."""
        self.name = name
        self._endpoint = endpoint and endpoint.rstrip("/")
        self._revision = revision or constants.DEFAULT_REVISION
        self._problem = problem_of_hub(self._endpoint)  # then only the cache is asked
        with reaching(name):
            try:
                self.files = self._manifest_files()
            except RemoteEntryNotFoundError:
                self.files = self._listed()
            except LocalEntryNotFoundError:
                found = try_to_load_from_cache(name, MANIFEST, revision=self._revision)
                if found is None or isinstance(found, str):
                    if self._problem:
                        raise RunError(
                            f"{name}: not available from the Hub: {self._problem}"
                        ) from None
                    raise
                self.files = self._cached()  # it is known that there is no manifest

    def bring(self, file: str, path: Path, *, is_again: bool) -> None:
        """Copy a file out of the cache; download it first where it isn't there, or is wrong."""
        with reaching(f"{self.name}, {file}"):
            try:
                found = self._get(file, self.files[file].size, is_forced=is_again)
            except RemoteEntryNotFoundError:
                what = f"its {MANIFEST} lists {file}, which the repository doesn't have"
                raise ModelError(f"{self.name}: {what}") from None
            copyfile(found, path)

    def _get(self, file: str, limit: int, *, is_forced: bool) -> Path:
        what = f"{self.name}, {file}"
        if is_forced and (constants.is_offline_mode() or self._problem):
            why = self._problem or "HF_HUB_OFFLINE forbids to ask"
            raise RunError(f"{what}: is damaged in the cache, and {why}")
        ask = functools.partial(
            hf_hub_download,
            self.name,
            file,
            revision=self._revision,
            endpoint=self._endpoint,
            force_download=is_forced,
            local_files_only=bool(self._problem),
            tqdm_class=Meter.of(what, limit),
        )
        return Path(patiently(what, ask))

    def _manifest_files(self, *, is_again: bool = False) -> Mapping[str, File]:
        path = self._get(MANIFEST, MAX_MANIFEST_BYTES, is_forced=is_again)
        with path.open("rb") as file:
            self.manifest = file.read(MAX_MANIFEST_BYTES + 1)
        try:
            files = manifest.parse(self.manifest, where=f"{self.name}, {MANIFEST}").files
        except ModelError:
            if is_again or constants.is_offline_mode():
                raise
            return self._manifest_files(is_again=True)  # the cache may be damaged
        self._revision = path.parent.name  # the cache's layout: snapshots/COMMIT/release.json
        return files

    def _listed(self) -> Mapping[str, File | Blob]:
        ask = functools.partial(
            HfApi(endpoint=self._endpoint).model_info,
            self.name,
            revision=self._revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        found = {}
        try:
            info = patiently(f"{self.name}, its list of files", ask)
            for each in info.siblings or ():
                if _is_wanted(each.rfilename, self.name):
                    size, digest = each.size, each.blob_id
                    if each.lfs is not None:
                        size, digest = each.lfs.size, each.lfs.sha256
                    found[each.rfilename] = _expected(size, digest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.name}: no listing of a Hub: {error!r:.200}") from error
        if not COMMIT.fullmatch(info.sha or ""):
            raise ModelError(f"{self.name}: the Hub gives {info.sha!r:.80} as commit")
        self._revision = info.sha or ""
        log.info("%s: has no %s; checked against the Hub's own listing", self.name, MANIFEST)
        return _chosen(found, self.name)

    def _cached(self) -> Mapping[str, File | Blob]:
        """The files in the cache; whether all are there can't be seen."""
        patterns = [*(f"*{suffix}" for suffix in SUFFIXES), *ALSO]
        snapshot = Path(
            snapshot_download(
                self.name, revision=self._revision, allow_patterns=patterns, local_files_only=True
            )
        )
        self._revision = snapshot.name
        paths = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*")}
        found = {
            name: _expected(path.stat().st_size, path.resolve().name)
            for name, path in paths.items()
            if path.is_file() and _is_wanted(name, self.name)
        }
        log.info("%s: from the cache, checked against its digests", self.name)
        return _chosen(found, self.name)


def _expected(size: Any, digest: Any) -> File | Blob:  # Any: whatever a server says
    return File(size=size, sha256=digest) if len(digest) == 64 else Blob(size=size, sha1=digest)


def _is_wanted(file: str, name: str) -> bool:
    if file.startswith("/") or ".." in file.split("/") or "\\" in file:
        raise ModelError(f"{name}: the Hub lists {file[:80]!r}, which leads out of a directory")
    return manifest.problem_of_name(file) is None or PICKLE.fullmatch(file) is not None


def _chosen(files: Mapping[str, File | Blob], name: str) -> Mapping[str, File | Blob]:
    """Without pickles, unless the weights are there in no other form."""
    pickles = {file for file in files if PICKLE.fullmatch(file)}
    if any(file.endswith(".safetensors") for file in files):
        files = {file: expected for file, expected in files.items() if file not in pickles}
    elif pickles:
        log.info("%s: has no safetensors; takes %s", name, ", ".join(sorted(pickles)))
    if not files or len(files) > MAX_FILES:
        what = f"lists {len(files)} files of a model; 1 to {MAX_FILES} are accepted"
        raise ModelError(f"{name}: {what}")
    return files
