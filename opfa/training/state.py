"""Training state in pieces: each rank writes the pieces of flattened tensors that it holds, and any
number of ranks, at any ZeRO stage, reads the whole back bit for bit.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opfa.errors import RunError
from opfa.storage.files import sync


class Piece(NamedTuple):
    """A contiguous part [n] of a flattened tensor, from element `start` on."""

    name: str
    start: int
    values: Tensor


def save_pieces(path: Path, pieces: Iterable[Piece], facts: dict[str, Any]) -> None:
    """Write one rank's pieces, and a few numbers, as safetensors."""
    tensors = {f"{piece.name}@{piece.start}": piece.values.cpu().clone() for piece in pieces}
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})
    sync(path)  # by the node that wrote it


class Pieces:
    """The pieces of all ranks in one directory, joined on demand."""

    def __init__(self, directory: Path, pattern: str) -> None:
        """Open the files that match; raises `RunError` when there are none."""
        paths = sorted(directory.glob(pattern))
        if not paths:
            raise RunError(f"{directory}: holds no training state ({pattern})")
        self._directory = directory
        self._files = [safe_open(path, "pt") for path in paths]
        self.facts: dict[str, Any] = json.loads(self._files[0].metadata()["facts"])
        self._places: dict[str, list[tuple[int, int, str]]] = {}  # name: (start, file, key)
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, _, start = key.rpartition("@")
                self._places.setdefault(name, []).append((int(start), index, key))

    def __contains__(self, name: str) -> bool:
        """Whether some piece of this tensor is here."""
        return name in self._places

    def whole(self, name: str, size: int) -> Tensor:
        """The flattened tensor [size]; raises `RunError` when its pieces don't make it up."""
        parts, end = [], 0
        for start, index, key in sorted(self._places.get(name, [])):
            part = self._files[index].get_tensor(key)
            if start != end:
                break
            parts.append(part)
            end += part.numel()
        if end != size:
            raise RunError(
                f"{self._directory}: {name} has {end} of {size} elements here; the state of some "
                "rank is missing, or it belongs to another model"
            )
        return torch.cat(parts) if parts else torch.empty(0)
