"""The packed file: a model for the kernels that is mapped, not read. Byte for byte: FORMAT.md.

It is a safetensors file. The encoder's linear layers stand there as arrays of the kernels, other
parameters and buffers under their own names, and all begin at multiples of 64 bytes. Nothing of it
is believed: the digest, then every size and index that the kernels use, are checked.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opfa.errors import ModelError, first_line, shown
from opfa.runtime.layers import Linear
from opfa.runtime.library import DTYPES
from opfa.runtime.packing import Packed, check
from opfa.runtime.program import Form
from opfa.weights import sealed

VERSION = "1"
FORMAT = "opfa-packed"  # the key of the version
ALIGNMENT = 64  # bytes: a line of a cache
MATRIX, PADDING = "matrix.", "padding."  # what names of arrays begin with, before a number
VECTORS = ("bias", "scales")  # of rows, beside the arrays of a matrix
MOST_SIZE = 1 << 24  # rows or columns
TYPES = {
    "float32": "F32",
    "uint32": "U32",
    "uint16": "U16",  # bits of bf16
    "uint8": "U8",
    "int8": "I8",
    "int64": "I64",
}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
SIZES = ("rows", "columns", "block", "tile", "num_live")
Size = Annotated[int, Field(ge=1, le=MOST_SIZE)]
Side = Annotated[int, Field(ge=0, le=256)]


class Input(BaseModel):
    """How the input of an int8 matrix is rounded: q = clamp(round(x / scale) + zero, 0, 255)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    zero: Annotated[int, Field(ge=0, le=255)]


class Entry(BaseModel):
    """What the header says of layers with the same input, whose rows are one matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    layers: Annotated[list[str], Field(min_length=1)]
    dtype: str  # of the values
    input: Input | None  # of int8
    rows: Size
    columns: Size
    block: Side
    tile: Side
    num_live: Annotated[int, Field(ge=0)]


class Facts(BaseModel):
    """The metadata of a packed file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: str = Field(alias=FORMAT)
    sha256: str
    family: str  # transformers' model_type
    dtype: str
    model: str  # that it was made from
    matrices: Json[list[Entry]]


class PackedFile:
    """An open packed file, mapped and checked; its tensors are views of the mapping."""

    def __init__(self, path: Path) -> None:
        """Map and check; raises `ModelError` for anything but an undamaged packed file."""
        self.path = path
        try:
            self.facts = _checked(path)
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if not name.startswith(PADDING)]  # noqa: SIM118 - not a dict
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
            self.layers: dict[tuple[str, ...], Linear] = {}
            for number, entry in enumerate(self.facts.matrices):
                self.layers[tuple(entry.layers)] = _linear(tensors, f"{MATRIX}{number}.", entry)
        except (*UNREADABLE, SafetensorError) as error:
            raise ModelError(f"{path}: not a packed file: {_reason(error)}") from error
        if left := [name for name in tensors if name.startswith(MATRIX)]:
            raise ModelError(f"{path}: not a packed file: {left[0]}: of no matrix")
        self.tensors = tensors


def _checked(path: Path) -> Facts:
    """The metadata of a file whose digest is right and whose version is ours."""
    with path.open("rb") as file:
        header, offset = sealed.read_header(file)
        metadata = header[sealed.METADATA]
        if (version := metadata[FORMAT]) != VERSION:
            what = f"packed format {shown(version)}; this opfa reads {VERSION!r}"
            raise ModelError(f"{path}: {what}; pack the model again")
        if metadata[sealed.SHA256] != sealed.digest(file, header, offset):
            raise ModelError(f"{path}: is damaged, its SHA-256 is not what it says")
    facts = Facts.model_validate(metadata)
    if facts.dtype not in DTYPES:
        raise ModelError(f"{path}: is in {shown(facts.dtype)}; this opfa has {', '.join(DTYPES)}")
    return facts


