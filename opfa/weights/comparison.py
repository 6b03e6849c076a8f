"""Two checkpoints side by side, A as it was before and B after: are the masks the same, and how
far did the live weights move?

Tensors are matched by name, with or without the path of a base model. Only matrices of linear
layers are compared: those are what pruning is about. One that is not pruned (a new head of zeros)
has no zeros here. Distances are relative, |b - a| / |a|, over the weights that live in both;
between integers and floats there is none.
"""

import math
from typing import Any

import torch
from torch import Tensor

from opfa.errors import ModelError
from opfa.sparsity.anatomy import is_matrix, is_pruned, layer_of, paired_names
from opfa.sparsity.masks import Masks, fingerprint, nonzero
from opfa.weights.sources import check_masks, is_mask, open_source

COUNTS = ("size", "both", "only_a", "only_b")


def compare(a: str, b: str) -> dict[str, Any]:
    """What differs between the linear matrices of two checkpoints, from A to B.

    For each tensor and in total: `both` (zero in both), `only_a` (zero in A alone: it came back),
    `only_b` (newly pruned in B), `moved` and `max_abs` (None where nothing can be compared); the
    fingerprints of what was compared; what only one of them has. `same_masks` is true when no zero
    came or went, and no pruned matrix (`unpaired`) is in one alone or has another shape.
    """
    first, second = _matrices(a), _matrices(b)
    pairs = paired_names(first, second)
    if not pairs:
        raise ModelError(f"{a}, {b}: have no matrix with the same name, so nothing to compare")
    shapes = {
        name: [list(first[name].shape), list(second[other].shape)]
        for name, other in pairs.items()
        if first[name].shape != second[other].shape
    }
    compared = {name: other for name, other in pairs.items() if name not in shapes}
    if not compared:
        raise ModelError(f"{a}, {b}: no two matrices have the same shape, so nothing to compare")
    masks = _masks(first), _masks(second)
    tensors = {
        name: _compared(first[name], second[other], masks[0][name], masks[1][other])
        for name, other in compared.items()
    }
    sparse = [name for name, row in tensors.items() if row["zeros_a"] or row["zeros_b"]]
    sides = {name: masks[0][name] for name in sparse}, {n: masks[1][compared[n]] for n in sparse}
    total = _total(list(tensors.values()))
    only = [
        [name for name in first if name not in pairs],
        [name for name in second if name not in pairs.values()],
    ]
    unpaired = [
        name for side, m in zip(only, masks, strict=True) for name in side if not m[name].all()
    ]
    unpaired += [n for n in shapes if not (masks[0][n].all() and masks[1][pairs[n]].all())]
    same = not (total["only_a"] or total["only_b"] or unpaired)
    return {
        "a": a,
        "b": b,
        "same_masks": same,
        "summary": _summary(total, len(unpaired), same),
        "total": total,
        "tensors": tensors,
        "layers": _layers(tensors),
        "fingerprints": {side: fingerprint(m) for side, m in zip("ab", sides, strict=True)},
        "only_in_a": only[0],
        "only_in_b": only[1],
        "different_shapes": shapes,
        "unpaired": unpaired,
    }


def _matrices(name: str) -> dict[str, Tensor]:
    found, beside = {}, {}
    for tensor_name, tensor in open_source(name).tensors(
        lambda n, shape: is_matrix(n, shape) or is_mask(n, shape)
    ):
        if not tensor.numel():
            continue
        if is_matrix(tensor_name, tensor.shape):
            found[tensor_name] = tensor
        elif is_mask(tensor_name, tensor.shape):
            beside[tensor_name] = nonzero(tensor)
    check_masks(beside, {n: nonzero(t) for n, t in found.items()} if beside else {}, name)
    return found


def _masks(matrices: dict[str, Tensor]) -> Masks:
    masks = {name: nonzero(tensor) for name, tensor in matrices.items()}
    for name, mask in masks.items():
        if not is_pruned(name, mask.shape, mask.numel() - int(mask.count_nonzero())):
            masks[name] = torch.ones_like(mask)
    return masks


def _compared(a: Tensor, b: Tensor, mask_a: Tensor, mask_b: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {
        "shape": list(a.shape),
        "size": a.numel(),
        "zeros_a": int((~mask_a).sum()),
        "zeros_b": int((~mask_b).sum()),
        "both": int((~mask_a & ~mask_b).sum()),
        "only_a": int((~mask_a & mask_b).sum()),
        "only_b": int((mask_a & ~mask_b).sum()),
        "moved": None,
        "max_abs": None,
        "squares": None,
    }
    live = mask_a & mask_b
    if a.is_floating_point() == b.is_floating_point() and live.any():
        before = a[live].double()
        change = b[live].double() - before
        squares = [float(change.square().sum()), float(before.square().sum())]
        moved = math.sqrt(squares[0] / squares[1]) if squares[1] else None
        row |= {"moved": moved, "max_abs": float(change.abs().max()), "squares": squares}
    return row


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over tensors, which lose what only sums need."""
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in COUNTS}
    pairs = [row.pop("squares") for row in rows]
    squares = [sum(values) for values in zip(*(p for p in pairs if p), strict=True)]
    furthest = [row["max_abs"] for row in rows if row["max_abs"] is not None]
    moved = math.sqrt(squares[0] / squares[1]) if squares and squares[1] else None
    return total | {"moved": moved, "max_abs": max(furthest, default=None)}


def _summary(total: dict[str, Any], num_unpaired: int, same: bool) -> str:
    moved = total["moved"]
    if moved is None:
        values = "values can't be compared"
    else:
        values = f"live values moved by {moved:.2%}" if moved else "live values equal"
    if same:
        return f"masks equal, {total['both']:,} zeros; {values}"
    counts = f"{total['only_a']:,} weights came back, {total['only_b']:,} were newly pruned"
    if num_unpaired:
        counts += f", {num_unpaired:,} pruned matrices have no partner"
    return f"masks differ: {counts}; {values}"


def _layers(tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """By numbered layer: the share of each kind's weights whose mask is another one."""
    grouped: dict[tuple[str, int], dict[str, float]] = {}
    for name, row in tensors.items():
        layer = layer_of(name)
        if layer is not None and row["size"]:
            share = (row["only_a"] + row["only_b"]) / row["size"]
            grouped.setdefault((layer.stack, layer.number), {})[layer.kind] = share
    return [
        {"stack": stack, "layer": number, "kinds": kinds}
        for (stack, number), kinds in sorted(grouped.items())
    ]
