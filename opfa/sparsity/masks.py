"""Masks: which weights live. True = kept, always.

Exact selection: the k smallest |w| are pruned, counted with integers. Non-negative IEEE floats
order like their bits read as integers, so the k-th magnitude is found with two histograms of int32
bits (15 high, then 16 low bits), without sorting. Ties at the threshold go by (tensor, position):
the lower index is kept. Plain `|w| > t` thresholds miss the count as soon as values repeat, which
is the rule for weights that came from bf16.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "opfa-sparsity/1"
CHUNK = 1 << 22  # elements per histogram pass; bounds the extra memory
Masks = dict[str, Tensor]


def num_zeros(sparsity: float, size: int) -> int:
    """The exact number of zeros among `size` weights: round(sparsity * size), half to even as in
    Python.
    """
    return round(sparsity * size)


@dataclass(frozen=True)
class Ranks:
    """Processes that share tensors out: each holds one run of every flattened tensor, the lower
    rank the earlier run. `total` sums an integer array over them (collective).
    """

    rank: int = 0
    size: int = 1
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts


ALONE = Ranks()


def magnitude_mask(weight: Tensor, k: int) -> Tensor:
    """Keep all but the `k` smallest magnitudes of one fp32 tensor. Ties go to the lower index."""
    return global_magnitude_masks({"": weight}, k)[""]


def global_magnitude_masks(weights: Mapping[str, Tensor], k: int, ranks: Ranks = ALONE) -> Masks:
    """Keep all but the `k` smallest magnitudes of all tensors together.

    Ties go to the earlier tensor, then to the lower index, so the count is exact even when bf16
    weights repeat. With several `ranks`, `weights` are this one's runs and so are the masks; only
    histograms travel (768 KiB). Collective then. Raises `ValueError` for other types than fp32 and,
    on every rank, for non-finite weights.
    """
    flat = {name: _flat(name, weight) for name, weight in weights.items()}
    size = _finite_size(flat, ranks)
    if not 0 <= k <= size:
        raise ValueError(f"k = {k}: must be between 0 and the number of weights, {size}")
    if k == 0:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    threshold, num_below, num_tied = _kth_smallest(list(flat.values()), k, ranks)
    num_to_keep = num_tied - (k - num_below)
    masks, tied = {}, []
    for name, values in flat.items():
        bits = _magnitude_bits(values)
        masks[name] = bits > threshold
        if num_to_keep:
            tied.append((bits == threshold).nonzero().view(-1))
    quotas = _quotas(tied, num_to_keep, ranks) if num_to_keep else []
    for mask, places, quota in zip(masks.values(), tied, quotas, strict=bool(quotas)):
        mask[places[:quota]] = True
    return {name: mask.view(weights[name].shape) for name, mask in masks.items()}


def _flat(name: str, weight: Tensor) -> Tensor:
    if weight.dtype != torch.float32:
        raise ValueError(f"{name or 'weight'}: scores must be fp32, not {weight.dtype}")
    return weight.detach().contiguous().view(-1)


def _finite_size(tensors: Mapping[str, Tensor], ranks: Ranks) -> int:
    counts = [(v.numel(), not bool(v.isfinite().all())) for v in tensors.values()]
    totals = ranks.total(np.array(counts, dtype=np.int64).reshape(-1, 2))
    for name, is_bad in zip(tensors, totals[:, 1], strict=True):
        if is_bad:
            raise ValueError(f"{name or 'weight'}: holds a non-finite weight")
    return int(totals[:, 0].sum())


def _quotas(tied: list[Tensor], num_to_keep: int, ranks: Ranks) -> list[int]:
    """How many of this rank's tied weights are kept, tensor by tensor."""
    counts = np.zeros((len(tied), ranks.size), dtype=np.int64)
    counts[:, ranks.rank] = [len(places) for places in tied]
    counts = ranks.total(counts)
    before = np.cumsum(counts).reshape(counts.shape) - counts  # by tensor, then by rank
    kept = np.clip(num_to_keep - before, 0, counts)
    return kept[:, ranks.rank].tolist()


