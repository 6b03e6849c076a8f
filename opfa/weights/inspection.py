"""Inspection: exact sparsity of a model in memory, or of any checkpoint in a directory, in a file
or on the Hub.

Only tensors are read, one at a time: no model class, no code of the checkpoint, no unsafe pickle. A
tensor counts as pruned when it is the matrix of a linear layer and has zeros; one of zeros alone
only in the encoder (`anatomy.is_pruned`). Embeddings are told by their names. What is not pruned is
counted by parts, so that a reader sees what a sparsity refers to.
"""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from opfa.errors import ModelError
from opfa.sparsity.anatomy import PARTS, heads_of, is_matrix, is_pruned, layer_of, part_of
from opfa.sparsity.layers import masks_of, zero_masks
from opfa.sparsity.masks import Masks, nonzero, report
from opfa.sparsity.structure import structure_of
from opfa.storage.foreign import read_object
from opfa.weights.comparison import compare as compare
from opfa.weights.sources import MATRIX_DIMS, Source, check_masks, is_mask, open_source
from opfa.weights.sources import directory_of as directory_of


def inspect(model: nn.Module | str | Path | Source) -> dict[str, Any]:
    """The sparsity report of a model; of a checkpoint by directory, file or Hub name much more.

    The keys of `sparsity.json`, and of a checkpoint also `dense` (the linear matrices without
    zeros, with their sizes), `bytes` (of its weight files), `stated` (what its own sparsity.json
    says: "matches", "differs" or None), `patterns` (what structure the zeros of each tensor have),
    `layers`, `encoder` and `whole` (sparsity by numbered layer, of all of them, and of everything
    in the file), `excluded` (what has no zeros, by parts), `sizes` and `downloaded_bytes`.
    """
    if isinstance(model, nn.Module):
        return report(masks_of(model) or zero_masks(model))
    source = model if isinstance(model, Source) else open_source(str(model))
    stated = _stated(source.read_json("sparsity.json"), model)
    found = _read(source, set(stated["tensors"]) if stated else set(), model)
    result = report(found.masks)
    agreement = None if stated is None else all(stated[key] == result[key] for key in stated)
    layers = _layers(result, found)
    limit = math.ceil(found.limit_bytes)  # of the tensors; a file in 8 bits is below it
    return {
        **result,
        "dense": found.dense,
        "bytes": source.file_bytes,
        "stated": {None: None, True: "matches", False: "differs"}[agreement],
        "patterns": found.patterns,
        "layers": layers,
        "encoder": _share(layers),
        "whole": _share([result["total"], *found.excluded.values()]),
        "excluded": found.excluded,
        "sizes": {
            "dense": found.dense_bytes,
            "file": source.file_bytes,
            "limit": limit if limit <= source.file_bytes else None,
        },
        "downloaded_bytes": source.downloaded_bytes(),
    }


def check_stated(name: str) -> dict[str, Any]:
    """The sparsity report of a checkpoint that is going to be used; raises `ModelError` if its own
    sparsity.json says something else.
    """
    found = inspect(directory_of(name))
    if found["stated"] == "differs":
        raise ModelError(
            f"{name}: its zeros are not what its sparsity.json says; was it changed after it was "
            "written?"
        )
    return found


def stated_report(directory: Path) -> dict[str, Any] | None:
    """What a directory's own sparsity.json says, if it has one."""
    path = directory / "sparsity.json"
    return _stated(read_object(path), directory) if os.path.lexists(path) else None


class _Tensor(BaseModel, strict=True):
    """A row of a sparsity report."""

    shape: list[int]
    zeros: int
    sparsity: float


class _Total(BaseModel, strict=True):
    size: int
    zeros: int
    sparsity: float


class _Stated(BaseModel, strict=True):
    """What counts of a sparsity report."""

    tensors: dict[str, _Tensor]
    fingerprint: str
    total: _Total


