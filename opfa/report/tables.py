"""Tables and results, which print themselves: on a screen, as Markdown and as JSON."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from rich import box
from rich import table as rich_table
from rich.console import Console

from opfa.errors import redacted
from opfa.sparsity.anatomy import layer_labels, short_kinds

ALL = "all"  # the kind that stands for a whole layer
GAP = "  "  # between two columns on a screen
NARROWEST = 12  # letters to which a column of texts may be folded


class Row(BaseModel):
    """A row of a result. `column` fields are shown by `Table.of`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def column(  # Any: of any field
    head: str, style: str = "", scale: float = 1.0, default: Any = ...
) -> Any:
    """A field that is a column: its head, how its value is formatted, and times what."""
    return Field(default, title=head, json_schema_extra={"style": style, "scale": scale})


@dataclass(frozen=True)
class Table:
    """A table of texts. Columns from `numbers_from` on are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers_from: int | None = None

    @classmethod
    def of(cls, head: str, rows: Mapping[str, Row]) -> "Table":
        """One line for each row; the first column has their names."""
        fields = type(next(iter(rows.values()))).model_fields
        columns = {name: field for name, field in fields.items() if field.title}
        lines = [
            (label, *(_cell(getattr(row, name), field) for name, field in columns.items()))
            for label, row in rows.items()
        ]
        return cls((head, *(str(field.title) for field in columns.values())), lines, "", 1)

    def console(self, width: int) -> rich_table.Table:
        """The table for a screen of so many columns. Texts and heads are folded where they must
        be; numbers never are, and nothing is cut: a table of many numbers may be wider.
        """
        shown = rich_table.Table(
            box=box.SIMPLE_HEAD, title=self.title or None, pad_edge=False, collapse_padding=True
        )
        widths = self._widths(width - len(GAP) * len(self.head))
        for name, is_number, size in zip(self.head, self._are_numbers(), widths, strict=True):
            side = "right" if is_number else "left"
            shown.add_column(name, justify=side, overflow="fold", width=size)
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def _widths(self, available: int) -> list[int]:
        """Letters for each column, the widest made smaller until all have place."""
        widths, least = [], []
        columns = zip(self.head, *self.rows, strict=True)
        for (head, *cells), is_number in zip(columns, self._are_numbers(), strict=True):
            longest, word = max(map(len, cells), default=0), max(map(len, head.split()), default=0)
            widths.append(max(longest, len(head)))
            least.append(max(word, longest if is_number else min(longest, NARROWEST)))
        while sum(widths) > available:
            spare = [width - few for width, few in zip(widths, least, strict=True)]
            if not any(spare):
                break
            # the widest of those that can give something
            index = max(range(len(widths)), key=lambda i: (spare[i] > 0, widths[i]))
            widths[index] -= 1
        return widths

    def markdown(self) -> str:
        """The table in Markdown. Cells are Markdown already."""
        rules = ["---:" if is_number else "---" for is_number in self._are_numbers()]
        lines = [f"| {' | '.join(row)} |" for row in (self.head, *self.rows)]
        return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])

    def _are_numbers(self) -> list[bool]:
        start = len(self.head) if self.numbers_from is None else self.numbers_from
        return [index >= start for index in range(len(self.head))]


def _cell(value: Any, field: FieldInfo) -> str:  # Any: of any field
    how: Any = field.json_schema_extra
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value)
    return format(value if how["scale"] == 1 else how["scale"] * value, how["style"])


class LayerKinds(Row):
    """A numbered layer, with a share for each kind of matrix in it."""

    stack: str
    layer: int
    kinds: dict[str, float]

    def shares(self) -> dict[str, float]:
        """What its line in a table shows."""
        return self.kinds


def layer_table(title: str, layers: Sequence[LayerKinds]) -> Table:
    """One line for each layer, in percent."""
    rows = [layer.shares() for layer in layers]
    kinds = short_kinds(kind for row in rows for kind in row if kind != ALL)
    kinds |= {ALL: ALL} if ALL in rows[0] else {}
    labels = layer_labels([(layer.stack, layer.layer) for layer in layers])
    cells = [
        [label, *(f"{100 * row[kind]:.2f}" if kind in row else "" for kind in kinds)]
        for label, row in zip(labels, rows, strict=True)
    ]
    return Table(("layer", *kinds.values()), cells, title, numbers_from=1)


class Result(Row):
    """What a command found. `parts` says how it looks; everything else follows."""

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """Tables and lines, in their order; `is_long` asks for every detail."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.model_dump()

    def show(self, *, as_json: bool = False, is_long: bool = False) -> None:
        """Print it."""
        print_json(self.values()) if as_json else show(self.parts(is_long=is_long))

    def markdown(self) -> str:
        """The same as a piece of a Markdown page."""
        parts = (p if isinstance(p, str) else p.markdown() for p in self.parts())
        return "\n\n".join(parts)

    def __str__(self) -> str:
        """What the command prints, for a screen of 80 columns."""
        console = Console(markup=False, file=io.StringIO(), width=80)
        with console.capture() as captured:
            for part in self.parts():
                console.out(part) if isinstance(part, str) else console.print(part.console(80))
        return captured.get().rstrip("\n")

    def _repr_markdown_(self) -> str:  # how a notebook shows it
        return self.markdown()


def show(parts: Iterable[Table | str]) -> None:
    """Print tables and lines on a screen."""
    console = Console(markup=False)
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            table = part.console(console.width)
            needed = sum((column.width or 0) + len(GAP) for column in table.columns)
            Console(markup=False, width=max(needed, console.width)).print(table)


def print_json(value: Any) -> None:  # Any: what JSON can hold
    """Print a value as JSON, without secrets."""
    print(redacted(json.dumps(value, indent=2)))


def figure(mean: float, deviation: float | None) -> str:
    """A metric, with its deviation over seeds where there are several."""
    digits = 2 if abs(mean) > 1.0 else 4  # SQuAD's are 0..100
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
