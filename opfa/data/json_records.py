"""JSON records: one object a line, or, in a .json file, one array of objects.

An array is read piece by piece, so that a file may be larger than the memory. A key that stands
twice in what is wanted is a mistake: which of its values counts would be chance.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from opfa.data.lines import BLANK, LARGEST, TOO_LONG, misplaced, open_text, read_lines
from opfa.errors import DataError, first_line, shown

Record = dict[str, Any]  # Any: whatever the file holds
Found = tuple[int, Record | DataError]  # the line, and a record or what is wrong with it
Columns = Collection[str] | None  # those that are wanted; None: all
PIECE = 1 << 20  # characters of an array that are read at once
CUT = 16  # where a piece ends within an escape or a literal, JSON fails so close to the end
BLANKS = re.compile(r"[ \t\r\n]*")
ONE_A_LINE = "JSON Lines have one object a line; a .json file may also hold one array of objects"


class Twice(dict[str, Any]):
    """An object of which keys stand twice."""

    names: frozenset[str] = frozenset()


class Decoder(json.JSONDecoder):
    """Knows whether a key stood twice in anything that it has read."""

    has_met_twice = False

    def __init__(self) -> None:
        """Nothing was read yet."""
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.has_met_twice = True
            counts = Counter(name for name, _ in pairs)
            made = Twice(made)
            made.names = frozenset(name for name, count in counts.items() if count > 1)
        return made


def read_json(file: Path, columns: Columns) -> Iterator[Found]:
    """The records of a .json file: JSON Lines, or an array of objects."""
    with open_text(file) as text:
        pieces = (text.read(PIECE) for _ in range(LARGEST // PIECE + 1))
        start = next((piece for piece in pieces if piece.strip()), "")
    is_array = start.lstrip().startswith("[")
    return _array(file, columns) if is_array else read_json_lines(file, columns)


def read_json_lines(file: Path, columns: Columns) -> Iterator[Found]:
    """The records of a file with one object a line; empty lines are none."""
    decoder = Decoder()
    hint = f"; {ONE_A_LINE}"  # what is wrong with the first line may be wrong with all
    for number, text, mistake in read_lines(file):
        if not (mistake or text.strip()):
            continue
        where = f"{file}, line {number}"
        if mistake:
            problem = f"{mistake}{hint if len(text) > LARGEST else ''}"
            yield number, DataError(f"{where}: {problem}")
            continue
        try:
            value = decoder.decode(text)
        except (ValueError, RecursionError) as error:
            is_unfinished = (
                isinstance(error, json.JSONDecodeError) and not text[error.pos :].strip()
            )
            problem = f"malformed JSON: {first_line(error)}{hint if is_unfinished else ''}"
            yield number, DataError(f"{where}: {problem}")
        else:
            yield number, _record(where, value, text, columns, decoder)
        hint = ""


def _record(
    where: str, value: object, text: str, columns: Columns, decoder: Decoder
) -> Record | DataError:
    """A value that was read from this text, if it is a record; else what is wrong with it."""
    if not isinstance(value, dict):
        hint = f"; {ONE_A_LINE}" if isinstance(value, list) else ""
        return DataError(f"{where}: not a JSON object{hint}")
    wanted = value.keys() if columns is None else [name for name in columns if name in value]
    try:
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is valid JSON, but no text
            json.dumps([value[name] for name in wanted], ensure_ascii=False).encode()
        values = [value[name] for name in wanted] if decoder.has_met_twice else []
        twice = _twice(values)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: malformed JSON: {first_line(error)}")
    if isinstance(value, Twice):
        twice = value.names.intersection(wanted) or twice
    return DataError(f"{where}: {shown(min(twice))} stands twice") if twice else value


def _twice(value: object) -> frozenset[str]:
    """Keys that stand twice in an object somewhere in a value."""
    if isinstance(value, Twice):
        return value.names
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    nested = (_twice(each) for each in inner if isinstance(each, dict | list))
    return next(filter(None, nested), frozenset())


class _Pieces:
    """The text of an array, of which only what isn't used yet is held."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self.file, self.stream, self.text, self.place = file, stream, "", 0
        self.decoder = Decoder()
        self.line, self.before = 1, 0  # where `place` is: its line, and characters before it there

    def more(self) -> bool:
        """Drop what was used and read on; False at the end of the file."""
        piece = self.stream.read(max(PIECE, len(self.text) - self.place))
        self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)

    def skip(self, stop: int) -> None:
        """Go on to a place in `text`."""
        last = self.text.rfind("\n", self.place, stop)
        self.before = self.before + stop - self.place if last < 0 else stop - last - 1
        self.line += self.text.count("\n", self.place, stop)
        self.place = stop

    def next(self) -> str:
        """The next character that is no blank, which is not skipped; "" at the end of the file."""
        begin, num_blank = self.line, 0
        while True:
            found = BLANKS.match(self.text, self.place)
            assert found is not None, "it matches nothing too"
            num_blank += found.end() - self.place
            self.skip(found.end())
            if num_blank > LARGEST:
                raise DataError(f"{self.file}, line {begin}: {BLANK}")
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def value(self) -> tuple[object, str]:
        """The value that begins here, and its text, which is skipped."""
        while True:
            value, problem, num_read, size = None, None, 0, 0
            try:
                value, stop = self.decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                problem, num_read = f"malformed JSON: {error.msg}", error.pos - self.place
                stop = len(self.text)
                if error.pos < stop - CUT and not error.msg.startswith("Unterminated string"):
                    break
            except (ValueError, RecursionError) as error:
                raise self.error(f"malformed JSON: {first_line(error)}") from None
            size = stop - self.place
            if size > LARGEST:
                raise self.error(TOO_LONG)
            if stop < len(self.text) or not self.more():  # a number may go on in the next piece
                break
        if problem:
            raise self.error(problem, num_read)
        text = self.text[self.place : self.place + size]
        self.skip(self.place + size)
        return value, text

    def error(self, problem: str, num_read: int = 0) -> DataError:
        """What is wrong after so many characters more, unless one of them isn't text at all."""
        seen = self.text[self.place : self.place + num_read + 1]
        line = self.line + seen.count("\n", 0, num_read)
        strange = _misplaced(self.file, self.line, self.before, seen)
        return strange or DataError(f"{self.file}, line {line}: {problem}")


