"""Inspection: exact sparsity of a model in memory, or of any checkpoint in a directory or on the
Hub.

Only tensors are read, one at a time: no model class, no code of the checkpoint, no unsafe pickle. A
tensor counts as pruned when it is the matrix of a linear layer and has some zeros but not only
zeros. Embeddings are told by their names.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn

from opfa import compact
from opfa.recipe import ModelError
from opfa.sparsity.layers import masks_of, zero_masks
from opfa.sparsity.masks import Masks, nonzero_masks, report

EMBEDDING = re.compile(r"embed|wte|wpe|lm_head\.decoder|predictions\.decoder|vocab_projector")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def inspect(model: nn.Module | str | Path) -> dict[str, Any]:
    """The sparsity report of a model, or of a checkpoint by directory or Hub name.

    The keys of `sparsity.json`, and of a checkpoint also `dense` (the linear matrices without
    zeros, with their sizes), `bytes` (of its weight files), and `stated` (what its own
    sparsity.json says: "matches", "differs" or None).
    """
    if isinstance(model, nn.Module):
        return report(masks_of(model) or zero_masks(model))
    directory = directory_of(str(model))
    files = _weight_files(directory)
    stated = stated_report(directory)
    masks, dense = _masks(files, set(stated["tensors"]) if stated else set())
    result = report(masks)
    agreement = None if stated is None else all(stated[key] == result[key] for key in stated)
    return {
        **result,
        "dense": dense,
        "bytes": sum(file.stat().st_size for file in files),
        "stated": {None: None, True: "matches", False: "differs"}[agreement],
    }


def check_stated(name: str) -> dict[str, Any]:
    """The sparsity report of a checkpoint; raises `ModelError` if its own sparsity.json says
    something else.
    """
    found = inspect(name)
    if found["stated"] == "differs":
        raise ModelError(
            f"{name}: its zeros are not what its sparsity.json says; was it changed after it was "
            "written?"
        )
    return found


def stated_report(directory: Path) -> dict[str, Any] | None:
    """What a directory's own sparsity.json says, if it has one."""
    path = directory / "sparsity.json"
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text())
        return {
            "tensors": stated["tensors"],
            "fingerprint": stated["fingerprint"],
            "total": stated["total"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a sparsity report: {error!r}") from error


def directory_of(name: str) -> Path:
    """The directory of a checkpoint; one of the Hub is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such directory")
    patterns = ["*.safetensors", "*.json"]
    try:
        found = Path(snapshot_download(name, allow_patterns=patterns))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=["pytorch_model*.bin", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: no such directory, and not to be had from the Hub: {reason}"
        ) from error
    return found


def _weight_files(directory: Path) -> list[Path]:
    for pattern in WEIGHT_FILES:
        files = [f for f in sorted(directory.glob(pattern)) if f.name != "quantization.safetensors"]
        if files:
            return files
    raise ModelError(f"{directory}: has no weights ({' or '.join(WEIGHT_FILES)})")


def _masks(files: list[Path], stated: set[str]) -> tuple[Masks, dict[str, int]]:
    """Masks of the pruned tensors, the stated ones in any case, and the sizes of the others."""
    masks: Masks = {}
    dense: dict[str, int] = {}
    for file in files:
        for name, tensor in _tensors(file):
            if tensor.ndim != 2 or not name.endswith("weight") or EMBEDDING.search(name):
                continue
            mask = nonzero_masks({name: tensor})[name]
            if name not in stated and (mask.all() or not mask.any()):
                dense[name] = tensor.numel()
            else:
                masks[name] = mask
    return masks, dense


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".bin":
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield from state.items()
            return
        yield from compact.tensors(file)
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise ModelError(f"{file}: can't be read: {str(error).splitlines()[0]}") from error
