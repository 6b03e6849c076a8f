"""Rows of a Parquet file: only the wanted columns, few rows at a time. Texts stay in the file's own
dictionary until their row is looked at, since a small file can hold more than any memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.compute import call_function
from pyarrow.parquet import ParquetFile

from opfa.data.json_records import Columns, Found, Record
from opfa.data.lines import LARGEST
from opfa.errors import DataError, opening, shown

ROWS = 1_000  # that are decoded at once
BUFFER = 1 << 20  # bytes of a column that are held
LISTS = (pyarrow.ListArray, pyarrow.LargeListArray, pyarrow.FixedSizeListArray)
TOO_LARGE = f"holds more than {LARGEST:,} bytes, which is the most that one record may have"


def read_parquet(file: Path, columns: Columns) -> Iterator[Found]:
    """The rows of a file. A column that isn't wanted is None: it may fit no Python object."""
    with ParquetFile(file) as table:
        schema = table.schema_arrow
        wanted = list(dict.fromkeys(schema.names if columns is None else columns))
        if twice := [name for name in wanted if schema.names.count(name) > 1]:
            raise DataError(f"{file}: column {shown(twice[0])} stands twice")
        wanted = [name for name in wanted if name in schema.names]
        texts = _texts(table, wanted)
    number = 0
    with ParquetFile(file, read_dictionary=texts, buffer_size=BUFFER) as table:
        for some in table.iter_batches(ROWS, columns=wanted):
            batch = some.select(wanted)
            for row in _rows(batch, schema) or _one_by_one(file, batch, number + 1):
                number += 1
                is_bad = isinstance(row, DataError)
                yield number, row if is_bad else dict.fromkeys(schema.names) | row


def _rows(batch: pyarrow.RecordBatch, schema: pyarrow.Schema) -> list[Record] | None:
    """All rows of a batch at once, which is fast; None where one of them may be bad."""
    if _size(batch) > LARGEST:
        return None
    try:
        fields = [schema.field(name) for name in batch.schema.names]
        return batch.cast(pyarrow.schema(fields)).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError):
        return None


def _one_by_one(file: Path, batch: pyarrow.RecordBatch, first: int) -> Iterator[Record | DataError]:
    for index in range(batch.num_rows):
        where = f"{file}, line {first + index}"
        try:
            if _size(batch.slice(index, 1)) > LARGEST:
                raise DataError(f"{where}: {TOO_LARGE}")
            with opening(where, DataError):
                names = batch.schema.names
                row = {name: batch.column(name)[index].as_py() for name in names}
            yield row
        except DataError as error:
            yield error


def _texts(table: ParquetFile, wanted: list[str]) -> list[str]:
    leaves = map(table.schema.column, range(len(table.schema)))
    texts = [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type in ("STRING", "NONE")
    ]
    return [path for path in texts if path in wanted or path.split(".")[0] in wanted]


def _size(array: Any) -> int:  # Any: pyarrow's stubs know no common class of all arrays
    """Bytes of a batch, or of an array, when every text in it is written out."""
    if isinstance(array, pyarrow.RecordBatch):
        return sum(map(_size, array.columns))
    if isinstance(array, pyarrow.DictionaryArray):
        lengths = call_function("binary_length", [array.dictionary])
        return call_function("sum", [lengths.take(array.indices)]).as_py() or 0
    if pyarrow.types.is_struct(array.type):
        return sum(map(_size, array.flatten()))
    if isinstance(array, pyarrow.MapArray):
        return _size(array.keys) + _size(array.items)
    if isinstance(array, LISTS):
        return _size(array.flatten())
    return array.nbytes
