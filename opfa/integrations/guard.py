"""A callback for transformers' Trainer that raises when anything changes a zero."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from opfa.errors import ModelError
from opfa.sparsity.layers import MaskedLinear, masks_of, whole_weight, zero_masks

HINT = "call opfa.lock(model) before the Trainer is made"
log = logging.getLogger(__name__)


class SparsityGuard(TrainerCallback):
    """Remembers where the zeros are when training begins, and looks every few steps, before
    every checkpoint and at the end. A locked layer is judged by its mask, so ZeRO 3 is no obstacle.
    """

    def __init__(self, every_steps: int = 100) -> None:
        """`every_steps` is how often; a look costs about as much as reading the weights once."""
        self._every_steps = every_steps
        self._masks: dict[str, Tensor] = {}
        self._num_steps = 0  # of this call of Trainer.train

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Remember the zeros; `ModelError` if there are none, or parts of an unlocked model."""
        masks = masks_of(model) or zero_masks(model)
        if not masks:
            raise ModelError("SparsityGuard: this model has no zeros to look after")
        self._masks = {name: mask.clone() for name, mask in masks.items()}
        self._num_steps = 0

    def on_step_end(
        self, _: Any, state: Any, control: Any, *__: Any, model: nn.Module, **___: Any
    ) -> None:
        """Look, if it is time or a checkpoint comes next."""
        self._num_steps += 1
        if state.global_step % self._every_steps == 0 or control.should_save:
            self.check(model, f"step {state.global_step}")

    def on_epoch_end(
        self, _: Any, state: Any, control: Any, *__: Any, model: nn.Module, **___: Any
    ) -> None:
        """Look, if a checkpoint comes next."""
        if control.should_save:
            self.check(model, f"step {state.global_step}")

    def on_train_end(self, _: Any, state: Any, *__: Any, model: nn.Module, **___: Any) -> None:
        """Look, and log how many zeros were held; a warning where nothing held them."""
        self.check(model, f"the end (step {state.global_step})")
        if not state.is_world_process_zero:
            return
        num_zeros = sum(int((~mask).sum()) for mask in self._masks.values())
        what = f"{num_zeros:,} zeros in {len(self._masks)} tensors over {self._num_steps:,} steps"
        if masks_of(model):
            log.info("SparsityGuard: held %s", what)
        else:
            log.warning("SparsityGuard: kept %s, though nothing held them; %s", what, HINT)

    @torch.no_grad()
    def check(self, model: nn.Module, when: str = "now") -> None:
        """Raise `ModelError` that names the first tensor whose zeros are not what they were."""
        for name, mask in self._masks.items():
            path = name.rpartition(".")[0]
            layer = model.get_submodule(path)
            if isinstance(layer, MaskedLinear):
                num_lost = int((layer.mask & ~mask.to(layer.mask.device)).sum())
            else:
                is_linear = isinstance(layer, nn.Linear)
                weight = whole_weight(path, layer) if is_linear else model.get_parameter(name)
                num_lost = int((weight[~mask.to(weight.device)] != 0).sum())
            if num_lost:
                what = f"{num_lost} of its {int((~mask).sum())} zeros were lost by {when}"
                raise ModelError(f"{name}: {what}; {HINT}")
