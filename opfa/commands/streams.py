"""Standard output and standard error, whatever the caller did to them.

What a reader that leaves early (`head`) doesn't want goes nowhere. A closed stream becomes the null
device; else the next file that is opened would get its number, and what libraries print.
"""

import io
import os
import sys

from opfa.errors import RunError
from opfa.storage.files import named

STDOUT = 1


class Stream(io.TextIOWrapper):
    """A standard stream that sends everything nowhere once it can't be written."""

    def write(self, text: str, /) -> int:
        """Write, or drop it."""
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what isn't written yet."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Raises `RunError` where results are lost: on stdout, unless its reader has gone."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self.fileno() == STDOUT and not isinstance(error, BrokenPipeError):
            reason = named(error.errno or 0)
            raise RunError(f"the standard output: can't be written: {reason}") from error


def secure() -> None:
    """Put such streams in the place of this process's own."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for good
            continue
        kept = ("encoding", "errors", "line_buffering", "write_through")
        how = {option: getattr(old, option) for option in kept}
        setattr(sys, name, Stream(old.detach(), **how))
