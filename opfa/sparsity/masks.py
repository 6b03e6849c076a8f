"""Masks: which weights live, what is reported of them, and their files. True = kept, always."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "opfa-sparsity/1"
Masks = dict[str, Tensor]


def nonzero(weight: Tensor) -> Tensor:
    """The mask that the zeros of a tensor imply, of any type; -0.0 is a zero."""
    is_8_bit_float = weight.is_floating_point() and weight.element_size() == 1
    return (weight.float() if is_8_bit_float else weight) != 0


def nonzero_masks(weights: Mapping[str, Tensor]) -> Masks:
    """The masks that the zeros of these tensors imply."""
    return {name: nonzero(weight) for name, weight in weights.items()}


def relative_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the module path that they all share, such as the `bert.` of a base model."""
    names = list(names)
    parents = [name.split(".")[:-1] for name in names]
    shared = len(os.path.commonprefix(parents))
    return {name: ".".join(name.split(".")[shared:]) for name in names}


def fingerprint(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (relative), shapes and packed bits; the same on any machine."""
    digest, short = hashlib.sha256(), relative_names(masks)
    for name, mask in sorted(masks.items()):
        digest.update(f"{short[name]}{tuple(mask.shape)}".encode())
        digest.update(np.packbits(mask.cpu().numpy()).tobytes())
    return digest.hexdigest()


def report(masks: Mapping[str, Tensor]) -> dict:
    """What `sparsity.json` holds: exact counts in total and per tensor, and the fingerprint."""
    tensors = {}
    for name, mask in masks.items():
        zeros = mask.numel() - int(mask.sum())
        share = zeros / mask.numel() if zeros else 0.0
        tensors[name] = {"shape": list(mask.shape), "zeros": zeros, "sparsity": share}
    zeros = sum(tensor["zeros"] for tensor in tensors.values())
    size = sum(mask.numel() for mask in masks.values())
    return {
        "format": FORMAT,
        "total": {"zeros": zeros, "size": size, "sparsity": zeros / size if size else 0.0},
        "tensors": tensors,
        "fingerprint": fingerprint(masks),
    }


def save(masks: Mapping[str, Tensor], path: Path) -> None:
    """Write masks packed, one bit a weight, as safetensors."""
    packed = {n: torch.from_numpy(np.packbits(m.cpu().numpy())) for n, m in masks.items()}
    shapes = {n: ",".join(str(extent) for extent in m.shape) for n, m in masks.items()}
    save_file(packed, path, metadata=shapes or None)  # it can't read an empty one back


def load(path: Path) -> Masks:
    """Read masks that `save` wrote."""
    masks = {}
    with safe_open(path, "pt") as file:
        for name, shape in (file.metadata() or {}).items():
            extents = [int(extent) for extent in shape.split(",")]
            bits = np.unpackbits(file.get_tensor(name).numpy(), count=int(np.prod(extents)))
            masks[name] = torch.from_numpy(bits).bool().view(extents)
    return masks
