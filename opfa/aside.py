"""The directory beside an output in which it is made: by one process at a time, kept when that
fails.

`.NAME.incomplete` holds `files`, which takes the output's name in the end, and `.lock`. A lock file
beside the output would stay there for ever: to remove one is only safe where, as here, whoever gets
a lock looks whether it is still that of the file with this name. The kernel frees the lock of a
process that was killed.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FILES = "files"
LOCK = ".lock"
log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(output: Path) -> Iterator[Path]:
    """The directory `files` in which an output is made; another process waits for this one."""
    aside = output.with_name(f".{output.name}.incomplete")
    lock = _locked(aside, output)
    try:
        yield aside / FILES
    finally:
        with contextlib.suppress(OSError):
            (aside / FILES).rmdir()  # only where nothing came
        if not (aside / FILES).exists():
            (aside / LOCK).unlink()
            with contextlib.suppress(OSError):  # another process has made a lock of its own
                aside.rmdir()
        lock.close()


def _locked(aside: Path, output: Path) -> IO[bytes]:
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        try:
            lock = (aside / LOCK).open("ab")
        except FileNotFoundError:
            continue  # its last user has just removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process downloads to here; waiting for it", output)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (aside / LOCK).stat()):
                return lock
        lock.close()  # of a file that its last user has removed
