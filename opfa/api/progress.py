"""What a function says while it works, in a program that has no logging of its own."""

import contextlib
import logging
import sys
from collections.abc import Iterator

log = logging.getLogger("opfa")


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Show what opfa logs, one line each, on standard error; a decorator too.

    Where the program has set logging up, its handlers and levels decide, and this does nothing. So
    a notebook sees the steps of a training without a word, and a server's log stays as it is.
    """
    if log.hasHandlers() or log.level:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)  # a notebook's own, as it is now
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
