"""Two checkpoints side by side: are the masks the same, and how far did the live weights move?

Tensors are matched by name, with or without the path of a base model. Only matrices of linear
layers are compared: those are what pruning is about. Distances are relative, |b - a| / |a|, over
the weights that live in both; between integers and floats there is none.
"""

import math
from typing import Any

from torch import Tensor

from opfa.anatomy import is_matrix, layer_of, paired_names
from opfa.errors import ModelError
from opfa.sources import open_source
from opfa.sparsity.masks import fingerprint

COUNTS = ("size", "both", "only_a", "only_b")


def compare(a: str, b: str) -> dict[str, Any]:
    """What differs between the linear matrices of two checkpoints.

    For each tensor and in total: `both` (zero in both), `only_a` (zero in A alone: it came back),
    `only_b` (newly pruned in B), `moved` and `max_abs` (None where nothing can be compared);
    `same_masks`; the fingerprints of what was compared; what only one of them has.
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
    tensors, masks = {}, ({}, {})
    for name, other in compared.items():
        tensors[name] = _compared(first[name], second[other])
        if tensors[name]["zeros_a"] or tensors[name]["zeros_b"]:
            masks[0][name], masks[1][name] = first[name] != 0, second[other] != 0
    total = _total(list(tensors.values()))
    same = not (total["only_a"] or total["only_b"])
    return {
        "a": a,
        "b": b,
        "same_masks": same,
        "summary": _summary(total, same),
        "total": total,
        "tensors": tensors,
        "layers": _layers(tensors),
        "fingerprints": {side: fingerprint(m) for side, m in zip("ab", masks, strict=True)},
        "only_in_a": [name for name in first if name not in pairs],
        "only_in_b": [name for name in second if name not in pairs.values()],
        "different_shapes": shapes,
    }


def _matrices(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in open_source(name).tensors(is_matrix) if is_matrix(n, t.shape)}


def _compared(a: Tensor, b: Tensor) -> dict[str, Any]:
    mask_a, mask_b = a != 0, b != 0
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
        moved = math.sqrt(squares[0] / squares[1])
        row |= {"moved": moved, "max_abs": float(change.abs().max()), "squares": squares}
    return row


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over tensors, which lose what only sums need."""
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in COUNTS}
    pairs = [row.pop("squares") for row in rows]
    squares = [sum(values) for values in zip(*(p for p in pairs if p), strict=True)]
    furthest = [row["max_abs"] for row in rows if row["max_abs"] is not None]
    moved = math.sqrt(squares[0] / squares[1]) if squares else None
    return total | {"moved": moved, "max_abs": max(furthest, default=None)}


def _summary(total: dict[str, Any], same: bool) -> str:
    moved = total["moved"]
    if moved is None:
        values = "values can't be compared"
    else:
        values = f"live values moved by {moved:.2%}" if moved else "live values equal"
    if same:
        return f"masks equal, {total['both']:,} zeros; {values}"
    counts = f"{total['only_a']:,} weights came back, {total['only_b']:,} were newly pruned"
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
