"""Inspection: exact sparsity of a model in memory, or of any checkpoint in a directory, in a file
or on the Hub.

Only tensors are read, one at a time. A tensor counts as pruned when it is the matrix of a linear
layer and has zeros; a matrix of zeros alone only in the encoder (`anatomy.is_pruned`). Others are
counted by part, so that a reader sees what a sparsity refers to.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from opfa.errors import ModelError
from opfa.sparsity.anatomy import PARTS, NumHeads, by_layer, heads_of, is_matrix, is_pruned, part_of
from opfa.sparsity.chosen import KEY
from opfa.sparsity.layers import masks_of, zero_masks
from opfa.sparsity.masks import Masks, nonzero, report
from opfa.sparsity.structure import Structure, structure_of
from opfa.storage.foreign import read_object
from opfa.weights.findings import Inspection, Layer, Share, Stated
from opfa.weights.sources import (
    MATRIX_DIMS,
    Source,
    check_masks,
    directory_of,
    is_mask,
    open_source,
)

NOT_STATED = "its zeros are not what its sparsity.json says; was it changed after it was written?"


def inspect(model: nn.Module | str | Path) -> dict[str, Any]:
    """The sparsity report of a model, with the keys of sparsity.json. For a checkpoint (directory,
    file or Hub name) it has every key of `Inspection`.
    """
    if isinstance(model, nn.Module):
        return report(masks_of(model) or zero_masks(model))
    return inspect_checkpoint(str(model)).values()


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A checkpoint that was read once: what was found, and the masks [out, in] that it is about."""

    found: Inspection
    masks: Masks
    num_heads: NumHeads | None  # of its attention; None where its configuration doesn't say


def inspect_checkpoint(name: str, source: Source | None = None) -> Inspection:
    """Read a checkpoint in a directory, in a file or on the Hub once, and count."""
    return inspect_masks(name, source).found


def inspect_masks(name: str, source: Source | None = None) -> Inspected:
    """The same with the masks, of a byte a weight."""
    source = source or open_source(name)
    stated = _stated(source.read_json("sparsity.json"), name)
    read = _read(source, set(stated["tensors"]) if stated else set(), name)
    found = report(read.masks)
    chosen_by = stated.pop(KEY, []) if stated else []
    is_equal = all(found[key] == value for key, value in (stated or {}).items())
    layers = _layers(found["tensors"], read.dense)
    zeros, size = found["total"]["zeros"], found["total"]["size"]
    sizes: dict[str, int | None] = {"dense": read.dense_bytes, "file": source.file_bytes}
    limit = math.ceil(read.limit_bytes)
    sizes["limit"] = limit if limit <= source.file_bytes else None  # a file in 8 bits is below it
    inspection = Inspection(
        name=name,
        **found,
        dense=read.dense,
        bytes=source.file_bytes,
        stated=None if stated is None else "matches" if is_equal else "differs",
        chosen_by=chosen_by if is_equal else [],
        patterns=read.patterns,
        layers=layers,
        encoder=_sum(layers),
        whole=Share.of(zeros, size + sum(part["size"] for part in read.excluded.values())),
        excluded=read.excluded,
        sizes=sizes,
        downloaded_bytes=source.downloaded_bytes(),
    )
    return Inspected(found=inspection, masks=read.masks, num_heads=read.num_heads)


def check_stated(name: str) -> dict[str, Any]:
    """The sparsity report of a checkpoint; `ModelError` if its own sparsity.json says another."""
    found = inspect(directory_of(name))
    if found["stated"] == "differs":
        raise ModelError(f"{name}: {NOT_STATED}")
    return found


def stated_report(directory: Path) -> dict[str, Any] | None:
    """What a directory's own sparsity.json says, if it has one."""
    path = directory / "sparsity.json"
    return _stated(read_object(path), directory) if os.path.lexists(path) else None


def _stated(values: Any, where: object) -> dict[str, Any] | None:  # Any: what JSON can hold
    if values is None:
        return None
    try:
        Stated.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ModelError(f"{where}/sparsity.json: not a sparsity report: {what}") from error
    return {key: values[key] for key in Stated.model_fields if key in values}


