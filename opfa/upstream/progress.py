"""How an upstream run goes: the global batch's losses, held-out losses, tokens per second.

Only here a run waits for its GPU: losses stay where they were computed until a row is logged.
"""

import math
import time
from collections.abc import Iterable

import torch
from torch import nn

from opfa import distributed
from opfa.recipe import RunError
from opfa.upstream.batches import Batch
from opfa.upstream.objective import Counts, Losses


@torch.no_grad()
def mean_losses(module: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """The mean losses per predicted token and per sequence of an `Objective`, without dropout."""
    module.eval()
    totals, num_masked, num_sequences = [0.0, 0.0], 0, 0
    for batch in batches:
        losses: Losses = module(batch, None, Counts(1.0, 1.0, 1.0))
        masked, _, sequences = batch.counts()
        totals[0] += float(losses.mlm)
        totals[1] += float(losses.nsp)
        num_masked, num_sequences = num_masked + masked, num_sequences + sequences
    module.train()
    means = {"mlm_loss": totals[0] / num_masked, "nsp_loss": totals[1] / num_sequences}
    return {"loss": sum(means.values()), **means}


def global_losses(losses: list[Losses], step: int) -> dict[str, float]:
    """The global batch's losses from those of this rank's micro-batches. Waits for a GPU.

    Collective; raises `RunError` on every rank when one is not finite.
    """
    local = torch.stack([torch.stack(parts) for parts in losses]).double().sum(0).tolist()
    total, mlm, nsp, distill = distributed.sum_over_ranks(local)
    if not math.isfinite(total):
        places = distributed.gather_texts(f"{local[0]}")
        ranks = [rank for rank, value in enumerate(places) if value in ("nan", "inf", "-inf")]
        raise RunError(
            f"step {step + 1}: the loss is not finite on rank {ranks}; "
            "nothing was changed by this step"
        )
    return {"loss": total, "mlm_loss": mlm, "nsp_loss": nsp, "distill_loss": distill}


class Meter:
    """Counts tokens per second."""

    def __init__(self) -> None:
        """Start the clock."""
        self._since, self._num_tokens = time.monotonic(), 0.0

    def add(self, counts: Counts) -> None:
        """One step is done."""
        self._num_tokens += counts.real

    def rates(self) -> dict[str, float]:
        """Real tokens per second, over all ranks, since the last call."""
        now = time.monotonic()
        rate = self._num_tokens / (now - self._since)
        self._since, self._num_tokens = now, 0.0
        return {"tokens_per_second": round(rate, 1)}
