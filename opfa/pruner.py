"""The pruner: when the schedule says so, turn fp32 weights into exact masks, the same on every
rank.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from opfa.recipe import RunError
from opfa.schedules import Gradual
from opfa.sparsity.layers import mask_layers, masks_of, set_masks
from opfa.sparsity.masks import fingerprint
from opfa.sparsity.pattern import Pattern


class Pruner:
    """Holds the masks of a model over time. Make it before an engine wraps the model.

    `read_fp32` gives the full fp32 value of a parameter; `compare` gives a text of every rank. Both
    may be collective.
    """

    def __init__(self, model: nn.Module, schedule: Gradual, pattern: Pattern) -> None:
        """Mask the layers that the pattern names; all their weights are kept until the first
        update.
        """
        self.schedule = schedule
        self.pattern = pattern
        self.layers = mask_layers(model, pattern.layers(model))
        self._model = model

    def after_step(
        self,
        step: int,
        read_fp32: Callable[[Tensor], Tensor],
        compare: Callable[[str], list[str]] = lambda digest: [digest],
    ) -> bool:
        """Update the masks if the schedule says so after `step` steps; whether it did.

        Collective. Raises `RunError` on every rank when the ranks computed different masks.
        """
        if not self.schedule.is_update(step):
            return False
        weights = {f"{name}.weight": read_fp32(layer.weight) for name, layer in self.layers.items()}
        masks = self.pattern.masks(weights, self.schedule.sparsity_at(step))
        digests = compare(fingerprint(masks))
        if len(set(digests)) > 1:
            listing = ", ".join(
                f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests)
            )
            raise RunError(f"step {step}: the ranks computed different masks ({listing})")
        set_masks(self._model, masks)
        return True

    def restore(self, masks: Mapping[str, Tensor]) -> None:
        """Put back the masks of a resume point."""
        set_masks(self._model, masks)

    def masks(self) -> dict[str, Tensor]:
        """The masks in force."""
        return masks_of(self._model)

    def sparsity(self) -> float:
        """The fraction of zeros in the pruned tensors, counted."""
        masks = self.masks().values()
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
