"""One matrix as its positions and its values.

    form       int64 [type of the values, how many, bytes of gaps, rows, columns]
    positions  bytes: the gaps between values in row-major order; absent where all are stored
    values     bytes: the values; bytes of equal significance stand together
    scale      fp32 [rows] or []: of 8-bit values

Bytes are zstandard frames. A gap counts the zeros before a value: one byte, and a byte of 255 for
each 255 beyond. Byte for byte: model_cards/FORMAT.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow
import torch
from torch import Tensor

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
PARTS = ("form", "positions", "values", "scale")
RUN = 255  # a byte of a gap: 255 zeros and no value
ZSTANDARD = pyarrow.Codec("zstd", compression_level=1)
MEMORY = pyarrow.system_memory_pool()  # returns freed memory at once


@dataclass(frozen=True)
class Form:
    """What a packed matrix is."""

    dtype: torch.dtype  # of its values
    count: int  # of its values
    num_gap_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Int8:
    """A matrix in 8 bits."""

    values: Tensor  # int8 [out, in]
    scale: Tensor  # fp32 [out] or []
    mask: Tensor | None = None  # nothing is stored where it is False; None keeps all


def pack(matrix: Tensor | Int8, *, is_sparse: bool = False) -> dict[str, Tensor]:
    """The parts of a matrix [out, in]; with `is_sparse`, those without its zeros.

    A zero is what has no bit set, so what comes back is the same bit for bit; -0.0 is a value.
    """
    if isinstance(matrix, Int8):
        return _packed(matrix.values, matrix.mask, matrix.scale)
    return _packed(matrix, _bits(matrix) != 0 if is_sparse else None)


def unpack(parts: Mapping[str, Tensor]) -> Tensor:
    """A tensor from its parts. Raises `OSError`, `ValueError` or `KeyError` when they don't fit.

    A live weight whose 8 bits are zero becomes the smallest normal number, as elsewhere in opfa.
    """
    form = form_of(parts["form"])
    values = _values(parts["values"], form)
    positions = _positions(parts["positions"], form) if "positions" in parts else None
    if positions is None and form.count != math.prod(form.shape):
        raise ValueError(f"{form.count} values for a matrix of {form.shape}, and no positions")
    if form.dtype == torch.int8:
        values = _scaled(values, parts["scale"], form.shape, positions)
    if positions is None:
        return values.view(form.shape)
    matrix = torch.zeros(form.shape, dtype=values.dtype)
    _bits(matrix).view(-1).numpy()[positions] = _bits(values).numpy()
    return matrix


def _packed(tensor: Tensor, mask: Tensor | None, scale: Tensor | None = None) -> dict[str, Tensor]:
    values = tensor.contiguous().view(-1)
    parts = {} if scale is None else {"scale": scale.float().contiguous()}
    gaps = np.empty(0, np.uint8)
    if mask is not None:
        flat = mask.contiguous().view(-1)
        gaps = _gaps(np.flatnonzero(flat.numpy()))
        parts["positions"] = _compressed(gaps)
        values = values[flat]
    kind = TYPES.index(tensor.dtype)
    parts["form"] = torch.tensor([kind, len(values), len(gaps), *tensor.shape])
    planes = values.view(torch.uint8).view(len(values), tensor.element_size()).numpy().T
    return parts | {"values": _compressed(np.ascontiguousarray(planes))}


def _bits(tensor: Tensor) -> Tensor:
    """Floats as integers of their size."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _gaps(positions: np.ndarray) -> np.ndarray:
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // RUN + 1) - 1
    codes = np.full(ends[-1] + 1 if len(ends) else 0, RUN, np.uint8)
    codes[ends] = gaps % RUN
    return codes


def _positions(frame: Tensor, form: Form) -> np.ndarray:
    codes = _decompressed(frame, form.num_gap_bytes)
    is_end = codes != RUN
    largest = RUN * len(codes) + form.count  # that the sums can become, whatever the bytes are
    positions = np.cumsum(codes, dtype=np.int32 if largest < 1 << 31 else np.int64)
    if not is_end.all():
        positions = positions[is_end]
    if len(positions) != form.count:
        raise ValueError(f"{len(positions)} positions for {form.count} values")
    positions += np.arange(form.count, dtype=positions.dtype)
    if form.count and positions[-1] >= math.prod(form.shape):
        raise ValueError(f"a position {positions[-1]} in a matrix of {form.shape}")
    return positions


def _values(frame: Tensor, form: Form) -> Tensor:
    width = form.dtype.itemsize
    planes = _decompressed(frame, form.count * width).reshape(width, form.count)
    values = np.empty((form.count, width), np.uint8)
    for index, plane in enumerate(planes):  # half the time of a transposed copy
        values[:, index] = plane
    return torch.from_numpy(values).view(-1).view(form.dtype)


def _scaled(
    values: Tensor, scale: Tensor, shape: tuple[int, ...], positions: np.ndarray | None
) -> Tensor:
    is_fit = scale.shape in ((), shape[:1]) and scale.dtype == torch.float32
    if not is_fit or not scale.isfinite().all():
        raise ValueError(f"a scale of shape {list(scale.shape)} for a matrix of {list(shape)}")
    if positions is None:
        return (values.view(shape) * (scale[:, None] if scale.ndim else scale)).view(-1)
    if scale.ndim:
        scale = scale[torch.from_numpy(positions // shape[1])]
    return torch.where(values == 0, torch.finfo(torch.float32).tiny, values * scale)


def _compressed(array: np.ndarray) -> Tensor:
    frame = ZSTANDARD.compress(array.tobytes(), asbytes=True)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def _decompressed(frame: Tensor, num_bytes: int) -> np.ndarray:
    """The content of a frame; raises `OSError` when it isn't of this size."""
    content = ZSTANDARD.decompress(frame.numpy(), num_bytes, memory_pool=MEMORY)
    return np.frombuffer(content, np.uint8)


def form_of(form: Tensor) -> Form:
    """What a form says; raises `ValueError` when that can't be."""
    if form.dtype != torch.int64 or form.shape != (5,):
        raise ValueError(f"a form of {form.dtype} and shape {list(form.shape)}")
    kind, count, num_gap_bytes, *shape = form.tolist()
    size = math.prod(shape)
    is_known = 0 <= kind < len(TYPES) and min(shape) >= 0
    if not is_known or not 0 <= count <= size or not 0 <= num_gap_bytes <= count + size // RUN:
        raise ValueError(f"a form of {form.tolist()}")
    return Form(TYPES[kind], count, num_gap_bytes, tuple(shape))
