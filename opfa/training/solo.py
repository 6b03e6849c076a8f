"""The engine of one process by torch alone: AdamW, fp32 weights, the methods of `Engine`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opfa.compression.runs import Weights
from opfa.errors import DivergedError
from opfa.sparsity.layers import MaskedLinear, masked_layers
from opfa.sparsity.product import Product
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
        self._sparse = _sparse(model)
        self._trained = {
            name: self._sparse[name].values if name in self._sparse else parameter
            for name, parameter in self._parameters.items()
        }
        instead = {self._parameters[name]: each.values for name, each in self._sparse.items()}
        groups = [{**g, "params": [instead.get(p, p) for p in g["params"]]} for g in groups]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._max_grad_norm = max_grad_norm

    def step(self, learning_rate: float) -> Tensor:
        """One optimizer step; the gradient norm. `DivergedError`, and no step, if not finite."""
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self._max_grad_norm)
        if not torch.isfinite(norm):
            raise DivergedError(f"the gradient norm is {norm}; {UNCHANGED}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        for each in self._sparse.values():
            each.finish_step()
        return norm

    def save(self, directory: Path) -> None:
        """Write weights and optimizer state."""
        save_pieces(directory / "state-00000.safetensors", self._pieces(), {})

    def _pieces(self) -> Iterator[Piece]:
        """Whole tensors, also of what is trained as live weights alone."""
        for name, parameter in self._parameters.items():
            yield Piece(f"master/{name}", 0, parameter.detach().flatten())
            for key, value in self._optimizer.state.get(self._trained[name], {}).items():
                is_live = name in self._sparse and key != "step"
                whole = self._sparse[name].whole(value) if is_live else value
                yield Piece(f"{key}/{name}", 0, whole.flatten())

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Read what `save` wrote, with other live weights or kernels too."""
        saved = Pieces(directory, "state-*.safetensors")
        self._optimizer.state.clear()
        for name, parameter in self._parameters.items():
            shape, size, device = parameter.shape, parameter.numel(), parameter.device
            sparse = self._sparse.get(name)
            parameter.copy_(saved.whole(f"master/{name}", size).view(shape))
            if sparse is not None:
                sparse.values.copy_(sparse.take(parameter))
            if f"step/{name}" in saved:
                whole = {k: saved.whole(f"{k}/{name}", size).view(shape) for k in STATE[1:]}
                state = {k: sparse.take(v) if sparse else v.to(device) for k, v in whole.items()}
                step = saved.whole(f"step/{name}", 1).view(()).to(device)
                self._optimizer.state[self._trained[name]] = {"step": step, **state}


@dataclass(frozen=True)
class _Sparse:
    """A layer of which only the live weights [live] are trained: a tenth of the state."""

    layer: MaskedLinear
    product: Product
    values: nn.Parameter

    def take(self, whole: Tensor) -> Tensor:
        """Live numbers of a tensor like the weight."""
        return self.product.take(self.layer, whole)

    def whole(self, values: Tensor) -> Tensor:
        """A tensor like the weight of live numbers, with zeros elsewhere."""
        found = torch.zeros_like(self.layer.weight)
        self.product.put(self.layer, values, found)
        return found

    def finish_step(self) -> None:
        """The weight follows."""
        self.product.put(self.layer, self.values.detach(), self.layer.weight.data)


def _sparse(model: nn.Module) -> dict[str, _Sparse]:
    """Such layers, by the names of their weights."""
    found = {}
    for name, layer in masked_layers(model).items():
        product = layer.product
        if product is not None and product.live is not None:
            found[f"{name}.weight"] = _Sparse(layer, product, product.live)
    return found
