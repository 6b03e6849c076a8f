"""Matrices in the form that the kernels read: live weights by blocks of rows and tiles of columns.

In a block and tile each row that lives has one visit: its number in the block and how many weights
live there, by falling count, so that a loop's length seldom changes. A matrix with too few zeros to
gain stays dense, in panels of six rows.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opfa.runtime.library import DTYPES, PANEL, Matrix, library

BLOCK, COLUMNS = 128, 192  # rows of a block, columns of a tile; both fit in a byte
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


def pack(weight: NDArray, *, most_density: float = MOST_DENSITY) -> Packed:
    """A weight [out, in] with its zeros left out, as fp32, bf16 (bits as uint16) or int8.

    In fp32 it is packed dense if more than `most_density` of it live.
    """
    dtype = VALUES[weight.dtype.name]
    num_live = int(np.count_nonzero(weight != 0))
    sizes = {"rows": weight.shape[0], "columns": weight.shape[1], "num_live": num_live}
    sizes["dtype"] = DTYPES.index(dtype)
    if dtype == "fp32" and num_live > most_density * weight.size:
        return Packed(**sizes, block=0, tile=0, arrays={"values": _panels(weight)})
    return Packed(**sizes, block=BLOCK, tile=COLUMNS, arrays=_visits(weight))


def _panels(weight: Floats) -> Floats:
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // PANEL), PANEL, columns), np.float32)
    padded.reshape(-1, columns)[:rows] = weight
    return np.ascontiguousarray(padded.transpose(0, 2, 1))


def _visits(weight: NDArray) -> dict[str, NDArray]:
    num_rows, num_columns = weight.shape
    blocks, tiles = -(-num_rows // BLOCK), -(-num_columns // COLUMNS)
    is_live = weight != 0
    places = np.flatnonzero(is_live)  # a visit's weights stand together here, by rising column
    first = np.arange(0, num_columns, COLUMNS)
    counts = np.add.reduceat(is_live, first, axis=1, dtype=np.int64).reshape(-1)
    begins = np.cumsum(counts) - counts
    row, tile = np.divmod(np.arange(num_rows * tiles), tiles)
    order = np.lexsort((row, -counts, tile, row // BLOCK))
    order = order[counts[order] > 0]
    row, tile, counts, begins = row[order], tile[order], counts[order], begins[order]
    moved = np.repeat(begins - (np.cumsum(counts) - counts), counts)
    places = places[moved + np.arange(len(places))]
    per_block = np.bincount(row // BLOCK, counts, minlength=blocks).astype(np.int64)
    return {
        "starts": _sums(np.bincount(row // BLOCK * tiles + tile, minlength=blocks * tiles)),
        "entries": _sums(per_block),
        "visits": np.stack([row % BLOCK, counts], 1).astype(np.uint8),
        "indices": (places % num_columns % COLUMNS).astype(np.uint8),
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
        names = ("rows", "columns", "block", "tile", "dtype")
        sizes = {name: getattr(matrix, name) for name in names}
        struct = Matrix(**sizes, **{name: a.ctypes.data for name, a in matrix.arrays.items()})
        visits = len(matrix.arrays["visits"])
        if wrong := library().opfa_check(ctypes.byref(struct), visits, matrix.num_live):
            raise ValueError(f"{WRONG[wrong]}: can't be right")


def _kinds(matrix: Packed) -> dict[str, list]:
    """The type and the shape that each array must have."""
    rows, columns = matrix.rows, matrix.columns
    if not matrix.block:
        return {"values": [np.float32, -(-rows // PANEL), columns, PANEL]}
    blocks, tiles = -(-rows // matrix.block), -(-columns // matrix.tile)
    return {
        "starts": [np.uint32, blocks * tiles + 1],
        "entries": [np.uint32, blocks + 1],
        "visits": [np.uint8, len(matrix.arrays.get("visits", ())), 2],
        "indices": [np.uint8, matrix.num_live],
        "values": [[np.float32, np.uint16, np.int8][matrix.dtype], matrix.num_live],
    }
