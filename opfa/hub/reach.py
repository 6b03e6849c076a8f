"""Whether the Hub answers: asked once, in bounded time, before anything else waits for it.

huggingface_hub has no time limit where it lists a model's files, none for looking up an address,
and asks again and again. Behind a firewall that drops packets each file would take minutes.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from opfa.errors import OpfaError, first_line

SECONDS = 10.0  # for an answer; the search for an address counts too
AGAIN_SECONDS = 60.0  # after this, a Hub that didn't answer is asked again
log = logging.getLogger(__name__)
_found: dict[str, tuple[float, str]] = {}  # by endpoint: when it was asked, and what was wrong


def problem_of_hub(endpoint: str | None = None) -> str:
    """Why the Hub, or a mirror of it, can't be reached; empty where it answers, and offline."""
    where = (endpoint or constants.ENDPOINT).rstrip("/")
    if constants.is_offline_mode():
        return ""  # nothing will be asked
    when, problem = _found.get(where, (-AGAIN_SECONDS, ""))
    if where in _found and (not problem or time.monotonic() - when < AGAIN_SECONDS):
        return problem
    reason = _ask(where)
    problem = f"{where} is out of reach: {reason}" if reason else ""
    _found[where] = time.monotonic(), problem
    return problem


@functools.cache
def tell_of_cache(problem: str) -> None:
    """Say once that what is used comes from the cache, and why."""
    log.warning("%s; what is used comes from the cache", problem)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """A block in which huggingface_hub, and `datasets` through it, ask nothing."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _ask(where: str) -> str:
    """What goes wrong with a question, to which any answer will do."""
    found: list[str] = []
    try:
        session = get_session()
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        return f"this proxy can't be used: {first_line(error)}"

    silence = f"no answer in {SECONDS:g} s"

    def ask() -> None:
        try:
            session.head(where, timeout=SECONDS, follow_redirects=False)
            found.append("")
        except OpfaError:  # of `transfer.guarded`, about an answer
            found.append("")
        except httpx2.TimeoutException:
            found.append(silence)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:
            found.append(first_line(error))

    thread = threading.Thread(target=ask, daemon=True)  # an address may be searched for minutes
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else silence
