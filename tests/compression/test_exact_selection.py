"""Exact selection against a full stable sort in numpy, and counts written out."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opfa.compression import selection
from opfa.compression.selection import Ranks, keep, magnitude_mask, num_zeros, select


def magnitudes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.abs() for name, weight in weights.items()}


def sorted_mask(weight: np.ndarray, k: int) -> np.ndarray:
    """The reference: prune the k smallest magnitudes, and of equal ones those that come last."""
    flat = np.abs(weight.reshape(-1))
    order = np.lexsort((-np.arange(flat.size), flat))
    mask = np.ones(flat.size, dtype=bool)
    mask[order[:k]] = False
    return mask.reshape(weight.shape)


def assert_sorted(weight: Tensor, k: int) -> None:
    expected = torch.from_numpy(sorted_mask(weight.numpy(), k))
    assert torch.equal(magnitude_mask(weight, k), expected)


def awkward(seed: int) -> Tensor:
    """Weights of one of the kinds that go wrong: continuous, repeated, zeros, denormals, signs."""
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 40, size=2))
    normal = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
    kinds = [
        normal,
        normal.bfloat16().float(),
        (normal * 2).round(),
        normal * 1e-40,
        torch.where(normal.abs() < 0.7, torch.copysign(torch.zeros(()), normal), normal),
        normal * torch.tensor([1e-45, 1e-38, 1.0, 1e38])[random.integers(4, size=shape)],
    ]
    return kinds[seed % len(kinds)]


# one tensor


def test_the_smallest_magnitudes_go_whatever_their_sign() -> None:
    mask = magnitude_mask(torch.tensor([[3.0, -1.0], [0.5, -4.0]]), 2)
    assert mask.tolist() == [[True, False], [False, True]]


def test_ties_go_to_the_lower_index() -> None:
    mask = magnitude_mask(torch.tensor([1.0, 2.0, -1.0, 1.0, 2.0]), 2)
    assert mask.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.85, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 48), (128, 512)])
@pytest.mark.parametrize("kind", ["normal", "bf16", "tied", "zero"])
def test_the_count_is_exact(sparsity: float, shape: tuple[int, int], kind: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    made = {
        "normal": weight,
        "bf16": weight.bfloat16().float(),
        "tied": torch.full(shape, 0.25).copysign(weight),
        "zero": torch.zeros(shape),
    }
    k = num_zeros(sparsity, weight.numel())
    assert int((~magnitude_mask(made[kind], k)).sum()) == round(sparsity * weight.numel()) == k


def test_85_and_90_percent_of_a_bert_layer_are_these_counts() -> None:
    assert (num_zeros(0.85, 768 * 768), num_zeros(0.9, 768 * 3072)) == (501_350, 2_123_366)


@pytest.mark.parametrize("seed", range(120))
def test_one_tensor_equals_a_full_stable_sort(seed: int) -> None:
    weight = awkward(seed)
    random = np.random.default_rng(seed)
    for k in {0, 1, weight.numel(), int(random.integers(weight.numel() + 1))}:
        assert_sorted(weight, k)


@pytest.mark.parametrize("seed", range(60))
def test_sorting_as_on_a_gpu_finds_what_histograms_find(seed: int) -> None:
    scores = awkward(seed).abs().view(-1)
    k = int(np.random.default_rng(seed).integers(1, scores.numel() + 1))
    expected = selection._kth_lowest({"w": scores}, {"w": None}, k, selection.ALONE)
    assert selection._kth_by_sorting(selection._order(scores, None), k) == expected


def test_more_than_one_chunk_equals_a_full_stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CHUNK", 7)
    weight = torch.randn(9, 11, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert_sorted(weight, 60)


def test_weights_that_differ_in_the_last_bit_are_told_apart() -> None:
    one = torch.tensor(1.0)
    more, most = torch.nextafter(one, torch.tensor(2.0)), torch.tensor(1.0001)
    assert magnitude_mask(torch.stack([one, more, most]), 1).tolist() == [False, True, True]


def test_negative_zero_is_zero() -> None:
    mask = magnitude_mask(torch.tensor([-0.0, 0.0, 1.0, -0.0]), 2)
    assert mask.tolist() == [True, False, True, False]


def test_denormals_are_larger_than_zero() -> None:
    mask = magnitude_mask(torch.tensor([1e-45, 0.0, -3e-45, 1e-38]), 2)
    assert mask.tolist() == [False, False, True, True]


def test_zeros_that_are_there_go_first() -> None:
    weight = torch.tensor([0.0, 5.0, 0.0, -1.0, 2.0])
    assert magnitude_mask(weight, 3).tolist() == [False, True, False, False, True]


def test_a_transposed_weight_keeps_its_shape() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]).t()
    assert magnitude_mask(weight, 3).tolist() == [[False, True], [False, True], [False, True]]


def test_a_weight_is_not_changed() -> None:
    weight = torch.tensor([-1.0, 2.0])
    magnitude_mask(weight, 1)
    assert weight.tolist() == [-1.0, 2.0]


# several tensors


def test_the_largest_of_all_tensors_stay() -> None:
    weights = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([2.0, 3.0, 4.0])}
    masks = keep(magnitudes(weights), 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, True],
        "b": [False, False, True],
    }


def test_ties_go_to_the_earlier_tensor() -> None:
    weights = {"b": torch.tensor([1.0, -1.0]), "a": torch.tensor([1.0, 1.0])}
    masks = keep(magnitudes(weights), 1)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "b": [True, True],
        "a": [True, False],
    }


@pytest.mark.parametrize("seed", range(60))
def test_several_tensors_equal_a_stable_sort_of_all_of_them(seed: int) -> None:
    weights = {str(i): awkward(seed + step) for i, step in enumerate((0, 6, 12))}
    together = np.concatenate([w.numpy().reshape(-1) for w in weights.values()])
    k = int(np.random.default_rng(seed).integers(together.size + 1))
    masks = keep(magnitudes(weights), k)
    found = np.concatenate([mask.numpy().reshape(-1) for mask in masks.values()])
    np.testing.assert_array_equal(found, sorted_mask(together, k))
    assert [mask.shape for mask in masks.values()] == [w.shape for w in weights.values()]


def test_by_layer_each_tensor_reaches_the_target() -> None:
    weights = {"small": torch.arange(1.0, 11.0), "large": torch.arange(100.0, 120.0)}
    masks = select(weights, 0.85, "layer")
    assert {n: int((~m).sum()) for n, m in masks.items()} == {"small": 8, "large": 17}


def test_global_all_tensors_reach_the_target_together() -> None:
    weights = {"small": torch.arange(1.0, 11.0), "large": torch.arange(100.0, 120.0)}
    masks = select(weights, 0.85, "global")
    assert {n: int((~m).sum()) for n, m in masks.items()} == {"small": 10, "large": 16}


# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [0, 1])
def test_a_non_finite_weight_is_refused(value: float, k: int) -> None:
    with pytest.raises(ValueError, match="q: holds a non-finite weight"):
        keep(magnitudes({"p": torch.ones(2), "q": torch.tensor([1.0, value])}), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_scores_of_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"weight: scores must be fp32, not {dtype}"):
        magnitude_mask(torch.ones(4, dtype=dtype), 1)


@pytest.mark.parametrize("k", [-1, 5])
def test_a_count_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}: must be between 0 and .* scores, 4"):
        magnitude_mask(torch.ones(2, 2), k)


# several ranks


def on_ranks(
    flat: dict[str, Tensor], cuts: list[list[int]], sparsity: float, scope: Any
) -> dict[str, Tensor]:
    """The masks that ranks in threads make of their runs, joined; `cuts` says where each tensor is
    cut, possibly nowhere, so that a rank holds nothing of it.
    """
    size = len(cuts[0]) + 1
    meeting = threading.Barrier(size)
    shared: dict[int, np.ndarray] = {}

    def work(rank: int) -> dict[str, Tensor]:
        def total(counts: np.ndarray) -> np.ndarray:
            shared[rank] = counts
            meeting.wait(60)
            summed = np.sum([shared[other] for other in range(size)], axis=0)
            meeting.wait(60)
            return summed

        runs = {
            name: values[[0, *cut][rank] : [*cut, len(values)][rank]]
            for (name, values), cut in zip(flat.items(), cuts, strict=True)
        }
        return select(magnitudes(runs), sparsity, scope, Ranks(rank, size, total))

    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(work, range(size)))
    return {name: torch.cat([part[name] for part in parts]) for name in flat}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_make_the_masks_of_one_process(scope: Any, size: int) -> None:
    random = np.random.default_rng(size)
    for kind in ("spread", "coarse", "equal", "bf16"):
        flat = {}
        for name, length in (("a", 37), ("b", 120), ("c", 5)):
            values = torch.from_numpy(random.normal(size=length).astype(np.float32))
            if kind == "coarse":
                values = values.round()
            elif kind == "equal":
                values = values.sign()
            elif kind == "bf16":
                values = values.bfloat16().float()
            flat[name] = values
        cuts = [
            sorted(random.integers(0, len(values) + 1, size - 1).tolist())
            for values in flat.values()
        ]
        for sparsity in (0.0, 0.3, 0.5, 0.9, 0.99):
            alone = select(magnitudes(flat), sparsity, scope)
            together = on_ranks(flat, cuts, sparsity, scope)
            assert all(torch.equal(together[name], alone[name]) for name in flat)


def test_a_weight_that_is_not_finite_stops_every_rank() -> None:
    flat = {"a": torch.tensor([1.0, 2.0, 3.0, math.nan])}
    with pytest.raises(ValueError, match="a: holds a non-finite weight"):
        on_ranks(flat, [[3]], 0.5, "layer")
