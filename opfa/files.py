"""Files that are there whole or not at all, and outputs that are checked before any work is done.

What is not finished is in a temporary place beside the output, `.NAME.incomplete`. It is always
made anew and never through a link, so nothing outside of it can be emptied or overwritten.
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

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_BELOW = 1 << 20  # bytes free; a failed write leaves less than its next block
OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # Rust's words and Python's


def temporary(path: Path) -> Path:
    """The temporary place of an output."""
    return path.with_name(f".{path.name}.incomplete")


def remove(path: Path) -> None:
    """Remove a file, a directory or a link (not what it points to); nothing may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Raise `RunError` unless a new file or directory can be made here, parents included."""
    if _status(path) is not None:
        raise RunError(f"{path}: exists already; give a new name")
    _check_parent(path)


def check_file(path: Path) -> None:
    """Raise `RunError` unless a file can be written here, over an older one if there is one."""
    found = _status(path)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise RunError(f"{path}: is a link; give the file itself")
    if found is not None and not stat.S_ISREG(found.st_mode):
        what = "a directory; give a file" if stat.S_ISDIR(found.st_mode) else "not a plain file"
        raise RunError(f"{path}: is {what}")
    _check_parent(path)


def _status(path: Path) -> os.stat_result | None:
    """What is at a path, links not followed; None where there is nothing."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{str(path)[:200]}: can't be made: {reason}") from error


def _check_parent(path: Path) -> None:
    """Make a nameless file in the nearest directory that is there: rights, quotas and read-only
    disks all say no to that.
    """
    missing = [temporary(path)]
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            break
        missing.append(parent)
    else:
        raise RunError(f"{path}: can't be made")
    try:
        most = os.pathconf(parent, "PC_NAME_MAX")
        if long := [each for each in missing if len(os.fsencode(each.name)) > most]:
            raise RunError(f"{str(long[0])[:200]}: can't be made: its name is too long")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{path}: can't be made: {parent}: {reason}") from error


@contextlib.contextmanager
def writing(where: Path, kept: str = "nothing half-written is kept") -> Iterator[None]:
    """Turn what a disk refuses (space, quota, rights, I/O) into one message that says where and
    why, whichever library met it.
    """
    try:
        yield
    except OpfaError:
        raise
    except Exception as error:
        reason = refusal(error, where)
        if reason is None:
            raise
        raise RunError(f"{where}: can't be written: {reason}; {kept}") from error


def refusal(error: BaseException, where: Path) -> str | None:
    """Why a disk refused something, if that is what an error is about.

    torch, safetensors and tokenizers report a disk's refusal as errors of their own. Their texts
    are read, and where those say nothing, the disk is asked whether it is full.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            what = f"{seen.filename}: " if seen.filename not in (None, str(where)) else ""
            return f"{what}{named(seen.errno)}"
        if found := OS_ERROR.search(str(seen)):
            return named(int(found[1] or found[2]))
        seen = seen.__cause__ or seen.__context__
    there = next(p for p in (where, *where.absolute().parents) if p.exists())
    is_full = shutil.disk_usage(there).free < FULL_BELOW
    return named(errno.ENOSPC) if is_full else None


def named(number: int) -> str:
    """What an error number means, as a part of a sentence."""
    text = os.strerror(number)
    return text[0].lower() + text[1:]


def new_directory_at(path: Path) -> None:
    """Make an empty directory in the place of whatever is there."""
    remove(path)
    path.mkdir(parents=True)


@contextlib.contextmanager
def work_directory(final: Path) -> Iterator[Path]:
    """An empty temporary directory beside an output, removed when the block ends badly."""
    work = temporary(final)
    with writing(final):
        new_directory_at(work)
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name when the block ends well, in the place of an older
    one, and is removed when it doesn't.
    """
    with work_directory(final) as work:
        yield work
        remove(final)  # of a run that was stopped before it was done
        os.replace(work, final)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A place to write a file, which takes its name when the block ends well, in the place of an
    older one, and is removed when it doesn't.
    """
    work = temporary(final)
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove(work)
        try:
            yield work
            descriptor = os.open(work, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(work, final)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with new_file(path) as work, work.open("x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:  # Any: what JSON can hold
    """Write a small JSON file, without secrets, so that it is there whole or not at all."""
    write_text(path, json.dumps(redacted(value), indent=2) + "\n")
