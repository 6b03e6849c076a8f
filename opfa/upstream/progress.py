"""The global batch's losses, and held-out losses. Only here a run waits for its GPU."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from opfa.errors import RunError
from opfa.training import distributed
from opfa.upstream.batches import Batch
from opfa.upstream.objective import PLAIN, Counts, Losses, Objective, Targets


@torch.no_grad()
def mean_losses(
    module: Objective,
    batches: Iterable[Batch],
    teacher: Callable[[Batch], Targets] | None = None,
    *,
    is_of_states_alone: bool = False,
) -> dict[str, float]:
    """An `Objective`'s mean losses per predicted token and sequence, without dropout; with a
    teacher also the distance of hidden states per real token, or that alone. `loss` is there where
    it is what training minimizes: not beside the losses that a teacher is only a part of.
    """
    module.eval()
    sums, counts = [0.0] * 4, [0] * 4
    for batch in batches:
        found: Losses = module(batch, teacher(batch) if teacher else None, Counts(1.0, 1.0, 1.0))
        masked, real, sequences = batch.counts()
        parts = found.mlm, found.nsp, found.hidden, found.total
        sums = [a + float(b) for a, b in zip(sums, parts, strict=True)]
        counts = [a + b for a, b in zip(counts, (masked, sequences, real, real), strict=True)]
    module.train()
    mlm, nsp, hidden, total = (a / max(1, b) for a, b in zip(sums, counts, strict=True))
    if is_of_states_alone:
        return {"loss": total, "hidden_loss": hidden}
    means = {"mlm_loss": mlm, "nsp_loss": nsp}
    if module.distillation is PLAIN:
        return {"loss": mlm + nsp, **means}
    return {**means, "hidden_loss": hidden} if teacher else means


def global_losses(
    losses: Sequence[Sequence[torch.Tensor]], step: int, *, is_of_states_alone: bool = False
) -> dict[str, float]:
    """The losses of the global batch, from this rank's micro-batches, or of hidden states alone.

    Collective, and waits for a GPU; raises `RunError` on every rank when one is not finite.
    """
    local = torch.stack([torch.stack(tuple(parts)) for parts in losses]).double().sum(0).tolist()
    total, *parts = distributed.sum_over_ranks(local)
    if not math.isfinite(total):
        places = distributed.gather_texts(f"{local[0]}")
        ranks = [rank for rank, value in enumerate(places) if value in ("nan", "inf", "-inf")]
        what = f"the loss is not finite on rank {ranks}; nothing was changed by this step"
        raise RunError(f"step {step + 1}: {what}")
    if is_of_states_alone:
        return {"loss": total, "hidden_loss": parts[-1]}
    names = (f"{name}_loss" for name in Losses._fields[1:])
    return {"loss": total, **dict(zip(names, parts, strict=True))}