def _linear(tensors: dict[str, Tensor], prefix: str, entry: Entry) -> Linear:
    """Layers of the file, checked and taken out of its tensors."""
    names = [name for name in tensors if name.startswith(prefix)]
    arrays = {name.removeprefix(prefix): tensors.pop(name).numpy() for name in names}
    vectors = {name: arrays.pop(name) for name in VECTORS if name in arrays}
    try:
        matrix = _matrix(entry, arrays)
        is_int8 = entry.dtype == "int8"
        if set(vectors) != set(VECTORS if is_int8 else VECTORS[:1]):
            raise ValueError(f"has {', '.join(vectors) or 'no bias'} in {entry.dtype}")
        for name, vector in vectors.items():
            if vector.dtype != np.float32 or vector.shape != (entry.rows,):
                raise ValueError(f"{name}: is {vector.dtype} {[*vector.shape]}, not one a row")
        if is_int8 != (entry.input is not None):
            raise ValueError(f"input: is {entry.input} in {entry.dtype}")
    except ValueError as error:
        raise ValueError(f"{entry.layers[0]}: {error}") from error
    form = None if entry.dtype == "fp32" else Form(entry.dtype, **dict(entry.input or ()))
    return Linear(matrix=matrix, bias=vectors["bias"], scales=vectors.get("scales"), form=form)


def _matrix(entry: Entry, arrays: dict[str, NDArray]) -> Packed:
    """The checked matrix of an entry."""
    if entry.dtype not in DTYPES:
        raise ValueError(f"dtype {shown(entry.dtype)}: must be one of {', '.join(DTYPES)}")
    sizes = entry.model_dump(include=set(SIZES))
    matrix = Packed(**sizes, dtype=DTYPES.index(entry.dtype), arrays=arrays)
    check(matrix)
    return matrix


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return first_line(error)


def write(
    path: Path,
    tensors: Mapping[str, NDArray],
    layers: Mapping[tuple[str, ...], Linear],
    *,
    family: str,
    dtype: str,
    model: str,
) -> None:
    """Write a packed file; `layers` are by their names, `tensors` all that belongs to none."""
    entries, arrays = [], dict(tensors)
    for number, (names, linear) in enumerate(layers.items()):
        parts = {**linear.matrix.arrays, "bias": linear.bias}
        parts |= {} if linear.scales is None else {"scales": linear.scales}
        arrays |= {f"{MATRIX}{number}.{name}": array for name, array in parts.items()}
        sizes = {name: getattr(linear.matrix, name) for name in SIZES}
        kind, form = DTYPES[linear.matrix.dtype], linear.form
        given = {"scale": form.scale, "zero": form.zero} if form and kind == "int8" else None
        entries.append({"layers": [*names], "dtype": kind, "input": given, **sizes})
    facts = {"family": family, "dtype": dtype, "model": model}
    facts |= {"matrices": sealed.to_json(entries).decode(), FORMAT: VERSION}
    header: dict[str, Any] = {sealed.METADATA: {**facts, sealed.SHA256: sealed.EMPTY}}
    end = 0
    for name, array in (laid := list(_aligned(arrays))):
        start, end = end, end + array.nbytes
        sizes = {"shape": [*array.shape], "data_offsets": [start, end]}
        header[name] = {"dtype": TYPES[array.dtype.name], **sizes}
    digest = sealed.begin(header)
    size = len(sealed.to_json(header, ensure_ascii=False))
    size += -(8 + size) % ALIGNMENT
    with path.open("xb") as file:
        file.seek(8 + size)
        for _, array in laid:
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digest.update(content)
            file.write(content)
        header[sealed.METADATA][sealed.SHA256] = digest.hexdigest()
        file.seek(0)
        file.write(size.to_bytes(8, "little"))
        file.write(sealed.to_json(header, ensure_ascii=False).ljust(size))


def _aligned(arrays: Mapping[str, NDArray]) -> Iterator[tuple[str, NDArray]]:
    """Arrays, with bytes between them so that each begins at a multiple of `ALIGNMENT`."""
    end = 0
    for number, (name, array) in enumerate(arrays.items()):
        if spare := -end % ALIGNMENT:
            yield f"{PADDING}{number}", np.zeros(spare, np.uint8)
        yield name, array
        end += spare + array.nbytes
