"""The kernels' library: the wheel's, the one kept in the cache, or compiled once for the cache.

Its name has a hash of the sources and of how they are compiled, so a stale one is never loaded, and
a hash of its own bytes, so a damaged one isn't either: loading that could end the process.
"""

import ctypes
import functools
import hashlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opfa.errors import RunError, first_line
from opfa.runtime.compiler import KERNELS, LEVELS, OPTIONS, SUFFIX, compile_library, machine
from opfa.storage.temporary import lock, remove

log = logging.getLogger(__name__)


@functools.cache
def loaded() -> ctypes.CDLL:
    """The library, compiled if it is nowhere yet.

    Raises `RunError` where that is not possible: `why_not` asks without raising.
    """
    for directory in (KERNELS, *filter(is_private, caches())):
        if found := _kept(directory):
            return found
    problems = {}
    for directory in caches():
        try:
            return _compiled(directory)
        except (OSError, RunError) as error:  # a disk that is full or read-only, or no compiler
            problems[first_line(error)] = directory
    raise RunError("; ".join(problems))


def why_not() -> str | None:
    """Why the kernels can't run here, so that models run in torch; None where they can."""
    try:
        loaded()
    except RunError as error:
        return str(error)
    return None


def digest(kind: str | None = None) -> str:
    """A hash of the sources and of how they are compiled for a kind of machine."""
    found = hashlib.sha256(repr((kind or machine(), sys.platform, LEVELS, OPTIONS)).encode())
    for path in sorted(KERNELS.glob("*.[ch]")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def file_name(library: Path, kind: str | None = None) -> str:
    """How a compiled library is called where it is kept."""
    return f"libopfa-{digest(kind)}-{_hash(library)}{SUFFIX}"


def caches() -> Iterator[Path]:
    """Where a compiled library is kept: the user's cache, or a directory of theirs among the
    temporary ones.
    """
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if os.path.isabs(home):  # a user may have no home
        yield Path(home) / "opfa" / "runtime"
    yield Path(tempfile.gettempdir()) / f"opfa-runtime-{os.getuid()}"


def is_private(directory: Path) -> bool:
    """Whether only this user, or root, can have put a file here."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    is_closed = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    return is_closed and found.st_uid in (os.getuid(), 0)


def _kept(directory: Path) -> ctypes.CDLL | None:
    """A whole library of these sources in a directory, if it can be loaded."""
    for path in sorted(directory.glob(f"libopfa-{digest()}-*{SUFFIX}")):
        try:
            if path.name == file_name(path):
                return ctypes.CDLL(str(path))
            log.info("%s: damaged; not loaded", path)
        except OSError as error:  # of another libc, or where nothing may be executed
            log.info("%s", first_line(error))
    return None


def _compiled(directory: Path) -> ctypes.CDLL:
    """Compile into a directory, or wait for the process that does. Raises `OSError` for one that
    can't be used.
    """
    directory.mkdir(0o700, parents=True, exist_ok=True)
    if not is_private(directory):
        raise PermissionError(f"{directory}: others can write here")
    with lock(directory / "lock", lambda: log.info("waiting for another process that compiles")):
        if found := _kept(directory):
            return found
        work = directory / "work"
        remove(work)  # of a process that was killed
        work.mkdir()
        try:
            log.info("compiling the runtime's kernels, once, to %s", directory)
            built = compile_library(work)
            name = file_name(built)
            os.replace(built, directory / name)
        finally:
            remove(work)
    return ctypes.CDLL(str(directory / name))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
