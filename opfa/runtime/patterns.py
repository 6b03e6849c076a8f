"""Where the weights of a matrix live, in the order of the kernels, for training.

Live weights are one vector [live] in the order of the forward pass. The transposed matrix, which
the gradient of the input is computed with, has them in an order of its own.
"""

import itertools
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opfa.runtime.library import Matrix, library
from opfa.runtime.packing import Packed, visits

BLOCK, COLUMNS = 128, 192  # rows of a block, columns of a tile
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """The live places of a mask [rows, columns]."""

    rows: int
    columns: int
    places: Tensor  # [live] int32, in the flattened matrix
    across: Tensor  # [live] int32, of the transposed matrix: where each is in `places`
    matrix: Packed
    transposed: Packed
    number: int = field(default_factory=_numbers.__next__)

    def __post_init__(self) -> None:
        """Let operators find it."""
        PATTERNS[self.number] = self

    @classmethod
    def of(cls, mask: Tensor) -> "Pattern":
        """The pattern of a mask, True where a weight lives."""
        rows, columns = mask.shape
        numbers = np.zeros(mask.shape, np.int32)
        is_live = mask.numpy()
        numbers[is_live] = np.arange(1, int(is_live.sum()) + 1)
        matrix, order = _packed(numbers)
        transposed, across = _packed(np.ascontiguousarray(numbers.T))
        rank = np.empty(len(order) + 1, np.int32)
        rank[order] = np.arange(len(order))
        places = np.flatnonzero(is_live).astype(np.int32)[order - 1]
        return cls(
            rows=rows,
            columns=columns,
            places=torch.from_numpy(places),
            across=torch.from_numpy(rank[across]),
            matrix=matrix,
            transposed=transposed,
        )

    def take(self, whole: Tensor) -> Tensor:
        """The live numbers [live] of a matrix."""
        assert whole.numel() == self.rows * self.columns, "another matrix"
        return take(whole, self.places)

    def put(self, values: Tensor, whole: Tensor) -> None:
        """Write live numbers [live] to their places in a matrix, which must be contiguous."""
        assert whole.is_contiguous() and whole.numel() == self.rows * self.columns, "another matrix"
        values = values.to(whole.dtype).contiguous()
        pointers = (whole.data_ptr(), self.places.data_ptr(), self.num_live, values.data_ptr())
        library().opfa_put(whole.element_size(), *pointers)

    @property
    def num_live(self) -> int:
        """How many weights live."""
        return len(self.places)


PATTERNS: weakref.WeakValueDictionary[int, Pattern] = weakref.WeakValueDictionary()  # by number


def _packed(numbers: NDArray[np.int32]) -> tuple[Packed, NDArray[np.int32]]:
    """A matrix without values, and its numbers in the order of its live places."""
    arrays = visits(numbers, BLOCK, COLUMNS)
    order = arrays.pop("values")
    sizes = {"rows": numbers.shape[0], "columns": numbers.shape[1], "num_live": len(order)}
    return Packed(**sizes, block=BLOCK, tile=COLUMNS, dtype=0, arrays=arrays), order


def take(whole: Tensor, places: Tensor) -> Tensor:
    """The numbers at places (int32) of a tensor that is read as one row."""
    whole = whole.contiguous()
    found = whole.new_empty(len(places))
    pointers = (whole.data_ptr(), places.data_ptr(), len(places), found.data_ptr())
    library().opfa_take(whole.element_size(), *pointers)
    return found


def struct_of(matrix: Packed, values: Tensor, bias: Tensor | None = None) -> Matrix:
    """What the kernels read: a pattern with values in its order."""
    pointers = {"values": values.data_ptr(), "bias": None if bias is None else bias.data_ptr()}
    return matrix.as_struct(**pointers)
