"""Matrices in the form that the kernels read: live weights by blocks of rows and tiles of columns.

In a block and tile each row that lives has one visit: its number in the block and how many weights
live there, by falling count, so that a loop's length seldom changes. A matrix with too few zeros to
gain stays dense, in panels of six rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opfa.runtime.library import DTYPES, PANEL

BLOCK, COLUMNS = 128, 192  # rows of a block, columns of a tile; both fit in a byte
MOST_DENSITY = 0.5  # with more live weights the dense product is faster
Floats = NDArray[np.float32]


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
    dtype = DTYPES[{"float32": 0, "uint16": 1, "int8": 2}[weight.dtype.name]]
    num_live = int(np.count_nonzero(weight))
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
    row, column = np.nonzero(weight)
    block, tile = row // BLOCK, column // COLUMNS
    visit = row * tiles + tile
    count = np.bincount(visit, minlength=num_rows * tiles)[visit]
    order = np.lexsort((column, row, -count, tile, block))
    row, column, visit, count = row[order], column[order], visit[order], count[order]
    is_first = np.diff(visit, prepend=-1) != 0
    places = (row // BLOCK * tiles + column // COLUMNS)[is_first]
    return {
        "starts": _sums(np.bincount(places, minlength=blocks * tiles)),
        "entries": _sums(np.bincount(row // BLOCK, minlength=blocks)),
        "visits": np.stack([row % BLOCK, count], 1)[is_first].astype(np.uint8),
        "indices": (column % COLUMNS).astype(np.uint8),
        "values": np.ascontiguousarray(weight[row, column]),
    }


def _sums(counts: NDArray) -> NDArray[np.uint32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
