"""What the Hub itself says of a repository's files, for those that have no release manifest.

The Hub states the SHA-256 of large files and git's blob SHA-1 of the others, and names the files of
its cache after them, so that what lies there can be held to it without a network. Only files that a
release could have are taken; weights as a pickle only where there are no others, and they are
copied, not opened.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.hf_api import RepoSibling

from opfa.errors import ModelError
from opfa.hub.manifest import MANIFEST, MAX_FILES, File, problem_of_name, problem_of_size

PICKLE = re.compile(r"pytorch_model[A-Za-z0-9_-]*\.bin")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Blob:
    """What a file must be by the Hub's listing: 64 digits are its SHA-256, 40 git's SHA-1."""

    size: int
    digest: str

    def problem(self, path: Path) -> str | None:
        """How a file on disk differs from what it must be; None where it does not."""
        if len(self.digest) == 64:
            return File(size=self.size, sha256=self.digest).problem(path)
        if problem := problem_of_size(path, self.size):
            return problem
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return None if digest.hexdigest() == self.digest else "has another digest on the Hub"


def listed(name: str, siblings: Iterable[RepoSibling]) -> dict[str, Blob]:
    """The files of a model that the Hub lists."""
    blobs = {}
    for each in siblings:
        size, digest = each.size, each.blob_id
        if each.lfs is not None:
            size, digest = each.lfs.size, each.lfs.sha256
        if _is_wanted(each.rfilename, name):
            digest = checked(DIGEST, digest, f"digest of {each.rfilename}", name)
            if not isinstance(size, int) or size < 0:
                raise ModelError(f"{name}: the Hub gives no size of {each.rfilename}")
            blobs[each.rfilename] = Blob(size=size, digest=digest)
    log.info("%s: has no %s; held to the Hub's own listing", name, MANIFEST)
    return _chosen(blobs, name)


def cached(name: str, snapshot: Path) -> dict[str, Blob]:
    """The files of a model in the cache; whether all are there can't be seen."""
    blobs = {}
    for path in sorted(snapshot.rglob("*")):
        file = path.relative_to(snapshot).as_posix()
        if path.is_file() and _is_wanted(file, name):
            digest = checked(DIGEST, path.resolve().name, f"digest of {file}", name)
            blobs[file] = Blob(size=path.stat().st_size, digest=digest)
    log.info("%s: the Hub can't be asked; from the cache, held to the digests there", name)
    return _chosen(blobs, name)


def checked(pattern: re.Pattern[str], text: str | None, what: str, name: str) -> str:
    """A text of the Hub's that looks as it must; else it could name a file anywhere."""
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ModelError(f"{name}: the Hub gives {text!r:.80} as {what}, which can't be one")
    return text


def _is_wanted(file: str, name: str) -> bool:
    if file.startswith("/") or ".." in file.split("/") or "\\" in file:
        raise ModelError(f"{name}: the Hub lists {file[:80]!r}, which leads out of a directory")
    return problem_of_name(file) is None or PICKLE.fullmatch(file) is not None


def _chosen(blobs: Mapping[str, Blob], name: str) -> dict[str, Blob]:
    """Without pickles, unless the weights are there in no other form."""
    pickles = {file for file in blobs if PICKLE.fullmatch(file)}
    if any(file.endswith(".safetensors") for file in blobs):
        blobs = {file: blob for file, blob in blobs.items() if file not in pickles}
    elif pickles:
        log.info("%s: has no safetensors; takes %s", name, ", ".join(sorted(pickles)))
    if not blobs or len(blobs) > MAX_FILES:
        raise ModelError(f"{name}: lists {len(blobs)} files of a model; 1 to {MAX_FILES} are taken")
    return dict(blobs)
