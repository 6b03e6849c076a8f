"""The pruner: masks in force, and ranks that must agree on them."""

import json

import pytest
import torch
from torch import nn

from opfa.compression.pattern import Pattern
from opfa.compression.pruner import Pruner, Weights
from opfa.compression.schedules import Gradual
from opfa.errors import RunError


def pruner(monotone: bool = False, **schedule: int) -> Pruner:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, -8.0]]))
    model = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"dense": layer})])})
    return Pruner(model, Gradual(target=0.5, **schedule), Pattern(monotone=monotone))


class Told(Weights):
    """Two ranks, of which the other one says something else about one tensor."""

    def compare(self, text: str) -> list[str]:
        if not text.startswith("{"):
            return [text, "0123456789abcdef"]
        return [text, json.dumps(dict.fromkeys(json.loads(text), "0123456789ab"))]


class NeverRead(Weights):
    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        raise AssertionError("read without an update")


def test_an_update_puts_exact_masks_in_force() -> None:
    made = pruner(end=0)
    assert made.after_step(0)
    (mask,) = made.masks().values()
    assert mask.tolist() == [[False] * 4, [True] * 4]
    assert made.sparsity() == 0.5


def shrunk(monotone: bool) -> list[list[bool]]:
    """The mask after live weights have become smaller than pruned ones were, one of them zero."""
    made = pruner(end=2, monotone=monotone)
    made.after_step(1)  # 44 % of 8 weights: the first four
    (layer,) = made.layers.values()
    with torch.no_grad():
        layer.weight[1] = torch.tensor([0.0, 0.5, 0.5, 9.0])
    made.after_step(2)
    return layer.mask.tolist()


def test_a_pruned_weight_returns_when_live_ones_have_become_smaller() -> None:
    assert shrunk(monotone=False) == [[False, True, True, True], [False, False, False, True]]


def test_monotone_masks_only_shrink() -> None:
    assert shrunk(monotone=True) == [[False] * 4, [True] * 4]


def test_between_updates_nothing_is_read() -> None:
    made = pruner(start=2, end=4, every=2)
    assert not made.after_step(1, NeverRead())
    assert made.sparsity() == 0.0


def test_ranks_that_disagree_stop_before_a_mask_changes_and_name_the_tensor() -> None:
    made = pruner(end=0)
    with pytest.raises(RunError, match="step 0: .* layer.0.dense.weight .*rank 1: 0123456789ab"):
        made.after_step(0, Told())
    assert made.sparsity() == 0.0