def _array(file: Path, columns: Columns) -> Iterator[Found]:
    """The objects of an array. Where it is malformed, nothing after that can be read."""
    with open_text(file) as stream:
        pieces = _Pieces(file, stream)
        pieces.next()
        pieces.skip(pieces.place + 1)  # the bracket
        is_first = True
        while (begin := pieces.next()) != "]":
            if not is_first and begin == ",":
                pieces.skip(pieces.place + 1)
                pieces.next()
            elif not is_first:
                what = repr(begin) if begin else "the end of the file"
                raise pieces.error(f"malformed JSON: {what} instead of ','")
            is_first = False
            line, before = pieces.line, pieces.before
            value, text = pieces.value()
            strange = _misplaced(file, line, before, text)
            where = f"{file}, line {line}"
            yield line, strange or _record(where, value, text, columns, pieces.decoder)
        pieces.skip(pieces.place + 1)
        if rest := pieces.next():
            raise pieces.error(f"malformed JSON: {rest!r} after the end of the array")


def _misplaced(file: Path, line: int, before: int, text: str) -> DataError | None:
    """What has no place in the text of an array; `before` characters are in front of it in its
    first line.
    """
    if misplaced(text):
        for index, part in enumerate(text.split("\n")):
            if mistake := misplaced(part, 0 if index else before):
                return DataError(f"{file}, line {line + index}: {mistake}")
    return None
