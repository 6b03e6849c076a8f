"""Sparse linear layers in any torch model: one's own head, or a family that the runtime lacks.

Each layer brings its tokens into the kernels' order and back, so a whole encoder by
`opfa.runtime.load` is faster.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from opfa.errors import RunError
from opfa.runtime.layers import array_of
from opfa.runtime.packing import MOST_DENSITY, Packed, pack
from opfa.runtime.program import Program, Runner
from opfa.runtime.threads import Pool, TorchThreads, num_threads

LEAST_SIZE = 1 << 14  # weights; the way there and back costs more than a smaller layer saves
Model = TypeVar("Model", bound=nn.Module)


class KernelLinear(nn.Module):
    """A linear layer whose zeros cost no time; forward only, fp32."""

    def __init__(self, layer: nn.Linear, pool: Pool) -> None:
        """Pack a layer's weights."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.matrix: Packed = pack(array_of(layer.weight))
        program = Program()
        source, target = program.buffer(self.in_features), program.buffer(self.out_features)
        program.load(source, self.in_features)
        program.linear(self.matrix, array_of(layer.bias), source, target)
        program.store(target, self.out_features)
        self._runner = Runner(program, pool)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]. Raises `RunError` where a gradient is asked for."""
        if input.requires_grad and torch.is_grad_enabled():
            raise RunError("a swapped layer has no gradient; use torch.no_grad(), or train before")
        if input.shape[-1:] != (self.in_features,):
            raise RunError(f"input: is {list(input.shape)}, and its end must be {self.in_features}")
        rows = input.detach().float().contiguous().reshape(-1, self.in_features)
        found = torch.empty(len(rows), self.out_features)
        if len(rows):
            starts = np.array([0, len(rows)], np.int32)
            self._runner.run(starts, source=rows.numpy(), target=found.numpy())
        return found.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def extra_repr(self) -> str:
        """What torch shows of it."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, density={self.matrix.density:.3f}"


def swap(model: Model, *, threads: int | None = None) -> Model:
    """Put kernels under all linear layers that gain, in place; the model then runs forward only.

    A layer gains if at most half of its weights live. Raises `RunError` if none does. For a whole
    encoder of a known family `opfa.runtime.load` is faster.
    """
    pool = TorchThreads(num_threads(threads))
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and _gains(m)}
    if not found:
        raise RunError(f"no linear layer of {type(model).__name__} is sparse enough to gain")
    for name, layer in found.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, KernelLinear(layer, pool))
    return model.eval()


def _gains(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_here = weight.device.type == "cpu" and weight.numel() >= LEAST_SIZE
    return is_here and int(weight.count_nonzero()) <= MOST_DENSITY * weight.numel()
