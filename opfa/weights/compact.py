"""The compact file: a safetensors file in which a matrix is its positions and its values.

A matrix NAME is stored as the tensors NAME.form, NAME.positions, NAME.values and NAME.scale of
`opfa.weights.packing`, other tensors unchanged. A SHA-256 over header and data finds any
change, and nothing is unpacked before it was checked. Byte for byte: model_cards/FORMAT.md.
"""

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from opfa.errors import ModelError
from opfa.weights import sealed
from opfa.weights.packing import PARTS, TYPES, Form, Int8, form_of, pack, unpack

FILE = "model.opfa.safetensors"
VERSION = "1"
METHOD = "opfa"
ENTRY = "quantization_config"  # in config.json: what makes transformers look for our file
CONFIG = {ENTRY: {"quant_method": METHOD, "version": VERSION}}
MOST_WEIGHTS_PER_BYTE = 1_000  # of a file, beyond the first 2^24; bounds what a small file can ask
FREE_WEIGHTS = 1 << 24
FORM = ".form"
Wanted = Callable[[str, Sequence[int]], bool]  # name and shape of a tensor
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)


def write(tensors: Mapping[str, Tensor | Int8], path: Path, *, sparse: Iterable[str] = ()) -> None:
    """Write tensors: the `sparse` ones by positions and values, other matrices by their values.

    Only matrices called `weight` are packed. All comes back bit for bit, an `Int8` as fp32.
    """
    sparse, parts = set(sparse), {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Int8) or _is_packable(name, tensor):
            packed = pack(tensor, is_sparse=name in sparse)
            parts |= {f"{name}.{part}": stored for part, stored in packed.items()}
        else:
            parts[name] = tensor.contiguous()
    metadata = {"format": "pt", "opfa-compact": VERSION, sealed.SHA256: sealed.EMPTY}
    file = io.BytesIO(save(parts, metadata))
    header, offset = sealed.read_header(file)
    _check_limit(path, [form_of(parts[n]) for n in parts if n.endswith(FORM)], file)
    header[sealed.METADATA][sealed.SHA256] = sealed.digest(file, header, offset)
    file.seek(8)  # sorted: safetensors' order of metadata is another every time
    file.write(sealed.to_json(header, ensure_ascii=False).ljust(offset - 8))
    path.write_bytes(file.getbuffer())


class CompactFile:
    """An open compact file whose digest was right."""

    def __init__(self, path: Path) -> None:
        """Open and verify; raises `ModelError` for anything but an undamaged compact file."""
        self.path = path
        try:
            with path.open("rb") as file:
                header, offset = sealed.read_header(file)
                if (version := header[sealed.METADATA]["opfa-compact"]) != VERSION:
                    what = f"compact format {version!r}; this opfa reads {VERSION!r}"
                    raise ModelError(f"{path}: {what}")
                if header[sealed.METADATA][sealed.SHA256] != sealed.digest(file, header, offset):
                    raise ModelError(f"{path}: is damaged, its SHA-256 is not what it says")
                self._file = safe_open(path, "pt")
                self._stored = set(self._file.keys())
                packed = {n.removesuffix(FORM) for n in self._stored if n.endswith(FORM)}
                self.forms = {name: form_of(self._file.get_tensor(name + FORM)) for name in packed}
                _check_limit(path, self.forms.values(), file)
        except UNREADABLE as error:
            raise ModelError(f"{path}: not a compact file: {error!r}") from error
        parts = {f"{name}.{part}" for name in packed for part in PARTS}
        self.names = sorted(packed | (self._stored - parts))

    def read(self, name: str) -> Tensor:
        """A tensor as it was; 8-bit values as fp32. Raises `ModelError` if its parts don't fit."""
        try:
            if name not in self.forms:
                return self._file.get_tensor(name)
            parts = {part: f"{name}.{part}" for part in PARTS}
            stored = {part: key for part, key in parts.items() if key in self._stored}
            return unpack({part: self._file.get_tensor(key) for part, key in stored.items()})
        except UNREADABLE as error:
            raise ModelError(f"{self.path}: {name}: can't be unpacked: {error!r}") from error

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, one at a time."""
        return ((name, self.read(name)) for name in self.names)


def tensors(path: Path, wanted: Wanted = lambda *_: True) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a safetensors file; an unwanted packed matrix comes on the "meta" device."""
    with safe_open(path, "pt") as file:
        if "opfa-compact" not in (file.metadata() or {}):
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
            return
    compact = CompactFile(path)
    for name in compact.names:
        form = compact.forms.get(name)
        if form is None or wanted(name, form.shape):
            yield name, compact.read(name)
        else:
            dtype = torch.float32 if form.dtype == torch.int8 else form.dtype
            yield name, torch.empty(form.shape, dtype=dtype, device="meta")


def _is_packable(name: str, tensor: Tensor) -> bool:
    is_matrix = tensor.ndim == 2 and tensor.numel() > 0
    return name.split(".")[-1] == "weight" and is_matrix and tensor.dtype in TYPES[:-1]


def _check_limit(path: Path, forms: Iterable[Form], file: IO[bytes]) -> None:
    """Refuse a file that is so small for its weights that it must be meant to fill memory."""
    most = FREE_WEIGHTS + MOST_WEIGHTS_PER_BYTE * file.seek(0, os.SEEK_END)
    num_weights = sum(math.prod(form.shape) for form in forms)
    if num_weights > most:
        raise ModelError(f"{path}: holds {num_weights:,} weights; by its size {most:,} at most")
