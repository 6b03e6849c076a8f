"""What is reported of masks, and their files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opfa.sparsity.masks import (
    fingerprint,
    load,
    nonzero_masks,
    relative_names,
    report,
    save,
)

LAYERS = "encoder.layer"


def two_masks(prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{LAYERS}.0.query.weight": torch.tensor([[True, False], [True, True]]),
        f"{prefix}{LAYERS}.1.key.weight": torch.tensor([[False, False, True]]),
    }


def test_names_lose_the_path_that_all_share() -> None:
    names = relative_names(["bert.encoder.layer.0.query.weight", "bert.encoder.layer.1.key.weight"])
    assert list(names.values()) == ["0.query.weight", "1.key.weight"]


def test_the_fingerprint_does_not_depend_on_the_prefix_or_the_order() -> None:
    plain, prefixed = two_masks(), two_masks("bert.")
    assert fingerprint(plain) == fingerprint(prefixed)
    assert fingerprint(plain) == fingerprint(dict(reversed(plain.items())))


@pytest.mark.parametrize("index", range(7))
def test_the_fingerprint_changes_with_one_bit(index: int) -> None:
    masks = two_masks()
    changed = [mask.clone() for mask in masks.values()]
    where = (changed[0], index) if index < 4 else (changed[1], index - 4)
    where[0].view(-1)[where[1]] ^= True
    assert fingerprint(dict(zip(masks, changed, strict=True))) != fingerprint(masks)


def test_the_fingerprint_changes_with_a_shape() -> None:
    flat = {name: mask.view(-1, 1) for name, mask in two_masks().items()}
    assert fingerprint(flat) != fingerprint(two_masks())


def test_the_fingerprint_changes_with_a_name() -> None:
    renamed = {name.replace("key", "value"): mask for name, mask in two_masks().items()}
    assert fingerprint(renamed) != fingerprint(two_masks())


def test_the_report_counts_each_tensor_and_all() -> None:
    masks = two_masks()
    query, key = masks
    assert report(masks) == {
        "format": "opfa-sparsity/1",
        "total": {"zeros": 3, "size": 7, "sparsity": 3 / 7},
        "tensors": {
            query: {"shape": [2, 2], "zeros": 1, "sparsity": 0.25},
            key: {"shape": [1, 3], "zeros": 2, "sparsity": 2 / 3},
        },
        "fingerprint": fingerprint(masks),
    }


def test_the_report_of_no_tensor_is_dense() -> None:
    assert report({})["total"] == {"zeros": 0, "size": 0, "sparsity": 0.0}


def test_masks_from_zeros_count_negative_zeros_too() -> None:
    found = nonzero_masks({"a": torch.tensor([0.0, -0.0, 1e-45, -2.0])})
    assert found["a"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("shapes", [[], [(3, 5), (1, 1), (8, 8), (2, 17)]])
def test_saved_masks_come_back_equal(tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    random = torch.Generator().manual_seed(0)
    masks = {f"layer.{i}": torch.rand(s, generator=random) < 0.5 for i, s in enumerate(shapes)}
    save(masks, tmp_path / "masks.safetensors")
    loaded = load(tmp_path / "masks.safetensors")
    assert set(loaded) == set(masks)
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert all(mask.dtype == torch.bool for mask in loaded.values())
