"""Matrices in the form that the kernels read: live weights by blocks of rows and tiles of columns.

In a block and tile each row that lives has one visit: its number in the block and how many weights
live there, by falling count, so that a loop's length seldom changes. For AMX a matrix in bf16 or
int8 is masks of rows and live weights instead. A matrix in fp32 with too few zeros to gain stays
dense, in panels of six rows.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opfa.runtime.library import DTYPES, PANEL, Matrix, level, library

BLOCK, COLUMNS = 128, 192  # rows of a block, columns of a tile; both fit in a byte
SIDE, ROW = 16, 64  # rows and bytes of a tile of AMX
MOST_DENSITY = 0.5  # with more live weights the dense product is faster
VALUES = {"float32": "fp32", "uint16": "bf16", "int8": "int8"}  # by the type of the array
Floats = NDArray[np.float32]
WRONG = {  # what `opfa_check` says
    1: "sizes of blocks and tiles",
    2: "first visits",
    3: "first live weights of blocks",
    4: "visits",
    5: "columns",
}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A matrix [rows, columns] for the kernels; `block` is 0 where it is dense."""

    rows: int
    columns: int
    num_live: int
    block: int
    tile: int
    dtype: int  # of `library.DTYPES`
    arrays: dict[str, NDArray]  # by the names of `library.Matrix`

    @property
    def density(self) -> float:
        """The share of weights that live."""
        return self.num_live / (self.rows * self.columns)

    @property
    def num_bytes(self) -> int:
        """What the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    def as_struct(self, **vectors: int | None) -> Matrix:
        """What the kernels read; it points to the arrays, and to vectors of rows beside them."""
        assert all(array.flags.c_contiguous for array in self.arrays.values()), "kernels read rows"
        names = ("rows", "columns", "block", "tile", "dtype")
        arrays = {name: array.ctypes.data for name, array in self.arrays.items()}
        return Matrix(**{name: getattr(self, name) for name in names}, **arrays, **vectors)


def pack(weight: NDArray) -> Packed:
    """A weight [out, in] with its zeros left out, as fp32, bf16 (bits as uint16) or int8.

    In fp32 it is packed dense if more than `MOST_DENSITY` of it lives. On a CPU with AMX, bf16 and
    int8 are packed by masks.
    """
    dtype = VALUES[weight.dtype.name]
    num_live = int(np.count_nonzero(weight != 0))
    sizes = {"rows": weight.shape[0], "columns": weight.shape[1], "num_live": num_live}
    sizes["dtype"] = DTYPES.index(dtype)
    if dtype == "fp32" and num_live > MOST_DENSITY * weight.size:
        return Packed(**sizes, block=0, tile=0, arrays={"values": _panels(weight)})
    if dtype != "fp32" and level() == "amx":
        return Packed(**sizes, block=BLOCK, tile=ROW // weight.itemsize, arrays=_masks(weight))
    return Packed(**sizes, block=BLOCK, tile=COLUMNS, arrays=visits(weight, BLOCK, COLUMNS))


def for_this_cpu(matrix: Packed) -> Packed:
    """A matrix in the form that this CPU's kernels read. It is the same one, unless it was packed
    on a CPU that reads the other form.
    """
    is_by_masks, wants_masks = "masks" in matrix.arrays, level() == "amx"
    if not (matrix.block and matrix.dtype) or is_by_masks == wants_masks:
        return matrix
    return pack(_by_masks(matrix) if is_by_masks else _by_visits(matrix))


def _by_masks(matrix: Packed) -> NDArray:
    """The dense weight [rows, columns] of a matrix that is packed by masks."""
    masks, values = matrix.arrays["masks"], matrix.arrays["values"]
    is_live = np.unpackbits(masks, axis=-1, bitorder="little").astype(bool)
    ordered = np.zeros(is_live.shape, values.dtype)
    ordered[is_live] = values[: matrix.num_live]
    whole = ordered.transpose(0, 2, 1, 3).reshape(len(masks) * SIDE, -1)
    return np.ascontiguousarray(whole[: matrix.rows, : matrix.columns])


def _by_visits(matrix: Packed) -> NDArray:
    """The dense weight [rows, columns] of a matrix that is packed by visits."""
    arrays, tiles = matrix.arrays, -(-matrix.columns // matrix.tile)
    visits = np.diff(arrays["starts"].astype(np.int64))
    block, tile = np.divmod(np.repeat(np.arange(len(visits)), visits), tiles)
    row, count = block * matrix.block + arrays["visits"][:, 0], arrays["visits"][:, 1]
    column = np.repeat(tile * matrix.tile, count) + arrays["indices"]
    weight = np.zeros((matrix.rows, matrix.columns), arrays["values"].dtype)
    weight[np.repeat(row, count), column] = arrays["values"]
    return weight


def _masks(weight: NDArray) -> dict[str, NDArray]:
    """By groups of 16 rows and tiles of 64 bytes: a mask of each row, and the live weights."""
    columns = ROW // weight.itemsize
    groups, tiles = -(-weight.shape[0] // SIDE), -(-weight.shape[1] // columns)
    padded = np.zeros((groups * SIDE, tiles * columns), weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    ordered = padded.reshape(groups, SIDE, tiles, columns).transpose(0, 2, 1, 3)
    is_live = ordered != 0
    masks = np.packbits(is_live, axis=-1, bitorder="little")
    entries = _sums(is_live.sum((1, 2, 3)))
    return {
        "masks": np.ascontiguousarray(masks),
        "entries": entries,
        "values": np.append(ordered[is_live], np.zeros(ROW, weight.dtype)),  # rows are read whole
    }


def _panels(weight: Floats) -> Floats:
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // PANEL), PANEL, columns), np.float32)
    padded.reshape(-1, columns)[:rows] = weight
    return np.ascontiguousarray(padded.transpose(0, 2, 1))


def visits(weight: NDArray, block: int, tile: int) -> dict[str, NDArray]:
    """Live weights in rows of `block` and columns of `tile`, at most 255 of each."""
    num_rows, num_columns = weight.shape
    blocks, tiles = -(-num_rows // block), -(-num_columns // tile)
    is_live = weight != 0
    places = np.flatnonzero(is_live)  # a visit's weights stand together here, by rising column
    first = np.arange(0, num_columns, tile)
    counts = np.add.reduceat(is_live, first, axis=1, dtype=np.int64).reshape(-1)
    begins = np.cumsum(counts) - counts
    row, place = np.divmod(np.arange(num_rows * tiles), tiles)
    order = np.lexsort((row, -counts, place, row // block))
    order = order[counts[order] > 0]
    row, place, counts, begins = row[order], place[order], counts[order], begins[order]
    moved = np.repeat(begins - (np.cumsum(counts) - counts), counts)
    places = places[moved + np.arange(len(places))]
    per_block = np.bincount(row // block, counts, minlength=blocks).astype(np.int64)
    return {
        "starts": _sums(np.bincount(row // block * tiles + place, minlength=blocks * tiles)),
        "entries": _sums(per_block),
        "visits": np.stack([row % block, counts], 1).astype(np.uint8),
        "indices": (places % num_columns % tile).astype(np.uint8),
        "values": weight.reshape(-1)[places],
    }


def _sums(counts: NDArray) -> NDArray[np.uint32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)


def check(matrix: Packed) -> None:
    """Raise `ValueError` unless the kernels stay inside of a matrix' arrays, whoever made them."""
    if not 0 <= matrix.num_live <= matrix.rows * matrix.columns:
        raise ValueError(
            f"has {matrix.num_live:,} live weights of {matrix.rows * matrix.columns:,}"
        )
    if (matrix.block == 0) != (matrix.tile == 0):
        raise ValueError(f"block = {matrix.block}, tile = {matrix.tile}: both are 0, or none")
    if not matrix.block and matrix.dtype:
        raise ValueError(f"is dense in {DTYPES[matrix.dtype]}")
    kinds = _kinds(matrix)
    if set(matrix.arrays) != set(kinds):
        raise ValueError(f"has {', '.join(sorted(matrix.arrays))}, not {', '.join(sorted(kinds))}")
    for name, (dtype, *shape) in kinds.items():
        found = matrix.arrays[name]
        if found.dtype != dtype or found.shape != tuple(shape) or not found.flags.c_contiguous:
            what = f"{np.dtype(dtype)} {shape}"
            raise ValueError(f"{name}: is {found.dtype} {list(found.shape)}, not {what}")
    if matrix.block:
        struct, visits = matrix.as_struct(), len(matrix.arrays.get("visits", ()))
        if wrong := library().opfa_check(ctypes.byref(struct), visits, matrix.num_live):
            raise ValueError(f"{WRONG[wrong]}: can't be right")


def _kinds(matrix: Packed) -> dict[str, list]:
    """The type and the shape that each array must have."""
    rows, columns = matrix.rows, matrix.columns
    if not matrix.block:
        return {"values": [np.float32, -(-rows // PANEL), columns, PANEL]}
    blocks, tiles = -(-rows // matrix.block), -(-columns // matrix.tile)
    value = [np.float32, np.uint16, np.int8][matrix.dtype]
    if "masks" in matrix.arrays:
        groups, size = -(-rows // SIDE), ROW // np.dtype(value).itemsize
        return {
            "masks": [np.uint8, groups, -(-columns // size), SIDE, size // 8],
            "entries": [np.uint32, groups + 1],
            "values": [value, matrix.num_live + ROW],
        }
    return {
        "starts": [np.uint32, blocks * tiles + 1],
        "entries": [np.uint32, blocks + 1],
        "visits": [np.uint8, len(matrix.arrays.get("visits", ())), 2],
        "indices": [np.uint8, matrix.num_live],
        "values": [value, matrix.num_live],
    }
