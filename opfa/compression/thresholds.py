"""Thresholds: prune what is at or below one, on any number of ranks, up to a limit.

How much that is gets counted, and then so many of the lowest go, by the selection of a count.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from opfa.compression.selection import Ranks, Scope, keep
from opfa.sparsity.masks import Masks


def keep_above(
    least: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    most: float,
    scope: Scope,
    ranks: Ranks,
    candidates: Mapping[str, Tensor] | None,
) -> Masks:
    """Prune what is at or below `least`, up to a share of each tensor or of all; collective."""
    lows = {n: s <= least[n] for n, s in scores.items()}
    if candidates is not None:
        lows = {name: low | ~candidates[name] for name, low in lows.items()}
    counts = ranks.total(np.array([(int(low.sum()), low.numel()) for low in lows.values()]))
    of_each = dict(zip(scores, counts, strict=True))
    masks: Masks = {}
    for names in [[*scores]] if scope == "global" else [[name] for name in scores]:
        num_low, size = np.sum([of_each[name] for name in names], axis=0)
        alive = None if candidates is None else {name: candidates[name] for name in names}
        k = min(int(num_low), int(most * size))
        masks |= keep({name: scores[name] for name in names}, k, ranks, alive)
    return masks
