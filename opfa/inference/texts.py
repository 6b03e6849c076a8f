"""Texts of files, of a Hub data set or in memory, that can be read again and again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opfa.data.json_records import Record
from opfa.data.records import expand, no_column, read_records
from opfa.errors import DataError, shown
from opfa.tasks.examples import hub_rows

CHUNK, CHARACTERS = 1_000, 4 << 20  # texts, and characters, that are tokenized at once


@dataclass(frozen=True, kw_only=True)
class HubTexts:
    """A split of a Hub data set."""

    name: str
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Where texts come from. A path may be a glob pattern; a column holds texts or lists of them,
    such as words, each of which is a text by itself.
    """

    in_memory: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    hub: HubTexts | None = None
    columns: tuple[str, ...] = ("text",)

    def __bool__(self) -> bool:
        """Whether any were given; nothing is read."""
        return bool(self.in_memory or self.files or self.hub)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Each text with where it stands; raises `DataError` where there is none."""
        for number, text in enumerate(self.in_memory, 1):
            yield f"text {number}", text
        for file in expand(map(str, self.files)):
            for where, record in read_records(file, columns=self.columns):
                yield from self._of(str(file), where, record)
        if self.hub is not None:
            name, split = self.hub.name, self.hub.split
            _, rows = hub_rows("hub", name, self.hub.config, split, self.columns)
            for where, row in rows:
                yield from self._of(f"{name} [{split}]", where, dict(row))

    def _of(self, source: str, where: str, record: Record) -> Iterator[tuple[str, str]]:
        for column in self.columns:
            if column not in record:
                raise no_column(source, where, record, column, "column")
            value = record[column]
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str):
                    what = f"{column!r} is {shown(text)}, not a text"
                    raise DataError(f"{source}, {where}: {what}")
                yield f"{source}, {where}", text

    def chunks(self) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
        """Places and texts, so many at a time as a tokenizer takes well."""
        places: list[str] = []
        texts: list[str] = []
        size = 0
        for place, text in self:
            places.append(place)
            texts.append(text)
            size += len(text)
            if len(texts) == CHUNK or size > CHARACTERS:
                yield places, texts
                places, texts, size = [], [], 0
        if texts:
            yield places, texts
