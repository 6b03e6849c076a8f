"""Records from local files, read strictly: a bad one is named by file and line, and none is skipped
unless the caller says so.

JSON Lines, CSV, TSV, Parquet, plain text (documents parted by empty lines) and CoNLL's tagged words
(one a line, sentences parted by empty lines); .gz and .zst where the format is text.
"""

import csv
import glob
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet as parquet

from opfa.errors import DataError, first_line

UNREADABLE = (OSError, EOFError, ValueError, csv.Error, zlib.error, pyarrow.ArrowException)
Record = dict[str, Any]  # Any: whatever the file holds
Bad = Callable[[DataError], None]  # what to do about a bad record; returning skips it


def stop(error: DataError) -> None:
    """Skip nothing."""
    raise error


def _zstandard(file: Path, _: str) -> pyarrow.NativeFile:
    # Arrow's reader, since `zstandard.open` takes a file that was cut off for a whole one.
    return pyarrow.input_stream(str(file), compression="zstd")


COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".zst": _zstandard}  # Any: stubs disagree


class Csv(csv.excel):
    """Comma-separated values; an unfinished quotation is a mistake."""

    strict = True


class Tsv(csv.excel_tab):
    """Tab-separated values as GLUE's: a quotation mark is a character like any other."""

    quoting = csv.QUOTE_NONE


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files that paths or glob patterns name, sorted within a pattern; each must name at least
    one.
    """
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file")
        files += [Path(match) for match in matches]
    return files


def read_records(file: Path, bad: Bad = stop) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with where it stands ("line 7").

    Raises `DataError` for a file that can't be read; `bad` decides about a single record.
    """
    suffixes = [s for s in file.suffixes if s not in COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        raise DataError(
            f"{file}: unknown kind of file; known are {', '.join(READERS)}, and .gz or .zst of text"
        )
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    is_empty = True
    try:
        for number, record in READERS[kind](file, bad):
            is_empty = False
            yield f"line {number}", record
    except UNREADABLE as error:
        raise DataError(f"{file}: can't be read: {first_line(error)}") from error
    if is_empty:
        raise DataError(f"{file}: is empty")


def _open(file: Path) -> TextIO:
    stream = COMPRESSED.get(file.suffix, open)(file, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _json_lines(file: Path, bad: Bad) -> Iterator[tuple[int, Record]]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "\\ud" in line.lower():  # half a surrogate pair is valid JSON, but no text
                    json.dumps(record, ensure_ascii=False).encode()
            except (json.JSONDecodeError, UnicodeEncodeError) as error:
                bad(DataError(f"{file}, line {number}: malformed JSON: {error}"))
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                bad(DataError(f"{file}, line {number}: not a JSON object"))


def _separated(file: Path, bad: Bad, dialect: type[csv.Dialect]) -> Iterator[tuple[int, Record]]:
    with _open(file) as lines:
        reader = csv.DictReader(lines, dialect=dialect)
        for record in reader:
            if None in record or None in record.values():
                line = reader.line_num
                bad(DataError(f"{file}, line {line}: not as many values as there are columns"))
            else:
                yield reader.line_num, dict(record)


def _text(file: Path, _: Bad) -> Iterator[tuple[int, Record]]:
    with _open(file) as lines:
        paragraph: list[str] = []
        number = start = 1
        for number, line in enumerate(lines, 1):
            if line.strip():
                start = start if paragraph else number
                paragraph.append(line.rstrip("\r\n"))
            elif paragraph:
                yield start, {"text": "\n".join(paragraph)}
                paragraph = []
        if paragraph:
            yield start, {"text": "\n".join(paragraph)}


def _conll(file: Path, bad: Bad) -> Iterator[tuple[int, Record]]:
    """Sentences as `tokens` (the first column) and `tags` (the last)."""
    with _open(file) as lines:
        words: list[list[str]] = []
        start = 1
        for number, line in enumerate(itertools.chain(lines, [""]), 1):
            fields = line.split()
            is_new_document = fields[:1] == ["-DOCSTART-"]
            if len(fields) == 1 and not is_new_document:
                bad(DataError(f"{file}, line {number}: a word without a tag: {fields[0]!r}"))
            elif fields and not is_new_document:
                start = start if words else number
                words.append(fields)
            elif words:
                yield start, {"tokens": [w[0] for w in words], "tags": [w[-1] for w in words]}
                words = []


def _parquet(file: Path, _: Bad) -> Iterator[tuple[int, Record]]:
    number = 0
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record


READERS = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".csv": lambda file, bad: _separated(file, bad, Csv),
    ".tsv": lambda file, bad: _separated(file, bad, Tsv),
    ".parquet": _parquet,
    ".txt": _text,
    ".conll": _conll,
}
