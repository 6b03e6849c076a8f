"""The engine of one process by torch alone: AdamW, fp32 weights, the methods of `Engine`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opfa.compression.runs import Weights
from opfa.errors import DivergedError
from opfa.training.state import Piece, Pieces, save_pieces

STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight that had a gradient
UNCHANGED = "nothing was changed by this step; a lower learning rate may help"


class SoloEngine(Weights):
    """A model and its optimizer."""

    num_files = 1

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], *, max_grad_norm: float
    ) -> None:
        """`groups` are AdamW's, of the model's parameters where they will stay."""
        self._parameters = dict(model.named_parameters())
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._max_grad_norm = max_grad_norm

    def step(self, learning_rate: float) -> Tensor:
        """One optimizer step; the gradient norm. `DivergedError`, and no step, if not finite."""
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
        if not torch.isfinite(norm):
            raise DivergedError(f"the gradient norm is {norm}; {UNCHANGED}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def save(self, directory: Path) -> None:
        """Write weights and optimizer state."""
        save_pieces(directory / "state-00000.safetensors", self._pieces(), {})

    def _pieces(self) -> Iterator[Piece]:
        for name, parameter in self._parameters.items():
            yield Piece(f"master/{name}", 0, parameter.detach().flatten())
            for key, value in self._optimizer.state.get(parameter, {}).items():
                yield Piece(f"{key}/{name}", 0, value.flatten())

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        saved = Pieces(directory, "state-*.safetensors")
        self._optimizer.state.clear()
        for name, parameter in self._parameters.items():
            shape, size, device = parameter.shape, parameter.numel(), parameter.device
            parameter.copy_(saved.whole(f"master/{name}", size).view(shape))
            if f"step/{name}" in saved:
                whole = {key: saved.whole(f"{key}/{name}", size) for key in STATE[1:]}
                state = {key: value.view(shape).to(device) for key, value in whole.items()}
                step = saved.whole(f"step/{name}", 1).view(()).to(device)
                self._optimizer.state[parameter] = {"step": step, **state}
