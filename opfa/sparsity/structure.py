"""Which structure the zeros of a matrix have: rows, columns, heads, blocks, N:M, all or none.

    lines   nearly all zeros lie in dead rows or columns, nearly everything else lives
    RxC     nearly all zeros fill whole aligned blocks, nearly everything else lives
    N:M     no group of M along the input keeps more than N, and nearly all keep exactly N
    empty   nothing lives

"Nearly" is nine in ten (`REGULAR`): 8 bits round some live weights to zero, and those must not hide
a structure. No structure passes by chance (see README.md). Weights are [output, input].
"""

import math
from dataclasses import dataclass
from itertools import product, takewhile

import torch
from torch import Tensor

REGULAR = 0.9
MIN_WEIGHTS = 8  # fewer zeros, or fewer live weights, may lie anywhere by chance
MIN_GROUPS = 32
GROUPS = (2, 4, 8, 16, 32)  # of N:M
EDGES = (2, 4, 8, 16, 32, 64)  # of blocks


@dataclass(frozen=True)
class Structure:
    """What was found in one mask; `exceptions` are zeros that the pattern doesn't explain."""

    pattern: str
    exceptions: int
    dead_rows: int
    dead_columns: int
    dead_heads: int | None  # None where a matrix has no heads, or their number is not known


def structure_of(mask: Tensor, heads: tuple[int, int] | None = None) -> Structure:
    """The structure of a mask; `heads`: the dimension that heads share, and how many groups."""
    rows, columns = mask.any(1), mask.any(0)
    dead = int((~rows).sum()), int((~columns).sum())
    num_zeros = mask.numel() - int(mask.count_nonzero())
    dead_heads = None
    if heads is not None and len(lines := (rows, columns)[heads[0]]) % heads[1] == 0:
        dead_heads = int((~lines.view(heads[1], -1).any(1)).sum())
    pattern, exceptions = "unstructured" if rows.any() else "empty", 0
    if MIN_WEIGHTS <= num_zeros <= mask.numel() - MIN_WEIGHTS:
        found = (
            _lines(mask, num_zeros, dead, heads, dead_heads)
            or _block(mask, num_zeros)
            or _n_of_m(mask[rows] if dead[0] else mask)
        )
        pattern, exceptions = found or (pattern, exceptions)
    return Structure(pattern, exceptions, *dead, dead_heads)


def _explains(num_inside: int, num_zeros: int, size: int) -> bool:
    """Whether so many zeros inside of a structure are nearly all, and the rest nearly lives."""
    num_outside = num_zeros - num_inside
    is_filled = num_outside <= (1 - REGULAR) * (size - num_inside)
    return num_inside >= REGULAR * num_zeros and is_filled


def _lines(
    mask: Tensor,
    num_zeros: int,
    dead: tuple[int, int],
    heads: tuple[int, int] | None,
    dead_heads: int | None,
) -> tuple[str, int] | None:
    num_live = (mask.shape[0] - dead[0]) * (mask.shape[1] - dead[1])
    num_inside = mask.numel() - num_live
    if not num_inside or not _explains(num_inside, num_zeros, mask.numel()):
        return None
    name = " and ".join(kind for kind, n in zip(("rows", "columns"), dead, strict=True) if n)
    if heads is not None and dead_heads and not dead[1 - heads[0]]:
        lines_per_head = mask.shape[heads[0]] // heads[1]
        name = "heads" if dead_heads * lines_per_head == dead[heads[0]] else name
    return name, num_zeros - num_inside


def _block(mask: Tensor, num_zeros: int) -> tuple[str, int] | None:
    """The largest block that explains the zeros. What a block explains, its parts explain too."""

    def inside(rows: int, columns: int) -> int | None:
        if mask.shape[0] % rows or mask.shape[1] % columns:
            return None
        num_inside = _num_empty(mask, (rows, columns)) * rows * columns
        return num_inside if _explains(num_inside, num_zeros, mask.numel()) else None

    heights = [1, *takewhile(lambda edge: inside(edge, 1) is not None, EDGES)]
    widths = [1, *takewhile(lambda edge: inside(1, edge) is not None, EDGES)]
    sizes = sorted(product(heights, widths), key=math.prod, reverse=True)
    for height, width in sizes[:-1]:
        num_inside = inside(height, width)
        if num_inside is not None:
            return f"block {height}x{width}", num_zeros - num_inside
    return None


def _num_empty(mask: Tensor, block: tuple[int, int]) -> int:
    """How many aligned blocks have no live weight; edges are powers of two."""
    for dimension, edge in enumerate(block):
        for _ in range(edge.bit_length() - 1):
            halves = mask.unflatten(dimension, (-1, 2))
            mask = halves.select(dimension + 1, 0) | halves.select(dimension + 1, 1)
    return mask.numel() - int(mask.count_nonzero())


def _n_of_m(mask: Tensor) -> tuple[str, int] | None:
    """N:M with the smallest M, and how many zeros it has beyond N:M."""
    counts = mask.view(torch.uint8)
    for group in GROUPS:
        if counts.shape[1] % 2:
            return None
        halves = counts.unflatten(1, (-1, 2))
        counts = halves[..., 0] + halves[..., 1]
        kept = int(counts.max())
        if kept == group or counts.numel() < MIN_GROUPS:
            continue
        if int((counts == kept).count_nonzero()) >= REGULAR * counts.numel():
            return f"{kept}:{group}", int((kept - counts).sum())
    return None