def _stated(values: Any, where: object) -> dict[str, Any] | None:  # Any: what JSON can hold
    if values is None:
        return None
    try:
        _Stated.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"{where}/sparsity.json: not a sparsity report: {key}: {first['msg']}"
        ) from error
    return {key: values[key] for key in _Stated.model_fields}


@dataclass
class _Found:
    """What one pass over the tensors of a checkpoint found."""

    masks: Masks = field(default_factory=dict)
    patterns: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, dict[str, int]] = field(
        default_factory=lambda: {part: {"tensors": 0, "size": 0} for part in PARTS}
    )
    dense_bytes: int = 0
    limit_bytes: float = 0.0


def _read(source: Source, stated: set[str], where: object) -> _Found:
    """One pass; the stated tensors count as pruned in any case."""
    found, beside, live = _Found(), {}, {}
    num_heads = _num_heads(source.read_json("config.json"))

    def is_linear(name: str, shape: Sequence[int]) -> bool:
        return is_matrix(name, shape) or (name in stated and len(shape) == MATRIX_DIMS)

    def wanted(name: str, shape: Sequence[int]) -> bool:
        return is_linear(name, shape) or is_mask(name, shape)

    for name, tensor in source.tensors(wanted):
        num_bytes = tensor.numel() * tensor.element_size()
        found.dense_bytes += num_bytes
        mask = nonzero(tensor) if num_bytes and wanted(name, tensor.shape) else None
        if mask is not None and _is_pruned(name, mask, stated):
            found.masks[name] = mask
            heads = heads_of(name, num_heads) if num_heads else None
            found.patterns[name] = asdict(structure_of(mask, heads))
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


def _is_pruned(name: str, mask: Tensor, stated: set[str]) -> bool:
    num_zeros = mask.numel() - int(mask.count_nonzero())
    is_found = is_matrix(name, mask.shape) and is_pruned(name, mask.shape, num_zeros)
    return is_found or name in stated


def _limit(mask: Tensor, value_bytes: int) -> float:
    """The fewest bytes for a matrix whose zeros lie anywhere: the entropy of their positions, and
    the live values as they are.
    """
    num_live = int(mask.count_nonzero())
    shares = [num_live / mask.numel(), 1 - num_live / mask.numel()]
    bits = -sum(share * math.log2(share) for share in shares if share)
    return bits * mask.numel() / 8 + num_live * value_bytes


def _num_heads(config: Any) -> int | None:  # Any: what JSON can hold
    values = config if isinstance(config, dict) else {}
    found = values.get("num_attention_heads", values.get("n_heads"))  # DistilBERT's word for it
    return found if type(found) is int and found > 0 else None


def _layers(result: dict[str, Any], found: _Found) -> list[dict[str, Any]]:
    """Zeros of each numbered layer's matrices, pruned or not, and the sparsity of each kind."""
    matrices = {name: (0, size) for name, size in found.dense.items()}
    for name, row in result["tensors"].items():
        matrices[name] = row["zeros"], math.prod(row["shape"])
    grouped: dict[tuple[str, int], dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, counts in matrices.items():
        layer = layer_of(name)
        if layer is not None:
            grouped[layer.stack, layer.number][layer.kind] = counts
    rows = []
    for (stack, number), kinds in sorted(grouped.items()):
        zeros, size = (sum(counts[i] for counts in kinds.values()) for i in (0, 1))
        row = {"stack": stack, "layer": number, "zeros": zeros, "size": size}
        shares = {kind: z / n if n else 0.0 for kind, (z, n) in kinds.items()}
        rows.append({**row, "sparsity": zeros / size if size else 0.0, "kinds": shares})
    return rows


def _share(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Zeros among all weights of these rows; a row without zeros is dense."""
    zeros, size = (sum(row.get(key, 0) for row in rows) for key in ("zeros", "size"))
    return {"zeros": zeros, "size": size, "sparsity": zeros / size if size else 0.0}
