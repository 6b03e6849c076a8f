"""JSON records: one object a line, or in a .json file one array of objects, which is read piece by
piece. A key that stands twice in what is wanted is a mistake: which value counts would be chance.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from opfa.data.lines import BLANK, LARGEST, TOO_LONG, Line, misplaced, open_text, read_lines
from opfa.errors import DataError, first_line, shown

Record = dict[str, Any]  # Any: whatever the file holds
Found = tuple[int, Record | DataError]  # the line, and a record or what is wrong with it
Columns = Collection[str] | None  # those that are wanted; None: all
PIECE = 1 << 20  # characters of an array that are read at once
CUT = 16  # where a piece ends within an escape or a literal, JSON fails so close to the end
BLANKS = re.compile(r"[ \t\r\n]*")
ONE_A_LINE = "JSON Lines have one object a line; a .json file may also hold one array of objects"


class Twice(str):
    """Stands in the place of the values of a key that stands twice; the text is the key."""

    __slots__ = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        made |= {name: Twice(name) for name, count in counts.items() if count > 1}
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(file: Path, columns: Columns) -> Iterator[Found]:
    """The records of a .json file: JSON Lines, or an array of objects."""
    with open_text(file) as text:
        pieces = (text.read(PIECE) for _ in range(LARGEST // PIECE + 1))
        start = next((piece for piece in pieces if piece.strip()), "")
    is_array = start.lstrip().startswith("[")
    return _array(file, columns) if is_array else read_json_lines(file, columns)


def read_json_lines(file: Path, columns: Columns) -> Iterator[Found]:
    """The records of a file with one object a line; empty lines are none."""
    return in_lines(file, read_lines(file), columns)


def in_lines(file: Path, lines: Iterable[Line], columns: Columns) -> Iterator[Found]:
    """The same of lines that are read already; messages are about `file`."""
    hint = f"; {ONE_A_LINE}"  # what is wrong with the first line may be wrong with all
    for number, text, mistake in lines:
        if not (mistake or text.strip()):
            continue
        where = f"{file}, line {number}"
        if mistake:
            problem = f"{mistake}{hint if len(text) > LARGEST else ''}"
            yield number, DataError(f"{where}: {problem}")
            continue
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            is_cut = isinstance(error, json.JSONDecodeError) and not text[error.pos :].strip()
            problem = f"malformed JSON: {first_line(error)}{hint if is_cut else ''}"
            yield number, DataError(f"{where}: {problem}")
        else:
            yield number, _record(where, value, text, columns)
        hint = ""


def _record(where: str, value: object, text: str, columns: Columns) -> Record | DataError:
    """A value that was read from this text, if it is a record; else what is wrong with it."""
    if not isinstance(value, dict):
        hint = f"; {ONE_A_LINE}" if isinstance(value, list) else ""
        return DataError(f"{where}: not a JSON object{hint}")
    wanted = value if columns is None else {n: value[n] for n in columns if n in value}
    if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is valid JSON, but no text
        try:
            json.dumps(list(wanted.values()), ensure_ascii=False).encode()
        except ValueError as error:
            return DataError(f"{where}: malformed JSON: {first_line(error)}")
    values: list[Any] = list(wanted.values())
    while values:
        match values.pop():
            case Twice() as name:
                return DataError(f"{where}: {shown(str(name))} stands twice")
            case dict() as inner:
                values += inner.values()
            case list() as inner:
                values += inner
    return value


class _Pieces:
    """The text of an array, of which only what isn't used yet is held."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self.file, self.stream, self.text, self.place = file, stream, "", 0
        self.line, self.before = 1, 0  # where `place` is: its line, and characters before it there

    def more(self) -> bool:
        """Drop what was used and read on; False at the end of the file."""
        piece = self.stream.read(max(PIECE, len(self.text) - self.place))
        self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)

    def skip(self, stop: int) -> str:
        """Go on to a place in `text`; returns what is before it."""
        last = self.text.rfind("\n", self.place, stop)
        self.before = self.before + stop - self.place if last < 0 else stop - last - 1
        skipped, self.place = self.text[self.place : stop], stop
        self.line += skipped.count("\n")
        return skipped

    def next(self, mark: str = "") -> str:
        """The next character but blanks, skipped if it is `mark`; "" at the end of the file."""
        first, num_blank = self.line, 0
        while True:
            found = BLANKS.match(self.text, self.place)
            assert found is not None, "it matches nothing too"
            num_blank += found.end() - self.place
            self.skip(found.end())
            if num_blank > LARGEST:
                raise DataError(f"{self.file}, line {first}: {BLANK}")
            if self.place < len(self.text):
                begin = self.text[self.place]
                self.skip(self.place + (begin == mark))
                return begin
            if not self.more():
                return ""

    def value(self, columns: Columns) -> Record | DataError:
        """The record that begins here, which is skipped."""
        while True:
            value, problem, num_read = None, "", 0
            try:
                value, stop = DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                problem, num_read = f"malformed JSON: {error.msg}", error.pos - self.place
                stop = len(self.text)
                if error.pos < stop - CUT and not error.msg.startswith("Unterminated string"):
                    raise self.error(problem, num_read) from None
            except (ValueError, RecursionError) as error:
                raise self.error(f"malformed JSON: {first_line(error)}") from None
            size = stop - self.place
            if size > LARGEST:
                raise self.error(TOO_LONG)
            if stop < len(self.text) or not self.more():  # a number may go on in the next piece
                break
        if problem:
            raise self.error(problem, num_read)
        where, line, before = f"{self.file}, line {self.line}", self.line, self.before
        text = self.skip(self.place + size)
        return self._strange(line, before, text) or _record(where, value, text, columns)

    def error(self, problem: str, num_read: int = 0) -> DataError:
        """What is wrong after so many characters more, unless one of them isn't text at all."""
        seen = self.text[self.place : self.place + num_read + 1]
        line = self.line + seen.count("\n", 0, num_read)
        strange = self._strange(self.line, self.before, seen)
        return strange or DataError(f"{self.file}, line {line}: {problem}")

    def _strange(self, line: int, before: int, text: str) -> DataError | None:
        """What has no place in a text; `before` characters are in front of it in its line."""
        for number, part in enumerate(text.split("\n") if misplaced(text) else (), line):
            if mistake := misplaced(part, before if number == line else 0):
                return DataError(f"{self.file}, line {number}: {mistake}")
        return None


def _array(file: Path, columns: Columns) -> Iterator[Found]:
    """The objects of an array. Where it is malformed, nothing after that can be read."""
    with open_text(file) as stream:
        pieces = _Pieces(file, stream)
        pieces.next("[")
        begin = pieces.next()
        while begin != "]":
            line = pieces.line
            yield line, pieces.value(columns)
            begin = pieces.next(",")
            if begin not in (",", "]"):
                what = repr(begin) if begin else "the end of the file"
                raise pieces.error(f"malformed JSON: {what} instead of ','")
            if begin == ",":
                pieces.next()
        pieces.next("]")
        if rest := pieces.next():
            raise pieces.error(f"malformed JSON: {rest!r} after the end of the array")
