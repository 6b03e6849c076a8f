"""How files come over HTTP, from the Hub and from other servers, by huggingface_hub's own client.

`guarded` refuses what it doesn't: redirects from https to http, headers that name files outside of
its cache, and pauses without end. `Meter` stops an answer that is longer than expected, and
`patiently` asks again after a failure that may pass.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import tqdm
from huggingface_hub.utils._http import default_client_factory
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential

from opfa.errors import ModelError, OpfaError, RunError, first_line

ATTEMPTS = 6
PAUSE_SECONDS = 0.5  # after the first failure; then twice as long each time
MAX_PAUSE_SECONDS = 60
MAX_REDIRECTS = 5
PASSING = (408, 425, 429, 500, 502, 503, 504)
COMMIT = re.compile(r"[0-9a-f]{40}")
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
SECONDS = re.compile(r"[0-9]{1,9}")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Meter(tqdm):
    """A progress bar that raises `ModelError` when more bytes come, or are announced, than may."""

    what: str
    limit: int

    @classmethod
    def of(cls, what: str, limit: int) -> "type[Meter]":
        """The class of one file's bars, which huggingface_hub makes itself."""
        return type("Meter", (cls,), {"what": what, "limit": limit})

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Look at the length that is announced."""
        self._num_bytes = self._restarts = 0
        if (total := options.get("total") or 0) > self.limit:
            what = f"the server would send {total:,} bytes, but at most {self.limit:,}"
            raise ModelError(f"{self.what}: {what} are expected")
        super().__init__(*arguments, **options)

    def update(self, n: float | None = 1) -> bool | None:
        """Count bytes; a negative number says that a server without ranges begins again."""
        self._num_bytes += int(n or 0)
        self._restarts += int(n or 0) < 0
        if self._num_bytes > self.limit:
            raise ModelError(f"{self.what}: sends more than the {self.limit:,} bytes expected")
        if self._restarts == ATTEMPTS:
            raise RunError(f"{self.what}: breaks off again and again, and can't be resumed")
        return super().update(n)

    def update_transfer(self, _: float = 1) -> None:
        """Don't count what the Hub's own storage sends beside."""

    def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
        """Don't show it."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Until the block ends, let huggingface_hub's client refuse unsafe answers."""

    def make() -> httpx2.Client:
        try:
            client = default_client_factory()
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise RunError(f"this proxy can't be used: {first_line(error)}") from error
        client.event_hooks = {**client.event_hooks, "response": [_check]}
        client.max_redirects = MAX_REDIRECTS
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _check(response: httpx2.Response) -> None:
    here, headers = response.url, response.headers
    if response.has_redirect_location:
        try:
            target = here.join(headers["Location"])
        except httpx2.InvalidURL as error:
            raise RunError(f"{here}: redirects to no valid address: {error}") from error
        is_as_safe = target.scheme == here.scheme and target.host == here.host
        if target.scheme != "https" and not is_as_safe:
            raise RunError(f"{here}: redirects to {target}, which is not https")
    pause = headers.get("Retry-After", "")
    if SECONDS.fullmatch(pause) and int(pause) > MAX_PAUSE_SECONDS:
        what = f"HTTP {response.status_code}, and the server asks to come back in {pause} s"
        raise RunError(f"{here}: {what}")
    commit = headers.get("X-Repo-Commit")
    if commit is not None and response.request.method == "HEAD":  # both become names of files
        etag = headers.get("X-Linked-Etag") or headers.get("ETag", "none")
        etag = etag.removeprefix("W/").strip('"')
        for pattern, text, what in ((COMMIT, commit, "commit"), (PLAIN, etag, "ETag")):
            if not pattern.fullmatch(text):
                raise ModelError(f"{here}: gives {text!r:.80} as {what}, which can't be one")


@contextlib.contextmanager
def reaching(
    what: str, problem: str = "not available from the Hub", kind: type[OpfaError] = RunError
) -> Iterator[None]:
    """Turn each way in which a server can fail into one error."""
    try:
        yield
    except (httpx2.HTTPError, RevisionResolutionError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine's disk
        reason = first_line(error)
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            reason = f"{reason} ({first_line(error.__cause__)})"
        raise kind(f"{what}: {problem}: {reason}") from error
    except (ValueError, httpx2.InvalidURL) as error:  # names and addresses that are none
        raise ModelError(f"{what}: {problem}: {first_line(error)}") from error


def patiently(what: str, ask: Callable[[], Result]) -> Result:
    """Ask until there is an answer, at most `ATTEMPTS` times."""

    def tell(state: RetryCallState) -> None:
        reason = state.outcome and state.outcome.exception()
        log.info("%s: %s; again in %.1f s", what, reason, state.upcoming_sleep)

    return Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_exponential(PAUSE_SECONDS),
        stop=stop_after_attempt(ATTEMPTS),
        before_sleep=tell,
        reraise=True,
    )(ask)


def _may_pass(error: BaseException) -> bool:
    """Whether to ask again, after a failure that huggingface_hub itself doesn't ask again after."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    is_cut_off = type(error) is OSError and error.errno is None  # its check of a file's length
    return is_cut_off or isinstance(error, httpx2.ReadError)


def fetch(url: str, file: IO[bytes], limit: int, *, is_exact: bool = True) -> None:
    """Write what a server has at an address to a file: exactly, or at most, `limit` bytes."""

    def ask() -> None:
        file.seek(0)
        file.truncate()
        http_get(
            url,
            file,  # type: ignore[arg-type] - anything that can be written will do
            headers={"Accept-Encoding": "identity"},
            expected_size=limit if is_exact else None,
            tqdm_class=Meter.of(url, limit),
        )

    patiently(url, ask)