@dataclass
class _Found:
    """What one pass over the tensors of a checkpoint found."""

    masks: Masks = field(default_factory=dict)
    patterns: dict[str, Structure] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, dict[str, int]] = field(default_factory=dict)
    dense_bytes: int = 0
    limit_bytes: float = 0.0
    num_heads: NumHeads | None = None


def _read(source: Source, stated: set[str], where: str) -> _Found:
    """One pass; the stated tensors count as pruned in any case."""
    found, beside, live = _Found(), {}, {}
    found.excluded = {part: {"tensors": 0, "size": 0} for part in PARTS}
    num_heads = found.num_heads = _num_heads(source.read_json("config.json"))

    def is_linear(name: str, shape: Sequence[int]) -> bool:
        return is_matrix(name, shape) or (name in stated and len(shape) == MATRIX_DIMS)

    def wanted(name: str, shape: Sequence[int]) -> bool:
        return is_linear(name, shape) or is_mask(name, shape)

    for name, tensor in source.tensors(wanted):
        num_bytes = tensor.numel() * tensor.element_size()
        found.dense_bytes += num_bytes
        mask = nonzero(tensor) if num_bytes and wanted(name, tensor.shape) else None
        if mask is not None and (name in stated or _is_pruned(name, mask)):
            found.masks[name] = mask
            found.patterns[name] = structure_of(mask, heads_of(name, num_heads))
            found.limit_bytes += _limit(mask, tensor.element_size())
            continue
        part = found.excluded[part_of(name, tensor.shape)]
        part["tensors"] += 1
        part["size"] += tensor.numel()
        found.limit_bytes += num_bytes
        if is_linear(name, tensor.shape):
            found.dense[name] = tensor.numel()
            live[name] = torch.ones(1, 1, dtype=torch.bool).expand(tensor.shape)  # of no size
        elif mask is not None:
            beside[name] = mask
    if not found.dense_bytes:
        raise ModelError(f"{where}: its files hold no weights")
    check_masks(beside, {**live, **found.masks}, where)
    return found


def _is_pruned(name: str, mask: Tensor) -> bool:
    num_zeros = mask.numel() - int(mask.count_nonzero())
    return is_matrix(name, mask.shape) and is_pruned(name, mask.shape, num_zeros)


def _limit(mask: Tensor, value_bytes: int) -> float:
    """The fewest bytes of a matrix: the entropy of its zeros' positions, and its live values."""
    num_live = int(mask.count_nonzero())
    shares = num_live / mask.numel(), 1 - num_live / mask.numel()
    bits = -sum(share * math.log2(share) for share in shares if share)
    return bits * mask.numel() / 8 + num_live * value_bytes


def _num_heads(config: Any) -> NumHeads | None:  # Any: what JSON can hold
    by_layer = config.get("per_layer_config") if isinstance(config, dict) else None
    layers = by_layer.items() if isinstance(by_layer, dict) else ()
    counts = {int(key): _count(layer) for key, layer in layers if key.isdecimal()}
    own = {number: count for number, count in counts.items() if count is not None}
    return NumHeads(most, own) if (most := _count(config)) else None


def _count(values: Any) -> int | None:  # Any: what JSON can hold
    if not isinstance(values, dict):
        return None
    found = values.get("num_attention_heads", values.get("n_heads"))  # DistilBERT's word for it
    return found if type(found) is int and found >= 0 else None


def _layers(tensors: dict[str, Any], dense: dict[str, int]) -> list[Layer]:
    shares = {name: Share.of(0, size) for name, size in dense.items()}
    for name, row in tensors.items():
        shares[name] = Share.of(row["zeros"], math.prod(row["shape"]))
    rows = []
    for (stack, number), found in by_layer(shares).items():
        kinds = {kind: share.sparsity for kind, share in found.items()}
        rows.append(Layer(**dict(_sum(found.values())), stack=stack, layer=number, kinds=kinds))
    return rows


def _sum(shares: Iterable[Share]) -> Share:
    shares = list(shares)
    return Share.of(sum(share.zeros for share in shares), sum(share.size for share in shares))
