"""One file over HTTP: resumed where it broke off, never longer than declared, never for ever.

The bytes that have come are the state: they stay in the file, and the next attempt, of this process
or a later one, asks for the rest by Range. A pause follows each failure, longer each time or as
long as the server asks; failures are counted anew whenever a MiB more than ever before has come.
Whether the bytes are the right ones is for the caller to see, from their digest.

`huggingface_hub.file_download.http_get` was looked at and left for the Hub alone: it follows any
redirect, to plain http too, gives up at 503 and at a reset connection, doesn't look where a partial
answer begins, and stops an endless one only when the disk is full. Its client is used, so proxies,
certificates and HF_HUB_OFFLINE hold here as they do there.
"""

import contextlib
import email.utils
import ipaddress
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled

from opfa.errors import ModelError, RunError, redacted

ATTEMPTS = 6  # in a row, without much progress
PAUSE_SECONDS = 0.5  # after the first failure; then twice as long each time
MAX_PAUSE_SECONDS = 60
PROGRESS_BYTES = 1 << 20
MAX_REDIRECTS = 5
PASSING = (408, 425, 429, 500, 502, 503, 504)
RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)")
Advance = Callable[[int], None]  # told how many bytes came; negative where some were dropped
log = logging.getLogger(__name__)


class PassingError(Exception):
    """A failure that another attempt may not have; with the pause that the server asks for."""

    def __init__(self, reason: str, pause_seconds: float | None = None) -> None:
        """Say what failed."""
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class Patience:
    """How often a thing has failed, and how long to wait before it is tried again."""

    def __init__(self, what: str) -> None:
        """Begin with no failure."""
        self.what = what
        self._failures = 0
        self._best = 0

    def wait(self, error: Exception, num_bytes: int = 0) -> None:
        """Wait after a failure; raises `RunError` when there were too many."""
        if num_bytes >= self._best + PROGRESS_BYTES:
            self._best, self._failures = num_bytes, 0
        self._failures += 1
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if self._failures == ATTEMPTS:
            raise RunError(
                f"{self.what}: {reason}; given up after {ATTEMPTS} attempts; the same command goes "
                "on from here"
            ) from error
        pause = PAUSE_SECONDS * 2 ** (self._failures - 1)
        if isinstance(error, PassingError) and error.pause_seconds is not None:
            pause = error.pause_seconds
        if pause > MAX_PAUSE_SECONDS:
            raise RunError(
                f"{self.what}: {reason}, and the server asks to come back in {pause:.0f} s; the "
                "same command goes on from here"
            ) from error
        log.info("%s: %s; again in %.1f s", self.what, reason, pause)
        time.sleep(pause)


def fetch(url: str, path: Path, size: int, advance: Advance) -> None:
    """Bring a file of this many bytes to a path, after the bytes that are there already."""
    patience = Patience(redacted(url))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        advance(file.tell())
        while file.tell() < size:
            try:
                with _answer(url, start=file.tell()) as response:
                    _receive(response, file, size, advance)
            except (httpx2.TransportError, PassingError) as error:
                file.flush()
                patience.wait(error, file.tell())
        file.flush()
        os.fsync(file.fileno())


def fetch_small(url: str, limit: int) -> bytes:
    """A whole answer of at most so many bytes."""
    patience = Patience(redacted(url))
    while True:
        content = b""
        try:
            with _answer(url) as response:
                for block in response.iter_raw():
                    content += block
                    if len(content) > limit:
                        raise ModelError(f"{redacted(url)}: sends more than {limit:,} bytes")
            return content
        except (httpx2.TransportError, PassingError) as error:
            patience.wait(error)


def _receive(response: httpx2.Response, file: IO[bytes], size: int, advance: Advance) -> None:
    where = redacted(str(response.url))
    asked = file.tell()
    start, total = _extent(response)
    if start is None or start not in (0, asked):  # this server's ranges are of no use, or it has
        advance(-asked)  # another file now
        _drop(file)
        raise PassingError(f"has no bytes from {asked:,} on (HTTP {response.status_code})")
    if total is not None and total > size:
        raise ModelError(f"{where}: has {total:,} bytes, but the manifest says {size:,}")
    if total is not None and total < size:
        raise PassingError(f"has {total:,} bytes, but the manifest says {size:,}")
    if start < asked:  # the server takes no ranges
        advance(-asked)
        _drop(file)
    for block in response.iter_raw():
        if file.tell() + len(block) > size:
            raise ModelError(f"{where}: sends more than the {size:,} bytes of the manifest")
        file.write(block)
        advance(len(block))
    if file.tell() < size:
        raise PassingError(f"ended after {file.tell():,} of {size:,} bytes")


def _extent(response: httpx2.Response) -> tuple[int | None, int | None]:
    """The first byte of an answer, and how long the whole file is, as far as the server says so."""
    if response.status_code == 200:
        return 0, _number(response.headers.get("Content-Length", ""))
    found = RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (_number(found[1]), _number(found[2])) if found else (None, None)


def _drop(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


@contextlib.contextmanager
def _answer(url: str, start: int = 0) -> Iterator[httpx2.Response]:
    """Ask for a file from a byte on, at most over a few safe redirects."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with contextlib.ExitStack() as stack:
        target = httpx2.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                asked = get_session().stream(
                    "GET",
                    target,
                    headers=headers,
                    follow_redirects=False,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
                response = stack.enter_context(asked)
            except OfflineModeIsEnabled:
                raise RunError(
                    f"{redacted(url)}: HF_HUB_OFFLINE is set, nothing is asked"
                ) from None
            except (ValueError, ImportError, httpx2.InvalidURL) as error:
                raise RunError(
                    f"{redacted(url)}: can't be asked with this proxy: {error}"
                ) from error
            if not response.has_redirect_location:
                break
            target = _next(target, response.headers["Location"])
        else:
            raise RunError(f"{redacted(url)}: more than {MAX_REDIRECTS} redirects")
        _check_status(response, start)
        yield response


def _next(target: httpx2.URL, location: str) -> httpx2.URL:
    try:
        following = target.join(location)
    except httpx2.InvalidURL as error:
        raise RunError(
            f"{redacted(str(target))}: redirects to no valid address: {error}"
        ) from error
    is_near = is_loopback(following.host) and is_loopback(target.host)
    if following.scheme != "https" and not (following.scheme == "http" and is_near):
        raise RunError(
            f"{redacted(str(target))}: redirects to {redacted(str(following))}, which is not https"
        )
    return following


def _check_status(response: httpx2.Response, start: int) -> None:
    status = response.status_code
    where = redacted(str(response.url))
    if status in PASSING:
        raise PassingError(f"HTTP {status}", _pause(response.headers.get("Retry-After", "")))
    if status not in (200, 206) and not (status == 416 and start):
        raise RunError(f"{where}: HTTP {status} {response.reason_phrase}".rstrip())
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ModelError(f"{where}: sends {encoding!r:.40}, though plain bytes were asked for")


def _pause(retry_after: str) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or as a date."""
    seconds = _number(retry_after)
    if seconds is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
