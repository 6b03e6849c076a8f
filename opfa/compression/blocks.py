"""Fisher information in blocks, and what it says of pruning: Kurtic et al. (2022), "The Optimal
BERT Surgeon", sections 3.1 and 3.2.

A block is `size` weights that follow each other in a matrix read row by row. With H its matrix, and
Q the weights that go:

    what one weight is worth    w_q^2 / (2 [H^-1]_qq)
    what those that stay gain   -H^-1[:, Q] (H^-1[Q, Q])^-1 w_Q
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from opfa.compression.measured import GRADIENTS
from opfa.errors import RunError

AT_ONCE = 1 << 14  # blocks of a product, of an inverse


class Blocks:
    """The blocks of some matrices: gradients are added, then inverses are taken in place."""

    def __init__(self, shapes: Mapping[str, torch.Size], size: int, device: torch.device) -> None:
        """Blocks of `size` weights that follow each other in a row-major matrix, all zero."""
        self.size, self._shapes = size, dict(shapes)
        self._seen: list[list[Tensor]] = []
        self._count = 0
        self.matrices = {
            name: torch.zeros(-(-shape.numel() // size), size, size, device=device)
            for name, shape in shapes.items()
        }

    def add(self, gradients: Sequence[Tensor]) -> None:
        """One gradient of each matrix [out, in], in the order of the shapes."""
        self._seen.append([_rows(gradient, self.size) for gradient in gradients])
        self._count += 1
        if len(self._seen) == GRADIENTS:
            self._sum()

    def _sum(self) -> None:
        for matrix, *found in zip(self.matrices.values(), *self._seen, strict=True):
            for part in _parts(len(matrix)):
                samples = torch.stack([each[part] for each in found], 1)  # [blocks, samples, size]
                matrix[part].baddbmm_(samples.mT, samples)
        self._seen = []

    def invert(self, damping: float) -> dict[str, Tensor]:
        """Replace each matrix by its inverse, with `damping` times the mean of its tensor's
        diagonal added. Gives the inverses' diagonals [out, in]. Raises `RunError` for a singular
        one, and for one that isn't finite.
        """
        if self._seen:
            self._sum()
        found = {}
        for name, matrix in self.matrices.items():
            matrix.div_(self._count)
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            if not bool(diagonal.isfinite().all()):
                raise RunError(f"{name}: its fisher on this text is not finite")
            diagonal.add_(damping * diagonal.mean())
            for part in matrix.split(AT_ONCE):
                factor, info = torch.linalg.cholesky_ex(part.double())
                if bool(info.any()):
                    what = "a block of its Fisher information is singular on this text"
                    raise RunError(f"{name}: {what}; give the score more sequences or damping")
                part.copy_(torch.cholesky_inverse(factor))
            found[name] = _whole(matrix.diagonal(dim1=1, dim2=2), self._shapes[name])
        return found

    def corrected(self, name: str, weight: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """A weight [out, in] after what the second mask prunes, and the first did not, was made up
        for by what is kept. Pruned weights keep their values.
        """
        rows, gone = _rows(weight * before, self.size), _rows((~after).float(), self.size)
        change = torch.empty_like(rows)
        for part in _parts(len(rows)):
            inverse, w, q = self.matrices[name][part], rows[part], gone[part]
            among = q[:, :, None] * inverse * q[:, None] + torch.diag_embed(1 - q)
            share = torch.linalg.solve(among.double(), (q * w).double()).to(w.dtype)
            change[part] = -(inverse @ share[..., None])[..., 0]
        return torch.where(after, weight + _whole(change, weight.shape), weight)


def _parts(num_blocks: int) -> Iterator[slice]:
    for start in range(0, num_blocks, AT_ONCE):
        yield slice(start, start + AT_ONCE)


def _rows(whole: Tensor, size: int) -> Tensor:
    """A matrix as blocks [blocks, size]; the last one is filled up with zeros."""
    flat = whole.reshape(-1)
    return pad(flat, (0, -len(flat) % size)).view(-1, size)


def _whole(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.reshape(-1)[: shape.numel()].view(shape)


def check_memory(what: str, needed: int, device: torch.device, less: str) -> None:
    """Raise `RunError` where so many bytes aren't free there; `less` says what needs less."""
    free = _free_bytes(device)
    if free is not None and needed > free:
        found = f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise RunError(f"{what}: {found}; {less}")


def _free_bytes(device: torch.device) -> int | None:
    """Memory that is free there; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(found[0]) * 1024 if found else None
