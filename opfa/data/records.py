"""Records from local files, read strictly: a bad one is named by file and line, and none is skipped
unless the caller says so.

JSON Lines, arrays of objects, CSV, TSV, Parquet, documents and CoNLL's tagged words (both parted by
empty lines); .gz and .zst where the format is text. No record may be larger than `LARGEST`.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from opfa.data import json_records
from opfa.data.json_records import Columns, Found, Record, read_json, read_json_lines
from opfa.data.lines import COMPRESSED, LARGEST, TOO_LONG, Line, check_plain, read_lines
from opfa.data.parquet_records import read_parquet
from opfa.errors import DataError, brief, first_line, opening, shown

Bad = Callable[[DataError], None]  # what to do about a bad record; returning skips it
Reader = Callable[[Path, Columns], Iterator[Found]]
UP_TO_EMPTY = "what begins here and ends at the next empty line"
BLANKS = " \t\r\n\f\v"  # those between CoNLL's columns; a no-break space is a part of a word
TABS = re.compile(r"[ \f\v]*\t[ \f\v]*")
ANY_BLANKS = re.compile(f"[{BLANKS}]+")
CSV = {"strict": True}  # an unfinished quotation is a mistake
TABLES = (".csv", ".tsv", ".parquet")  # all records have the columns of a header
SEPARATORS = (";", "\t", ",", "|")
TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # GLUE's: a quotation mark is a character


def stop(error: DataError) -> None:
    """Skip nothing."""
    raise error


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files that paths or glob patterns name, sorted within each one, which must name some."""
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file")
        files += [Path(match) for match in matches]
    return files


