"""Layer-wise reconstruction: what is left of a matrix makes up for what was pruned.

    min over W, b of  mean over tokens of |W x + b - (V y + c)|^2  + ridge |W - V|^2

V, c are the dense layer and y its inputs in the dense model; x are its inputs in the model that is
pruned up to here; W is zero off its mask. With a given mask each row is a least squares problem
over its own support, and is solved exactly. `Admm` finds the masks too: Boža (2024), "Fast and
effective weight update for pruned LLMs".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from opfa.compression.selection import magnitude_mask, num_zeros
from opfa.errors import RunError
from opfa.recipe import Count, Positive, Section
from opfa.sparsity.chosen import Chosen
from opfa.sparsity.layers import MaskedLinear

RIDGE = 1e-2  # of the mean square of an input
CHUNK = 1 << 25  # values of the systems that are solved together: 256 MB in fp64


class Inputs:
    """Sums over tokens of what comes into a matrix: x [in] in the pruned model, y in the dense one.

    Products of a batch are in fp32, relative to the means of the first batch, so that inputs far
    from zero lose nothing; sums of batches are in fp64.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        """Nothing yet. It holds two values of fp64 for each pair of inputs."""
        wide = {"dtype": torch.float64, "device": device}
        self._num, self._first = 0, torch.zeros(2, width, device=device)  # fp32
        self._gram = torch.zeros(width, width, **wide)  # x x'
        self._cross = torch.zeros(width, width, **wide)  # x y'
        self._sums = torch.zeros(2, width, **wide)

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Inputs of the same tokens [tokens, in], of the pruned model and of the dense one."""
        both = torch.stack([ours, theirs]).float()
        if not self._num:
            self._first = both.mean(1)
        both -= self._first[:, None]
        self._num += len(ours)
        self._gram += both[0].T @ both[0]
        self._cross += both[0].T @ both[1]
        self._sums += both.sum(1)

    def is_finite(self) -> bool:
        """Whether all of them were."""
        return bool(self._gram.isfinite().all() and self._cross.isfinite().all())

    def means(self) -> Tensor:
        """Of x and of y, fp64 [2, in]."""
        return self._first.double() + self._sums / self._num

    def system(self, weight: Tensor, *, has_bias: bool) -> "System":
        """The least squares of a dense weight V [out, in]; with a bias relative to the means, since
        that takes these up.
        """
        ours, theirs = self._sums / self._num
        gram = self._gram / self._num - ours.outer(ours)
        cross = self._cross / self._num - ours.outer(theirs)
        if not has_bias:
            ours, theirs = self.means()
            gram, cross = gram + ours.outer(ours), cross + ours.outer(theirs)
        ridge = RIDGE * float(gram.diagonal().mean()) or 1.0  # of inputs that are all the same: 1
        dense = weight.detach().double()
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return System(gram + ridge * eye, dense @ cross.T + ridge * dense)


@dataclass(frozen=True)
class System:
    """W minimizes tr(W gram W') - 2 tr(W wanted')."""

    gram: Tensor  # fp64 [in, in], positive definite
    wanted: Tensor  # fp64 [out, in]

    def solve(self, mask: Tensor) -> Tensor:
        """The best weight, fp64 [out, in], that is zero wherever the mask is False.

        Rows with supports of like size are solved together, by Cholesky. A row with a shorter one
        than others gets equations 1 * 0 = 0.
        """
        found = torch.zeros_like(self.wanted)
        for rows, columns, is_real in _supports(mask):
            gram = self.gram[columns[:, :, None], columns[:, None, :]]
            gram *= is_real[:, :, None] & is_real[:, None, :]
            gram.diagonal(dim1=1, dim2=2).add_((~is_real).double())
            right = self.wanted[rows].gather(1, columns) * is_real
            values = torch.cholesky_solve(right[:, :, None], _cholesky(gram))[:, :, 0]
            found[rows] = found[rows].scatter_add_(1, columns, values * is_real)
        return found


def _cholesky(gram: Tensor) -> Tensor:
    """The factor [..., in, in]; raises `ArithmeticError` where there is none."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        raise ArithmeticError("the products of its inputs on this text are singular")
    return factor


def _supports(mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows [n] with columns [n, most] of their supports, and which of these are real."""
    sizes, order = mask.sum(1).sort(dim=0, stable=True)
    end = 0
    while end < len(order):
        start = end
        end = len(order)
        while end > start + 1 and (end - start) * int(sizes[end - 1]) ** 2 > CHUNK:
            end = start + (end - start + 1) // 2
        rows, most = order[start:end], int(sizes[end - 1])
        if most:
            columns = mask[rows].byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
            yield rows, columns, mask[rows].gather(1, columns)


class Admm(Section):
    """Masks by ADMM, matrix by matrix: Boža (2024), algorithm 2, in units in which each input has a
    mean square of 1. The masks come from |W + U|, along a cubic ramp.
    """

    kind: Literal["admm"] = "admm"
    """Its name."""
    iterations: Count = 20
    """Of a matrix."""
    ramp: Count = 15
    """Iterations over which the mask grows; after them it stays."""
    penalty: Positive = 1.0
    """Its rho, of the mean square of an input."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ramp > self.iterations:
            what = f"ramp = {self.ramp}: must be at most iterations = {self.iterations}"
            raise ValueError(what)
        return self

    def facts(self) -> Chosen:
        """Its kind and its numbers."""
        return self.model_dump(mode="json")

    def mask(self, system: System, weight: Tensor, sparsity: float) -> Tensor:
        """A mask [out, in] with exactly round(sparsity * size) zeros, for a dense weight."""
        scale = system.gram.diagonal().sqrt()
        gram, wanted = system.gram / scale.outer(scale), system.wanted / scale
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inverse = torch.cholesky_inverse(_cholesky(gram + self.penalty * eye))
        ours = weight.detach().double() * scale
        dual = torch.zeros_like(ours)
        mask = torch.ones_like(ours, dtype=torch.bool)
        for iteration in range(1, self.iterations + 1):
            given = ours + dual
            if iteration <= self.ramp:
                now = sparsity * (1 - (1 - iteration / self.ramp) ** 3)
                mask = magnitude_mask(given.float(), num_zeros(now, mask.numel()))
            kept = given * mask
            dual = given - kept
            ours = (wanted + self.penalty * (kept - dual)) @ inverse
        return mask


@torch.no_grad()
def fit(
    layers: Mapping[str, MaskedLinear], inputs: Inputs, admm: Admm | None, sparsity: float
) -> None:
    """Set the weights and biases of dense layers that share their inputs, with `admm` also their
    masks, by the names of their weights. Raises `RunError` for inputs that are not finite, and for
    products that are singular.
    """
    if not inputs.is_finite():
        raise RunError(f"{next(iter(layers))}: its inputs on this text are not finite")
    ours, theirs = inputs.means()
    for name, layer in layers.items():
        dense, bias = layer.weight.detach().double(), layer.bias
        system = inputs.system(dense, has_bias=bias is not None)
        try:
            if admm is not None:
                layer.mask.copy_(admm.mask(system, dense, sparsity))
            found = system.solve(layer.mask)
        except ArithmeticError as error:
            raise RunError(f"{name}: {error}; give more text, or exclude it") from error
        layer.weight.copy_(found)
        if bias is not None:
            bias.copy_(bias.double() + dense @ theirs - found @ ours)
