"""Files that are there whole or not at all, and outputs that are checked before any work is done.

What is not finished is in the output's temporary place (`opfa.storage.temporary`). `writing` is the
one place that says what a disk refused.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opfa.errors import OpfaError, RunError, redacted
from opfa.storage.temporary import FILES, INCOMPLETE, held, remove, temporary

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK = {*FULL, errno.EIO, errno.EROFS}  # what is of a disk, whichever library met it
FULL_BELOW = 1 << 20  # bytes free; a failed write leaves less than its next block
OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # Rust's words and Python's
PATH_BYTES = 4096  # the longest path
BELOW = 200  # bytes of it that stay free for what a command makes below its output


def check_new(path: Path, what: str = "directory") -> None:
    """Raise `RunError` unless a new directory, or file, can be made here, parents included."""
    if _status(path) is not None:
        raise RunError(f"{path}: exists already; give a new {what}")
    _check_name(path)


def check_there(directory: Path) -> None:
    """Raise `RunError` unless a directory is here, to read from."""
    if not directory.is_dir():
        raise RunError(f"{directory}: no such directory")


def check_file(path: Path) -> None:
    """Raise `RunError` unless a file can be written here, over an older one if there is one."""
    found = _status(path)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise RunError(f"{path}: is a link; give the file itself")
    if found is not None and not stat.S_ISREG(found.st_mode):
        what = "a directory; give a file" if stat.S_ISDIR(found.st_mode) else "not a plain file"
        raise RunError(f"{path}: is {what}")
    _check_name(path)


def _check_name(path: Path) -> None:
    if path.name in ("", ".."):
        raise RunError(f"{str(path)!r}: is no name for an output")
    check_directory(path.parent, path, temporary(path).name)


def check_directory(directory: Path, output: Path | None = None, name: str = "") -> None:
    """Raise `RunError` unless files can be written in this directory, or it can be made. The
    message is about `output`, whose name there is `name`; without them about the directory.
    """
    output = directory if output is None else output
    _status(output)
    shown, full = _short(output), directory.absolute()
    there = next(path for path in (full, *full.parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "not a directory" if there.exists() else "a link that leads nowhere"
        kind = "a file" if there.is_file() else kind
        raise RunError(f"{shown}: can't be made: {there} is {kind}")
    names = [name, *full.relative_to(there).parts]
    if ".." in names:
        raise RunError(f"{shown}: can't be made: it leads up from a directory that isn't there")
    try:
        most = os.pathconf(there, "PC_NAME_MAX")
        if max(len(os.fsencode(each)) for each in names) > most:
            raise RunError(f"{shown}: can't be made: its name is too long")
        if len(os.fsencode(full / name)) > PATH_BYTES - BELOW:
            raise RunError(f"{shown}: can't be made: its path is too long")
        with tempfile.TemporaryFile(dir=there):  # rights, quotas and read-only disks refuse that
            pass
    except OSError as error:
        raise RunError(f"{shown}: can't be made: {there}: {_reason(error)}") from error


def _status(path: Path) -> os.stat_result | None:
    """What is at a path, links not followed; None where there is nothing."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return None
        raise RunError(f"{_short(path)}: can't be made: {_reason(error)}") from error


def _short(path: Path) -> str:
    return text if len(text := str(path)) <= 300 else f"{text[:200]}..."


def _reason(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return str(error) if number is None else named(number)


@contextlib.contextmanager
def writing(where: Path, kept: str = "nothing half-written is kept") -> Iterator[None]:
    """Turn what a disk refuses (space, quota, rights, I/O) into one message that says where and
    why, whichever library met it. Inside of a temporary place, its output's message is the one.
    """
    is_inside = any(path.name.endswith(INCOMPLETE) for path in where.absolute().parents)
    try:
        yield
    except OpfaError:
        raise
    except Exception as error:
        reason = refusal(error, where)
        if reason is None or is_inside:
            raise
        raise RunError(f"{where}: can't be written: {reason}; {kept}") from error


def refusal(error: BaseException, where: Path) -> str | None:
    """Why a disk refused something, if that is what an error is about. Libraries raise errors of
    their own, so causes and texts are read; in doubt the disk is asked whether it is full.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = _number(seen)
        is_ours = seen is error and _is_beside(seen, where)
        if number is not None and (number in DISK or is_ours):
            return f"{_which(seen, where)}{named(number)}"
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, OSError) and error.errno is not None:
        return None
    there = next(p for p in (where, *where.absolute().parents) if p.exists())
    is_full = shutil.disk_usage(there).free < FULL_BELOW
    return named(errno.ENOSPC) if is_full else None


def _number(error: BaseException) -> int | None:
    """The number of an operating system's error, which its type or its text tells."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = OS_ERROR.search(str(error))
    return int(found[1] or found[2]) if found else None


def _place(error: OSError) -> Path | None:
    """The file that it is about; of a copy, the new one."""
    name = error.filename if error.filename2 is None else error.filename2
    return None if name is None else Path(os.fsdecode(name)).absolute()


def _is_beside(error: BaseException, where: Path) -> bool:
    """Whether it is about an output or a file near it, and not about one that was read."""
    if not isinstance(error, OSError):
        return False
    place = _place(error)
    return place is None or place.is_relative_to(where.absolute().parent)


def _which(error: BaseException, where: Path) -> str:
    """Which file of an output it was, where that is known and says more."""
    place = _place(error) if isinstance(error, OSError) else None
    work, final = temporary(where.absolute()) / FILES, where.absolute()
    if place in (None, work, final):
        return ""
    return f"{place.relative_to(work) if place.is_relative_to(work) else place}: "


def named(number: int) -> str:
    """What an error number means, as a part of a sentence."""
    text = os.strerror(number)
    return text[0].lower() + text[1:]


def sync(path: Path) -> None:
    """Wait until a file or directory is on its disk; some say only then that they are full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(directory: Path) -> None:
    """`sync` a directory with everything in it."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def new_directory_at(path: Path) -> None:
    """Make an empty directory in the place of whatever is there."""
    remove(path)
    path.mkdir(parents=True)


@contextlib.contextmanager
def work_directory(final: Path, waiting: str | None = None) -> Iterator[Path]:
    """An empty directory of this process alone, removed when the block ends; waits as `held`."""
    with writing(final), held(final, waiting) as work:
        new_directory_at(work)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_directory(final: Path, *, is_new: bool = True) -> Iterator[Path]:
    """A directory to fill, which takes its name when the block ends well, and is removed when it
    doesn't. Unless `is_new`, it takes the place of an older one.
    """
    with work_directory(final) as work:
        if is_new:
            check_new(final)  # again: another process may have just made it
        yield work
        sync_all(work)
        if not is_new:
            remove(final)
        os.replace(work, final)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A file to write, which takes its name, or an older one's place, when the block ends well."""
    with writing(final), held(final, "another process writes this; waiting for it") as work:
        remove(work)
        try:
            yield work
            sync(work)
            os.replace(work, final)
        finally:
            remove(work)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with new_file(path) as work, work.open("x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:  # Any: what JSON can hold
    """Write a small JSON file, without secrets, so that it is there whole or not at all."""
    write_text(path, json.dumps(redacted(value), indent=2) + "\n")
