"""A callback for transformers' Trainer that raises when anything changes a zero."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from opfa.errors import ModelError
from opfa.sparsity.layers import MaskedLinear, masks_of, whole_weight, zero_masks


class SparsityGuard(TrainerCallback):
    """Remembers where the zeros are when training begins, and looks every so many steps, before
    every checkpoint and at the end.

    It looks at the weights that layers compute with, whether the model is locked or not. Those of a
    locked layer are told by its mask, so ZeRO 3, where no rank holds a whole weight, is no obstacle
    then.
    """

    def __init__(self, every_steps: int = 100) -> None:
        """`every_steps` is how often; a look costs about as much as reading the weights once."""
        self._every_steps = every_steps
        self._masks: dict[str, Tensor] = {}

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Remember the zeros; raises `ModelError` for a model without any, and for one that is
        partitioned and not locked.
        """
        masks = masks_of(model) or zero_masks(model)
        if not masks:
            raise ModelError("SparsityGuard: this model has no zeros to look after")
        self._masks = {name: mask.clone() for name, mask in masks.items()}

    def on_step_end(
        self, _: Any, state: Any, control: Any, *__: Any, model: nn.Module, **___: Any
    ) -> None:
        """Look, if it is time or a checkpoint comes next."""
        if state.global_step % self._every_steps == 0 or control.should_save:
            self.check(model, f"step {state.global_step}")

    def on_epoch_end(
        self, _: Any, state: Any, control: Any, *__: Any, model: nn.Module, **___: Any
    ) -> None:
        """Look, if a checkpoint comes next."""
        if control.should_save:
            self.check(model, f"step {state.global_step}")

    def on_train_end(self, _: Any, state: Any, *__: Any, model: nn.Module, **___: Any) -> None:
        """Look."""
        self.check(model, f"the end (step {state.global_step})")

    @torch.no_grad()
    def check(self, model: nn.Module, when: str = "now") -> None:
        """Raise `ModelError` that names the first tensor whose zeros are not what they were."""
        for name, mask in self._masks.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, nn.Linear)
            if isinstance(layer, MaskedLinear):
                num_lost = int((layer.mask & ~mask.to(layer.mask.device)).sum())
            else:
                weight = whole_weight(name.removesuffix(".weight"), layer)
                num_lost = int((weight[~mask.to(weight.device)] != 0).sum())
            if num_lost:
                raise ModelError(
                    f"{name}: {num_lost} of its {int((~mask).sum())} zeros were lost by {when}; "
                    "call opfa.lock(model) before the Trainer is made"
                )
