"""Features of a split in Arrow's memory, from where plain Python numbers and lists are read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import pyarrow
import torch

Row = dict[str, Any]  # Any: a number, or lists of them
SMALL = {  # of a token; all else stays int64 or double
    "input_ids": pyarrow.int32(),
    "token_type_ids": pyarrow.int8(),
    "attention_mask": pyarrow.int8(),
}
PIECE = 1_000  # rows of a column that become Python's at once


class Column(Sequence[Any]):  # Any: a number, or lists of them
    """A column. Its values become Python's a piece at a time: all at once would take gigabytes."""

    def __init__(self, array: pyarrow.ChunkedArray) -> None:
        """Its values."""
        self._array = array

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:  # Any: an int or a slice, a value or a list
        """One value, or those of a slice."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._array.slice(start, max(0, stop - start)).to_pylist()[::step]
        return self._array[index].as_py()

    def __iter__(self) -> Iterator[Any]:
        """All values, in order."""
        for start in range(0, len(self), PIECE):
            yield from self._array.slice(start, PIECE).to_pylist()


class Rows(torch.utils.data.Dataset[Row]):
    """A table of features."""

    def __init__(self, table: pyarrow.Table) -> None:
        """Rows of a table whose columns are in one piece each."""
        self._table = table

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Sequence[Any]]]) -> "Rows":
        """The rows of columns that come in parts."""
        tables = [
            pyarrow.table({name: _array(name, values) for name, values in part.items()})
            for part in parts
        ]
        return cls(pyarrow.concat_tables(tables).combine_chunks())

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, in their order."""
        return self._table.column_names

    def select_columns(self, names: Sequence[str]) -> "Rows":
        """The same rows with some of the columns."""
        return Rows(self._table.select(list(names)))

    def __len__(self) -> int:
        """How many rows there are."""
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: str) -> Column: ...
    def __getitem__(self, index: int | str) -> Row | Column:
        """One row, or a whole column."""
        if isinstance(index, str):
            return Column(self._table.column(index))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Some rows, in this order; torch's loaders ask so."""
        return self._table.take(list(indices)).to_pylist()


def _array(name: str, values: Sequence[Any]) -> pyarrow.Array:
    found = pyarrow.array(values)
    return found.cast(_narrowed(found.type, SMALL.get(name)))


def _narrowed(kind: pyarrow.DataType, leaf: pyarrow.DataType | None) -> pyarrow.DataType:
    """The type with another one in its innermost lists. Where all lists are empty it has none."""
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_narrowed(kind.value_type, leaf))
    return leaf or (pyarrow.int64() if pyarrow.types.is_null(kind) else kind)
