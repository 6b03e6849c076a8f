"""Selection: prune exactly the k lowest scores, on any number of ranks.

IEEE floats order like their bits read as integers, once the lower 31 bits of negative ones are
flipped. So the k-th lowest score is found with two histograms (16 high bits, then 16 low ones),
without sorting. Ties at the threshold go by (tensor, position): the lower index is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opfa.sparsity.masks import Masks

CHUNK = 1 << 22  # scores per histogram pass; bounds the extra memory
LOWEST = -(1 << 31)  # below every score's integer
Scope = Literal["layer", "global"]


def num_zeros(sparsity: float, size: int) -> int:
    """The exact number of zeros among `size`: round(sparsity * size), half to even as in Python."""
    return round(sparsity * size)


@dataclass(frozen=True)
class Ranks:
    """Processes that share tensors: each holds a run of every flattened one, in order of rank."""

    rank: int = 0
    size: int = 1
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts  # over ranks; collective


ALONE = Ranks()


def select(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: Scope,
    ranks: Ranks = ALONE,
    candidates: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Prune every tensor ("layer"), or all together ("global"), to a sparsity; collective."""
    sizes = ranks.total(np.array([score.numel() for score in scores.values()])).tolist()
    if scope == "global":
        return keep(scores, num_zeros(sparsity, sum(sizes)), ranks, candidates)
    masks: Masks = {}
    for (name, score), size in zip(scores.items(), sizes, strict=True):
        alive = {name: candidates[name]} if candidates is not None else None
        masks |= keep({name: score}, num_zeros(sparsity, size), ranks, alive)
    return masks


def keep(
    scores: Mapping[str, Tensor],
    k: int,
    ranks: Ranks = ALONE,
    candidates: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Keep all but the `k` lowest fp32 scores of all tensors together.

    Where `candidates` is False a score counts as lower than all others. With several `ranks`
    (collective), scores, candidates and masks are this rank's runs, and only histograms travel.
    Raises `ValueError` for other types than fp32 and, on every rank, for non-finite scores.
    """
    if others := [name for name, score in scores.items() if score.dtype != torch.float32]:
        raise ValueError(f"{others[0]}: scores must be fp32, not {scores[others[0]].dtype}")
    flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
    size = _finite_size(flat, ranks)
    if not 0 <= k <= size:
        raise ValueError(f"k = {k}: must be between 0 and the number of scores, {size}")
    if k == 0:
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    alive = {n: None if candidates is None else candidates[n].reshape(-1) for n in flat}
    threshold, num_below, num_tied = _kth_lowest(flat, alive, k, ranks)
    num_to_keep = num_tied - (k - num_below)
    masks, tied = {}, []
    for name, values in flat.items():
        order = _order(values, alive[name])
        masks[name] = order > threshold
        if num_to_keep:
            tied.append((order == threshold).nonzero().view(-1))
    quotas = _quotas(tied, num_to_keep, ranks) if num_to_keep else []
    for mask, places, quota in zip(masks.values(), tied, quotas, strict=bool(quotas)):
        mask[places[:quota]] = True
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


def magnitude_mask(weight: Tensor, k: int) -> Tensor:
    """Keep all but the `k` smallest magnitudes of one fp32 tensor."""
    return keep({"weight": weight.abs()}, k)["weight"]


def _finite_size(tensors: Mapping[str, Tensor], ranks: Ranks) -> int:
    counts = [(v.numel(), not bool(v.isfinite().all())) for v in tensors.values()]
    totals = ranks.total(np.array(counts, dtype=np.int64).reshape(-1, 2))
    for name, is_bad in zip(tensors, totals[:, 1], strict=True):
        if is_bad:
            raise ValueError(f"{name}: holds a non-finite weight or score")
    return int(totals[:, 0].sum())


def _order(values: Tensor, alive: Tensor | None) -> Tensor:
    """Integers (int32) that order as the scores do; -0.0 is 0.0."""
    bits = (values + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits if alive is None else bits.masked_fill_(~alive, LOWEST)


def _kth_lowest(
    flat: Mapping[str, Tensor], alive: Mapping[str, Tensor | None], k: int, ranks: Ranks
) -> tuple[int, int, int]:
    """The k-th lowest score as an integer, how many are lower, and how many are equal."""
    ((name, only), *others) = flat.items()
    if only.is_cuda and not others and ranks.size == 1 and len(only) <= CHUNK:
        return _kth_by_sorting(_order(only, alive[name]), k)

    def count(digit: Callable[[Tensor], Tensor]) -> np.ndarray:
        counts = np.zeros(1 << 16, dtype=np.int64)
        for name, values in flat.items():
            marks = alive[name]
            for start in range(0, len(values), CHUNK):
                part = slice(start, start + CHUNK)
                order = _order(values[part], None if marks is None else marks[part])
                counts += _histogram(digit(order))
        return ranks.total(counts)

    high, num_below = _bin_of(count(lambda order: (order >> 16) + (1 << 15)), k)
    high -= 1 << 15
    counts = count(lambda order: order[(order >> 16) == high] & 0xFFFF)
    low, num_below_in_bin = _bin_of(counts, k - num_below)
    return high << 16 | low, num_below + num_below_in_bin, int(counts[low])


def _kth_by_sorting(order: Tensor, k: int) -> tuple[int, int, int]:
    """What histograms find: on a GPU faster for one matrix, as nothing travels meanwhile."""
    kth = order.sort().values[k - 1]
    found = torch.stack([kth, (order < kth).sum(), (order == kth).sum()])
    return tuple(found.tolist())


def _histogram(values: Tensor) -> np.ndarray:
    if values.is_cuda:
        return torch.bincount(values, minlength=1 << 16).cpu().numpy()
    return np.bincount(values.numpy(), minlength=1 << 16)  # on CPU faster than torch's


def _bin_of(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th lowest item, and how many items lie in the bins before it."""
    cumulative = np.cumsum(counts)
    index = int(np.searchsorted(cumulative, k))
    return index, int(cumulative[index] - counts[index])


def _quotas(tied: list[Tensor], num_to_keep: int, ranks: Ranks) -> list[int]:
    """How many of this rank's tied scores are kept, tensor by tensor."""
    counts = np.zeros((len(tied), ranks.size), dtype=np.int64)
    counts[:, ranks.rank] = [len(places) for places in tied]
    counts = ranks.total(counts)
    before = np.cumsum(counts).reshape(counts.shape) - counts  # by tensor, then by rank
    kept = np.clip(num_to_keep - before, 0, counts)
    return kept[:, ranks.rank].tolist()
