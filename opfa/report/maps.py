"""Masks for a page: small enough for a file, exact where they fit, and what heads are left.

A matrix is one blob, compressed by deflate: live weights of each row and of each column (uint32,
little-endian), then the mask. It is packed, one bit a weight, row after row. Where all matrices
together would be larger than `BUDGET`, it is live weights of tiles (uint16, row after row) instead.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from opfa.sparsity.anatomy import NumHeads, heads_of, layer_of

BUDGET = 24 << 20  # bytes of all blobs; BERT-large needs 18 at 90 % and 23 at 85 %
EDGES = (1, 4, 8, 16, 32, 64, 128)  # of tiles
THUMBNAIL = 32  # tiles of a small picture, in each direction
PARTS = ("query", "key", "value", "output")
THROUGH = ("value", "output")  # without either of them nothing gets through a head


@dataclass(frozen=True)
class Head:
    """The share of live weights in each matrix that a head has a part of, and in all of them."""

    shares: Mapping[str, float]
    density: float

    @property
    def is_gone(self) -> bool:
        """Whether nothing gets through it."""
        return any(self.shares.get(part) == 0.0 for part in THROUGH)


def packed(masks: Mapping[str, Tensor], budget: int = BUDGET) -> tuple[int, dict[str, bytes]]:
    """The edge of tiles (1: single weights), and a blob for each mask [out, in]."""
    for edge in EDGES:
        blobs, left = {}, budget
        for name, mask in masks.items():
            blobs[name] = _blob(mask.numpy(), edge)
            left -= len(blobs[name])
            if left < 0 and edge < EDGES[-1]:
                break
        else:
            return edge, blobs
    raise AssertionError("the coarsest tiles are taken whatever they need")


def thumbnails(masks: Mapping[str, Tensor]) -> bytes:
    """Of each mask in turn 32 x 32 densities (uint8, 255 is all), compressed by deflate."""
    maps = [_density(mask.numpy(), THUMBNAIL) for mask in masks.values()]
    return zlib.compress(np.stack(maps).tobytes(), 9) if maps else b""


def heads(masks: Mapping[str, Tensor], num_heads: NumHeads) -> dict[tuple[str, int], list[Head]]:
    """By (stack, layer): what is left of each head."""
    found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name, mask in masks.items():
        layer, place = layer_of(name), heads_of(name, num_heads)
        if layer is None or place is None or mask.shape[place[0]] % place[1]:
            continue
        lines = mask.numpy().mean(1 - place[0], dtype=np.float64)
        count = num_heads.of(name)
        shares = lines.reshape(place[1] // count, count, -1).mean(2)
        parts = found.setdefault((layer.stack, layer.number), {})
        names = PARTS[:3] if len(shares) == 3 else [_part(layer.kind, place[0])]
        parts.update(zip(names, shares, strict=True))
    return {
        key: [_head(parts, index) for index in range(len(next(iter(parts.values()))))]
        for key, parts in sorted(found.items())
    }


def _head(parts: Mapping[str, np.ndarray], index: int) -> Head:
    shares = {part: float(parts[part][index]) for part in PARTS if part in parts}
    return Head(shares, sum(shares.values()) / len(shares))  # its matrices are of one size


def _part(kind: str, dimension: int) -> str:
    if dimension == 1:
        return "output"
    words = {"query": ("query", "q_"), "key": ("key", "k_")}
    last = kind.rpartition(".")[2]
    return next((part for part, starts in words.items() if last.startswith(starts)), "value")


def _blob(mask: np.ndarray, edge: int) -> bytes:
    lines = [mask.sum(axis, dtype="<u4").tobytes() for axis in (1, 0)]
    cells = np.packbits(mask) if edge == 1 else _tiles(mask, edge)
    return _smallest(b"".join([*lines, cells.tobytes()]))


def _smallest(content: bytes) -> bytes:
    """Compressed without a search for what repeats: it takes long, and finds nothing in a mask."""
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):  # unstructured masks, and blocks or rows
        packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
        found.append(packer.compress(content) + packer.flush())
    return min(found, key=len)


def _tiles(mask: np.ndarray, edge: int) -> np.ndarray:
    """How many weights live in each tile; those at the right and below may be smaller."""
    starts = [np.arange(0, extent, edge) for extent in mask.shape]
    rows = np.add.reduceat(mask, starts[0], axis=0, dtype="<u4")
    return np.add.reduceat(rows, starts[1], axis=1).astype("<u2")


def _density(mask: np.ndarray, most: int) -> np.ndarray:
    """The density of `most` x `most` tiles; of a smaller matrix single weights are repeated."""
    places = [np.arange(most) * extent // most for extent in mask.shape]
    sizes = [np.maximum(1, np.diff([*p, e])) for p, e in zip(places, mask.shape, strict=True)]
    rows = np.add.reduceat(mask, places[0], axis=0, dtype=np.int32)
    live = np.add.reduceat(rows, places[1], axis=1)
    return np.rint(255 * live / np.outer(*sizes)).astype(np.uint8)