def read_records(
    file: Path, bad: Bad = stop, columns: Columns = None
) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with where it stands ("line 7"); `bad` decides about a bad one.
    With `columns`, the others don't matter: records name them, but their values may be None.
    """
    check_plain(file)
    kind = kind_of(file)
    if kind not in READERS:
        known = f"{', '.join(READERS)}, and .gz or .zst of text"
        raise DataError(f"{file}: unknown kind of file; known are {known}")
    yield from read_by(READERS[kind], file, bad, columns)


def kind_of(file: Path) -> str:
    """The ending that says what a file holds, such as ".csv" of a.csv.gz."""
    suffixes = [s for s in file.suffixes if s not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def no_column(source: str, where: str, record: Record, column: str, key: str) -> DataError:
    """The error of a record without a column that `key` names; a table's columns are its header's,
    whose separator may be another than what is read.
    """
    place = "header" if kind_of(Path(source)) in TABLES else where
    there = shown(list(record))[1:-1]
    hint = other_separator(list(record))
    return DataError(f"{source}, {place}: no column {column!r} ({key}); there are {there}{hint}")


def other_separator(header: Sequence[str]) -> str:
    """What may be wrong with a header that is one column; empty where nothing is."""
    marks = [mark for mark in SEPARATORS if len(header) == 1 and mark in header[0]]
    what = "".join(f"; are the columns separated by {mark!r}?" for mark in marks[:1])
    return f"{what} .csv has ',' and .tsv tabs" if what else ""


def read_by(
    reader: Reader, file: Path, bad: Bad = stop, columns: Columns = None
) -> Iterator[tuple[str, Record]]:
    """`read_records` by a reader of one's choice, also of a file that isn't a plain one."""
    is_empty, rows = True, reader(file, columns)
    while True:
        with opening(file, DataError):
            number, found = next(rows, (0, None))
        if found is None:
            break
        if isinstance(found, DataError):
            bad(found)
        else:
            is_empty = False
            yield f"line {number}", found
    if is_empty:
        raise DataError(f"{file}: is empty")


class _CsvLines:
    """The lines of the file for `csv`, which asks for as many as a record has."""

    def __init__(self, file: Path) -> None:
        self.file, self.lines = file, read_lines(file)
        self.begin()

    def begin(self) -> None:
        """A new record begins in the next line."""
        self.first = self.last = self.num_characters = 0
        self.mistake: DataError | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.first, self.last = self.first or line.number, line.number
        self.num_characters += len(line.text)
        if self.num_characters > LARGEST:  # where the next one begins isn't known any more
            raise self.error(f"the record that begins here {TOO_LONG}")
        if line.mistake and self.mistake is None:
            self.mistake = DataError(f"{self.file}, line {line.number}: {line.mistake}")
        return line.text

    def error(self, problem: object) -> DataError:
        """What is wrong with the record."""
        return DataError(f"{self.file}, line {self.first}: {problem}")


def _separated(file: Path, columns: Columns, layout: dict[str, Any]) -> Iterator[Found]:
    lines = _CsvLines(file)
    csv.field_size_limit(LARGEST)  # of the whole process, where nobody wants it smaller
    reader = csv.reader(lines, **layout)
    header: list[str] = []
    has_rows = False
    while True:
        lines.begin()
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise lines.error(f"can't be read: {first_line(error)}") from error
        if values is None:
            if header and not has_rows:
                raise DataError(f"{file}: has a header but no rows")
            return
        if lines.mistake and not header:
            raise lines.mistake
        if not values:
            continue
        has_rows = bool(header)
        if not header:
            header = values
            wanted = header if columns is None else columns
            if twice := [name for name in wanted if header.count(name) > 1]:
                raise lines.error(f"column {shown(twice[0])} stands twice")
        elif lines.mistake:
            yield lines.last, lines.mistake
        elif len(values) != len(header):
            num = f"{len(values)} value{'s' * (len(values) > 1)}"
            problem = f"{num}, and the header has {len(header)}{other_separator(header)}"
            yield lines.last, DataError(f"{file}, line {lines.last}: {problem}")
        else:
            yield lines.last, dict(zip(header, values, strict=True))


def _paragraphs(file: Path, is_end: Callable[[str], bool]) -> Iterator[list[Line] | DataError]:
    """The lines between those that end a record, or what is wrong with the first bad one."""
    lines: list[Line] = []
    num_characters = 0
    is_bad = False
    for line in read_lines(file):
        if is_end(line.text):
            if lines:
                yield lines
            lines, num_characters, is_bad = [], 0, False
        elif not is_bad:
            lines.append(line)
            num_characters += len(line.text)
            number, mistake = line.number, line.mistake
            if not mistake and num_characters > LARGEST:
                number, mistake = lines[0].number, f"{UP_TO_EMPTY} {TOO_LONG}"
            if mistake:
                lines, is_bad = [], True
                yield DataError(f"{file}, line {number}: {mistake}")
    if lines:
        yield lines


def _text(file: Path, _: Columns) -> Iterator[Found]:
    for lines in _paragraphs(file, lambda text: not text.strip()):
        if isinstance(lines, DataError):
            yield 0, lines
        else:
            text = "\n".join(line.text.rstrip("\r\n") for line in lines)
            yield lines[0].number, {"text": text}


def read_texts(file: Path, name: str) -> Iterator[Found]:
    """Each line as a record with its text under this name. Blank lines may stand at the end alone,
    so that the n-th record is the n-th line.
    """
    return _texts(file, read_lines(file), name)


def read_lines_or_json(file: Path, name: str) -> Iterator[Found]:
    """`read_texts`, or JSON Lines if the first line is an object. Raises `DataError` where it is
    the header of a CSV file: a column of it has this name.
    """
    lines = read_lines(file)
    for first in lines:
        start, known = first.text.strip(), chain([first], lines)
        if start.startswith("{") and _is_object(start):
            yield from json_records.in_lines(file, known, None)
            return
        if name in [cell.strip("\"' ") for cell in re.split("[,;\t]", start)]:
            what = f"looks like the header of a table, with the column {name!r}"
            way = "say --input-format csv (or tsv), or lines if each line is one text"
            raise DataError(f"{file}, line 1: {brief(start)!r} {what}; {way}")
        yield from _texts(file, known, name)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _texts(file: Path, lines: Iterable[Line], name: str) -> Iterator[Found]:
    blank = 0
    for number, text, mistake in lines:
        is_blank = not (mistake or text.strip())
        if not is_blank and blank:
            what = "is blank, and each line is one text; remove it, or give CSV or JSON Lines"
            yield blank, DataError(f"{file}, line {blank}: {what}")
            blank = 0
        if mistake:
            yield number, DataError(f"{file}, line {number}: {mistake}")
        elif is_blank:
            blank = blank or number
        else:
            yield number, {name: text.rstrip("\r\n")}


def _conll(file: Path, _: Columns) -> Iterator[Found]:
    """Sentences as `tokens` (the first column) and `tags` (the last), parted by tabs or blanks."""
    columns: re.Pattern[str] | None = None
    for lines in _paragraphs(file, lambda text: text.split(None, 1)[:1] in ([], ["-DOCSTART-"])):
        if isinstance(lines, DataError):
            yield 0, lines
            continue
        columns = columns or (TABS if "\t" in lines[0].text.strip(BLANKS) else ANY_BLANKS)
        words = [columns.split(line.text.strip(BLANKS)) for line in lines]
        alone = [i for i, fields in enumerate(words) if len(fields) == 1]
        if alone:
            problem = f"a word without a tag: {shown(words[alone[0]][0])}"
            yield 0, DataError(f"{file}, line {lines[alone[0]].number}: {problem}")
        else:
            record = {"tokens": [w[0] for w in words], "tags": [w[-1] for w in words]}
            yield lines[0].number, record


READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": lambda file, columns: _separated(file, columns, CSV),
    ".tsv": lambda file, columns: _separated(file, columns, TSV),
    ".parquet": read_parquet,
    ".txt": _text,
    ".conll": _conll,
}
