import math

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opfa.weights.packing import Int8, pack, unpack

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.tuples(st.integers(0, 40), st.integers(0, 700))
FULL_SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 700))
DENSITIES = st.one_of(st.sampled_from([0.0, 1.0, 0.001, 0.1]), st.floats(0.0, 1.0))


def random_bits(shape: tuple[int, int], density: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern: NaN, infinities, -0.0 and subnormal numbers too."""
    rng = np.random.default_rng(seed)
    integers = {4: np.int32, 2: np.int16}[dtype.itemsize]
    limits = np.iinfo(integers)
    bits = rng.integers(limits.min, limits.max, shape, dtype=integers, endpoint=True)
    bits[rng.random(shape) >= density] = 0
    return torch.from_numpy(bits).view(dtype)


def bits(tensor: Tensor) -> bytes:
    """NaN is NaN, and -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(deadline=None, max_examples=300)
@given(SHAPES, DENSITIES, st.sampled_from(FLOATS), st.booleans(), st.integers(0, 2**32))
def test_a_matrix_comes_back_bit_for_bit(
    shape: tuple[int, int], density: float, dtype: torch.dtype, is_sparse: bool, seed: int
) -> None:
    matrix = random_bits(shape, density, dtype, seed)
    back = unpack(pack(matrix, is_sparse=is_sparse))
    assert (back.dtype, back.shape) == (dtype, matrix.shape)
    assert bits(back) == bits(matrix)


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 700)),
    DENSITIES,
    st.booleans(),
    st.integers(0, 2**32),
)
def test_8_bit_values_come_back_as_their_products_with_the_scale(
    shape: tuple[int, int], density: float, is_per_row: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.integers(-127, 127, shape, dtype=np.int8, endpoint=True))
    mask = torch.from_numpy(rng.random(shape) < density)
    scale = torch.rand(shape[:1] if is_per_row else ()) + 0.1
    products = values * (scale[:, None] if is_per_row else scale)
    expected = torch.where(values == 0, torch.finfo(torch.float32).tiny, products) * mask
    assert torch.equal(unpack(pack(Int8(values=values, scale=scale, mask=mask))), expected)
    assert torch.equal(unpack(pack(Int8(values=values, scale=scale))), products)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_matrix_that_is_not_contiguous_comes_back(dtype: torch.dtype) -> None:
    matrix = random_bits((60, 40), 0.1, dtype, 0).T[::2, 1:]
    assert not matrix.is_contiguous()
    assert bits(unpack(pack(matrix, is_sparse=True))) == bits(matrix)


def test_zeros_of_a_live_weight_in_8_bits_are_not_zeros_of_the_mask() -> None:
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[0, 5, 0]], dtype=torch.int8)
    back = unpack(pack(Int8(values=values, scale=torch.tensor(0.5), mask=mask)))
    assert torch.equal(back != 0, mask)
    assert back.tolist() == [[torch.finfo(torch.float32).tiny, 2.5, 0.0]]


@pytest.mark.parametrize(
    ("row", "codes"),
    [
        ([1.0, 0, 0, 1.0], [0, 2]),
        ([0.0] * 254 + [1.0], [254]),
        ([0.0] * 255 + [1.0], [255, 0]),
        ([0.0] * 256 + [1.0, 1.0], [255, 1, 0]),
        ([0.0] * 510 + [1.0], [255, 255, 0]),
        ([0.0] * 3, []),
    ],
)
def test_positions_are_the_gaps_between_values(row: list[float], codes: list[int]) -> None:
    parts = pack(torch.tensor([row]), is_sparse=True)
    assert parts["form"].tolist() == [0, sum(map(bool, row)), len(codes), 1, len(row)]
    frame = parts["positions"].numpy().tobytes()
    assert list(pyarrow.Codec("zstd").decompress(frame, len(codes), asbytes=True)) == codes


def test_positions_take_little_more_than_their_entropy_at_90_percent() -> None:
    matrix = torch.rand(512, 768, generator=torch.Generator().manual_seed(0))
    matrix *= torch.rand(512, 768, generator=torch.Generator().manual_seed(1)) < 0.1
    parts = pack(matrix, is_sparse=True)
    density = (matrix != 0).float().mean().item()
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert len(parts["positions"]) * 8 / matrix.numel() < 1.02 * entropy


BASE = pack(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]), is_sparse=True)
INT8 = pack(
    Int8(values=torch.ones(2, 3, dtype=torch.int8), scale=torch.ones(2), mask=torch.ones(2, 3) > 0)
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": torch.tensor([9, 3, 3, 2, 3])}, "a form of"),
        ({"form": torch.tensor([-1, 3, 3, 2, 3])}, "a form of"),
        ({"form": torch.tensor([0, 7, 3, 2, 3])}, "a form of"),
        ({"form": torch.tensor([0, 3, 4, 2, 3])}, "a form of"),
        ({"form": torch.tensor([0, 3, 3, -2, -3])}, "a form of"),
        ({"form": torch.tensor([0, 3, 3, 2, 3, 1])}, "shape"),
        ({"form": torch.tensor([0, 3, 3, 2, 3]).float()}, "a form of"),
        ({"form": torch.tensor([0, 2, 2, 2, 3])}, "ZSTD"),
        ({"form": torch.tensor([1, 3, 3, 2, 3])}, "ZSTD"),
        ({"form": torch.tensor([0, 3, 3, 1, 4])}, "a position"),
        ({"positions": BASE["values"]}, "ZSTD"),
        ({"values": BASE["values"][:-1]}, "ZSTD"),
        ({"values": BASE["values"][:0]}, "ZSTD"),
        ({"positions": None}, "no positions"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    parts = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    with pytest.raises((ValueError, OSError), match=message):
        unpack(parts)


@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.ones(2, 1), torch.ones(2).double(), torch.tensor([1, torch.inf])]
)
def test_a_scale_that_does_not_fit_is_refused(scale: Tensor) -> None:
    with pytest.raises(ValueError, match="a scale"):
        unpack({**INT8, "scale": scale})


def test_gaps_that_end_without_a_value_are_refused() -> None:
    frame = pyarrow.Codec("zstd").compress(bytes([0, 1, 255]), asbytes=True)
    wrong = {**BASE, "positions": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="2 positions for 3 values"):
        unpack(wrong)