def _magnitude_bits(values: Tensor) -> Tensor:
    return values.view(torch.int32) & 0x7FFFFFFF


def _kth_smallest(tensors: list[Tensor], k: int, ranks: Ranks) -> tuple[int, int, int]:
    """The k-th smallest magnitude (counted from 1) as bits, how many are smaller, and how many are
    equal. Bits are made chunk by chunk and not kept.
    """
    chunks = [chunk for tensor in tensors for chunk in tensor.split(CHUNK)]
    high_counts = np.zeros(1 << 15, dtype=np.int64)
    for chunk in chunks:
        high_counts += _histogram(_magnitude_bits(chunk) >> 16, 1 << 15)
    high, num_below = _bin_of(ranks.total(high_counts), k)
    low_counts = np.zeros(1 << 16, dtype=np.int64)
    for chunk in chunks:
        bits = _magnitude_bits(chunk)
        low_counts += _histogram(bits[(bits >> 16) == high] & 0xFFFF, 1 << 16)
    low_counts = ranks.total(low_counts)
    low, num_below_in_bin = _bin_of(low_counts, k - num_below)
    return high << 16 | low, num_below + num_below_in_bin, int(low_counts[low])


def _histogram(values: Tensor, num_bins: int) -> np.ndarray:
    if values.is_cuda:
        return torch.bincount(values, minlength=num_bins).cpu().numpy()
    return np.bincount(values.numpy(), minlength=num_bins)  # on CPU faster than torch's


def _bin_of(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th smallest item, and how many items lie in the bins before it."""
    cumulative = np.cumsum(counts)
    index = int(np.searchsorted(cumulative, k))
    return index, int(cumulative[index] - counts[index])


def nonzero(weight: Tensor) -> Tensor:
    """The mask that the zeros of a tensor imply, of any type; -0.0 is a zero."""
    is_8_bit_float = weight.is_floating_point() and weight.element_size() == 1
    return (weight.float() if is_8_bit_float else weight) != 0


def nonzero_masks(weights: Mapping[str, Tensor]) -> Masks:
    """The masks that the zeros of these tensors imply."""
    return {name: nonzero(weight) for name, weight in weights.items()}


def relative_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the module path that they all share.

    So `bert.encoder.layer.0.…` of a pre-training model and `encoder.layer.0.…` of a bare encoder
    are the same.
    """
    names = list(names)
    parents = [name.split(".")[:-1] for name in names]
    shared = 0
    while parents and all(len(p) > shared and p[shared] == parents[0][shared] for p in parents):
        shared += 1
    return {name: ".".join(name.split(".")[shared:]) for name in names}


def fingerprint(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (relative), shapes and packed bits.

    Equal masks, equal fingerprint, on any machine.
    """
    digest = hashlib.sha256()
    short = relative_names(masks)
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{short[name]}{tuple(mask.shape)}".encode())
        digest.update(np.packbits(mask.cpu().numpy()).tobytes())
    return digest.hexdigest()


def report(masks: Mapping[str, Tensor]) -> dict:
    """What `sparsity.json` holds: exact counts in total and per tensor, and the fingerprint."""
    tensors = {}
    for name, mask in masks.items():
        zeros = mask.numel() - int(mask.sum())
        tensors[name] = {
            "shape": list(mask.shape),
            "zeros": zeros,
            "sparsity": zeros / mask.numel() if zeros else 0.0,
        }
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
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = file.metadata() or {}
    masks = {}
    for name, packed in load_file(path).items():
        shape = [int(extent) for extent in shapes[name].split(",")]
        bits = np.unpackbits(packed.numpy(), count=int(np.prod(shape)))
        masks[name] = torch.from_numpy(bits).bool().view(shape)
    return masks
