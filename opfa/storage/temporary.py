"""Temporary places: where an output is made before it takes its name, by one process at a time.

`.NAME.incomplete` beside the output holds `files`, which takes the output's name in the end, and
`.lock`. Temporary places are never links: what is found there and is no plain directory, or no
plain file with one name, is removed, and what it points to stays as it is.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from opfa.errors import RunError

INCOMPLETE = ".incomplete"
FILES = "files"
LOCK = ".lock"
ENDINGS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
GRACE_SECONDS = 1
log = logging.getLogger(__name__)


def temporary(path: Path) -> Path:
    """The temporary place of an output."""
    return path.with_name(f".{path.name}{INCOMPLETE}")


def remove(path: Path) -> None:
    """Remove a file, a directory or a link (not what it points to); nothing may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_plain(path: Path) -> bool:
    """Whether it is a directory, or a file that has no other name; links aren't followed."""
    found = path.lstat()
    is_file = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    return is_file or stat.S_ISDIR(found.st_mode)


@contextlib.contextmanager
def held(output: Path, waiting: str | None = None) -> Iterator[Path]:
    """The place `files` in which an output is made. While another process holds it, this one says
    that it is `waiting`, or a `RunError` is raised. SIGTERM ends the block as Ctrl-C does.
    """
    aside = temporary(output)
    made = [parent for parent in aside.absolute().parents if not parent.exists()]
    file = _locked(aside, output, waiting)
    try:
        for path in aside.iterdir():
            if path.name not in (FILES, LOCK):
                remove(path)
        with _ending_tidily():
            yield aside / FILES
    finally:
        with contextlib.suppress(OSError):
            (aside / FILES).rmdir()  # only where nothing came
        with contextlib.suppress(OSError):
            if not os.path.lexists(aside / FILES):
                (aside / LOCK).unlink()
                for path in (aside, *made):  # another process may be there already
                    path.rmdir()
        file.close()


def lock(path: Path, waiting: Callable[[], None] | None = None) -> IO[str]:
    """Hold a lock file until it is closed; while another process holds it, raise `BlockingIOError`,
    or say that this one is `waiting`, and wait. Links are replaced.
    """
    while True:
        if path.is_symlink() or not path.is_file():
            remove(path)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                file.close()
                raise
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # its last user has just removed it
            if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                if is_plain(path):
                    return file
                remove(path)
        file.close()


def _locked(aside: Path, output: Path, waiting: str | None) -> IO[str]:
    tell = None if waiting is None else lambda: log.info("%s: %s", output, waiting)
    while True:
        if aside.is_symlink() or not aside.is_dir():
            remove(aside)
        aside.mkdir(parents=True, exist_ok=True)
        try:
            return lock(aside / LOCK, tell)
        except BlockingIOError:
            raise RunError(f"{output}: is being written by another process") from None
        except FileNotFoundError:
            continue  # its last user has just removed the directory


@contextlib.contextmanager
def _ending_tidily() -> Iterator[None]:
    """Let SIGTERM raise an exception here, as Ctrl-C does, so that what is half-written goes; not
    in children, which a terminal's Ctrl-C reaches too.
    """
    process, told = os.getpid(), []

    def end(number: int, _: object) -> None:
        if os.getpid() == process:
            told.append(number)
            raise ended(number)
        if number == signal.SIGTERM:  # at once, a worker could keep its pool's lock for ever
            signal.alarm(GRACE_SECONDS)

    def ended(number: int) -> BaseException:
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    changed = [n for n, usual in ENDINGS.items() if is_main and signal.getsignal(n) == usual]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if told:  # a library that was interrupted put an error of its own in its place
            raise ended(told[0]) from error
        raise
    finally:
        for number in changed:
            signal.signal(number, ENDINGS[number])
