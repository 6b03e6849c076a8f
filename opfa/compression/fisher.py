"""Which units of a group go first, by a quadratic model of the loss.

With gates at one, removing the set R of units adds about 1/2 sum of F[i, j] over i, j in R, where F
is the Fisher information of the gates (Kwon et al. 2022, eq. 7). Units of one group depend on each
other, so F is used whole there; between groups its entries are taken to be zero.
"""

import torch
from torch import Tensor


def removal(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """Units in the order in which they go, and the loss when 0, 1, ... of them are gone.

    The next one to go is always the one that adds least to what is gone already.
    """
    num_units = len(fisher)
    added, order = fisher.diagonal().clone(), list[int]()
    losses = fisher.new_zeros(num_units + 1)
    for number in range(num_units):
        unit = int(added.argmin())
        losses[number + 1] = losses[number] + added[unit] / 2
        order.append(unit)
        added += 2 * fisher[unit]
        added[unit] = torch.inf
    return torch.tensor(order, dtype=torch.long), losses


def improve(fisher: Tensor, is_gone: Tensor) -> Tensor:
    """Exchange a unit that is gone for one that is kept, as long as the loss falls by it; the best
    pair first. The number of units stays.
    """
    is_gone, own = is_gone.clone(), fisher.diagonal()
    for _ in range(len(fisher)):
        gone, kept = is_gone.nonzero()[:, 0], (~is_gone).nonzero()[:, 0]
        if not len(gone) or not len(kept):
            break
        shared = fisher[gone].sum(0)  # what a unit shares with all that are gone
        back, away = own[gone] - 2 * shared[gone], own[kept] + 2 * shared[kept]
        change = back[:, None] + away - 2 * fisher[gone][:, kept]
        best = int(change.argmin())
        if not change.view(-1)[best] < -1e-9 * own.sum():
            break
        is_gone[gone[best // len(kept)]] = False
        is_gone[kept[best % len(kept)]] = True
    return is_gone


def gone(fisher: Tensor, order: Tensor, num_kept: int) -> Tensor:
    """Which units go, True in [units], if so many are kept: the first of `order`, improved."""
    is_gone = torch.zeros(len(order), dtype=torch.bool)
    is_gone[order[: len(order) - num_kept]] = True
    return improve(fisher, is_gone)
