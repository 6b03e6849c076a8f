"""Matrices for the kernels: a file of another CPU's pack becomes what this one reads."""

import numpy as np
import pytest

from opfa.runtime import packing
from opfa.runtime.library import library
from opfa.runtime.packing import check, for_this_cpu, pack


@pytest.mark.parametrize("dtype", [np.uint16, np.int8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (130, 200), (300, 65)])
def test_a_matrix_of_another_cpu_is_packed_anew(
    dtype: type, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    random = np.random.default_rng(0)
    weight = random.integers(1, 100, shape).astype(dtype) * (random.random(shape) < 0.2)
    packed = {}
    for level in ("amx", "avx2"):
        monkeypatch.setattr(packing, "level", lambda level=level: level)
        packed[level] = pack(weight.astype(dtype))
        check(packed[level])
    for level, other in (("amx", "avx2"), ("avx2", "amx")):
        monkeypatch.setattr(packing, "level", lambda level=level: level)
        assert for_this_cpu(packed[level]) is packed[level]
        found = for_this_cpu(packed[other])
        assert found.arrays.keys() == packed[level].arrays.keys()
        for name, array in found.arrays.items():
            np.testing.assert_array_equal(array, packed[level].arrays[name])


def test_masks_that_count_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "level", lambda: "amx")
    packed = pack(np.eye(20, dtype=np.int8))
    check(packed)
    packed.arrays["masks"][0, 0, 0, 0] ^= 4
    with pytest.raises(ValueError, match="first live weights of blocks"):
        check(packed)
