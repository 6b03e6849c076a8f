"""The lines of a plain or compressed text file, however long the file or one of its lines is.

What is wrong with a line (no UTF-8, a zero byte, too many characters) comes with it, so that a
reader can skip that record.
"""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow

from opfa.errors import DataError, not_plain

# Characters of one record. The Bible has 4 million; with its tokens a record of this size takes
# about 2 GB of memory, and a compressed file of a few kilobytes may hold it.
LARGEST = 16 << 20
TOO_LONG = f"is longer than {LARGEST:,} characters, which is the most that one record may have"
BLANK = f"more than {LARGEST:,} blank characters in a row, which no data have"


class Line(NamedTuple):
    """A line with its end, and what is wrong with it; of one that is too long, only the start."""

    number: int
    text: str
    mistake: str | None


def _zstandard(file: Path, _: str) -> pyarrow.NativeFile:
    # Arrow's reader, since `zstandard.open` takes a file that was cut off for a whole one.
    return pyarrow.input_stream(str(file), compression="zstd")


COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".zst": _zstandard}  # Any: stubs disagree


def check_plain(file: Path) -> None:
    """Raise `DataError` unless this is a plain file, or a link to one."""
    if problem := not_plain(file):
        raise DataError(f"{str(file)[:200]}: {problem}")


def open_text(file: Path) -> TextIO:
    """A text file to be read; bytes that are no UTF-8 are kept as `misplaced` finds them."""
    stream = COMPRESSED.get(file.suffix, open)(file, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_lines(file: Path) -> Iterator[Line]:
    """All lines of a file, numbered from 1, with the end of any system; raises `DataError` where
    blanks go on and on: a few kilobytes may hold hours of empty lines.
    """
    with open_text(file) as lines:
        number = num_blank = 0
        while text := lines.readline(LARGEST + 1):
            number += 1
            is_long = len(text) > LARGEST
            num_blank = num_blank + len(text) if text.isspace() else 0
            if num_blank > LARGEST and not is_long:
                raise DataError(f"{file}, line {number}: {BLANK}")
            yield Line(number, text, TOO_LONG if is_long else misplaced(text))
            while is_long and text and not text.endswith(("\n", "\r")):
                text = lines.readline(LARGEST)


def misplaced(text: str, before: int = 0) -> str | None:
    """What has no place in a line of text, and where; `before` are characters in front of it."""
    if "\0" in text:
        place = before + text.index("\0") + 1
        return f"a zero byte at character {place}; is the file UTF-16? It must be UTF-8"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "surrogateescape" has put U+DCxx for the byte xx
        byte, place = ord(text[error.start]) - 0xDC00, before + error.start + 1
        return f"byte 0x{byte:02X} at character {place} is not UTF-8"
    return None
