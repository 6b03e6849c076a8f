"""Two checkpoints, A before and B after: are the masks the same, and how far did live weights move?

Only matrices of linear layers are compared, matched by name, with or without the path of a base
model. One that is not pruned (a new head of zeros) has no zeros here. Distances are relative,
|b - a| / |a|, over the weights that live in both; between integers and floats there is none.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from opfa.errors import ModelError
from opfa.report.tables import LayerKinds, Result, Row, Table, column, layer_table
from opfa.sparsity.anatomy import by_layer, is_matrix, is_pruned, paired_names
from opfa.sparsity.masks import Masks, fingerprint, nonzero
from opfa.weights.sources import check_masks, is_mask, open_source


class Change(Row):
    """How masks and live weights changed."""

    size: int
    both: int = column("zero in both", ",")
    only_a: int = column("came back", ",")  # zero in A alone
    only_b: int = column("newly pruned", ",")  # zero in B alone
    moved: float | None = column("moved", ".2%")  # None where nothing can be compared
    max_abs: float | None = column("at most by", ".2e")


class TensorChange(Change):
    """The same for one tensor."""

    shape: list[int]
    zeros_a: int
    zeros_b: int
    squares: tuple[float, float] | None = Field(exclude=True)  # of the distance, and of A


class Comparison(Result):
    """What differs between the linear matrices of two checkpoints, from A to B.

    `same_masks` is true when no zero came or went, and no pruned matrix (`unpaired`) is in one
    alone or has another shape.
    """

    a: str
    b: str
    same_masks: bool
    summary: str
    total: Change
    tensors: dict[str, TensorChange]
    layers: list[LayerKinds]  # the share of weights whose mask changed
    fingerprints: dict[str, str]
    only_in_a: list[str]
    only_in_b: list[str]
    different_shapes: dict[str, list[list[int]]]
    unpaired: list[str]

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """Layers where masks differ, or all tensors; then lines that sum up."""
        if is_long:
            yield Table.of("tensor", self.tensors)
        elif self.layers and not self.same_masks:
            yield layer_table("weights whose mask changed, %", self.layers)
        for name, alone in ((self.a, self.only_in_a), (self.b, self.only_in_b)):
            if alone:
                yield f"only in {name}: {len(alone)} matrices ({alone[0]}, …)"
        for name, (ours, theirs) in self.different_shapes.items():
            yield f"{name}: not compared, {ours} and {theirs}"
        if self.unpaired:
            yield f"pruned and not compared: {', '.join(self.unpaired)}"
        yield f"from {self.a} to {self.b}, {len(self.tensors)} matrices:"
        yield self.summary


def compare(a: str, b: str) -> Comparison:
    """Read two checkpoints and compare them, from A to B."""
    first, second = _matrices(a), _matrices(b)
    pairs = paired_names(first, second)
    if not pairs:
        raise ModelError(f"{a}, {b}: have no matrix with the same name, so nothing to compare")
    shapes = {n: [list(first[n].shape), list(second[m].shape)] for n, m in pairs.items()}
    shapes = {name: both for name, both in shapes.items() if both[0] != both[1]}
    compared = {name: other for name, other in pairs.items() if name not in shapes}
    if not compared:
        raise ModelError(f"{a}, {b}: no two matrices have the same shape, so nothing to compare")
    masks_a, masks_b = _masks(first), _masks(second)
    tensors = {
        name: _compared(first[name], second[other], masks_a[name], masks_b[other])
        for name, other in compared.items()
    }
    sparse = [name for name, row in tensors.items() if row.zeros_a or row.zeros_b]
    shares = {name: (row.only_a + row.only_b) / row.size for name, row in tensors.items()}
    total = _total(list(tensors.values()))
    only_a = [name for name in first if name not in pairs]
    only_b = [name for name in second if name not in pairs.values()]
    unpaired = [name for name in only_a if not masks_a[name].all()]
    unpaired += [name for name in only_b if not masks_b[name].all()]
    unpaired += [n for n in shapes if not (masks_a[n].all() and masks_b[pairs[n]].all())]
    same = not (total.only_a or total.only_b or unpaired)
    return Comparison(
        a=a,
        b=b,
        same_masks=same,
        summary=_summary(total, len(unpaired), same),
        total=total,
        tensors=tensors,
        layers=[LayerKinds(stack=s, layer=n, kinds=k) for (s, n), k in by_layer(shares).items()],
        fingerprints={
            "a": fingerprint({name: masks_a[name] for name in sparse}),
            "b": fingerprint({name: masks_b[compared[name]] for name in sparse}),
        },
        only_in_a=only_a,
        only_in_b=only_b,
        different_shapes=shapes,
        unpaired=unpaired,
    )


def _matrices(name: str) -> dict[str, Tensor]:
    found, beside = {}, {}
    source = open_source(name).tensors(lambda n, shape: is_matrix(n, shape) or is_mask(n, shape))
    for tensor_name, tensor in source:
        if tensor.numel() and is_matrix(tensor_name, tensor.shape):
            found[tensor_name] = tensor
        elif tensor.numel() and is_mask(tensor_name, tensor.shape):
            beside[tensor_name] = nonzero(tensor)
    check_masks(beside, {n: nonzero(t) for n, t in found.items()} if beside else {}, name)
    return found


def _masks(matrices: dict[str, Tensor]) -> Masks:
    masks = {name: nonzero(tensor) for name, tensor in matrices.items()}
    for name, mask in masks.items():
        if not is_pruned(name, mask.shape, mask.numel() - int(mask.count_nonzero())):
            masks[name] = torch.ones_like(mask)
    return masks


def _compared(a: Tensor, b: Tensor, mask_a: Tensor, mask_b: Tensor) -> TensorChange:
    live = mask_a & mask_b
    moved = furthest = squares = None
    if a.is_floating_point() == b.is_floating_point() and live.any():
        before = a[live].double()
        change = b[live].double() - before
        squares = float(change.square().sum()), float(before.square().sum())
        moved, furthest = _distance(squares), float(change.abs().max())
    return TensorChange(
        shape=list(a.shape),
        size=a.numel(),
        zeros_a=int((~mask_a).sum()),
        zeros_b=int((~mask_b).sum()),
        both=int((~mask_a & ~mask_b).sum()),
        only_a=int((~mask_a & mask_b).sum()),
        only_b=int((mask_a & ~mask_b).sum()),
        moved=moved,
        max_abs=furthest,
        squares=squares,
    )


def _distance(squares: Sequence[float]) -> float | None:
    return math.sqrt(squares[0] / squares[1]) if squares and squares[1] else None


def _total(rows: Sequence[TensorChange]) -> Change:
    sums = [sum(side) for side in zip(*(r.squares for r in rows if r.squares), strict=True)]
    return Change(
        size=sum(row.size for row in rows),
        both=sum(row.both for row in rows),
        only_a=sum(row.only_a for row in rows),
        only_b=sum(row.only_b for row in rows),
        moved=_distance(sums),
        max_abs=max((row.max_abs for row in rows if row.max_abs is not None), default=None),
    )


def _summary(total: Change, num_unpaired: int, same: bool) -> str:
    values = f"live values moved by {total.moved:.2%}" if total.moved else "live values equal"
    if total.moved is None:
        values = "values can't be compared"
    if same:
        return f"masks equal, {total.both:,} zeros; {values}"
    counts = f"{total.only_a:,} weights came back, {total.only_b:,} were newly pruned"
    if num_unpaired:
        counts += f", {num_unpaired:,} pruned matrices have no partner"
    return f"masks differ: {counts}; {values}"
