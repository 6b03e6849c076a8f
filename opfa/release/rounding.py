"""The weights of a release: in fp32 as they were trained, in 16 bits, or the matrices in 8; in one
file that plain transformers reads, or in a compact one.

Zeros stay where the masks have them, whatever the type: a live weight that a smaller type rounds to
zero becomes its smallest normal number.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opfa.compression import quant
from opfa.errors import ModelError, RunError
from opfa.sparsity.anatomy import EMBEDDING, part_of
from opfa.weights import compact
from opfa.weights.packing import Int8

Format = Literal["dense", "compact", "compact-int8"]
Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN = "model.safetensors"


def write_weights(
    source: Path,
    directory: Path,
    pruned: set[str],
    *,
    form: Format,
    dtype: Dtype,
    embeddings: bool = True,
) -> bool:
    """Write the weights of a finished model into a directory; whether they are still the same.

    `pruned` names the matrices with zeros. With `compact-int8` these, all matrices of the layers
    and what the model was quantized in are written in 8 bits, and with `embeddings` every embedding
    too; other matrices in `dtype`, and vectors in fp32. The file is read again and compared.
    """
    files = sorted(source.glob("model*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in compact.tensors(path)}
    schemes = _schemes(source, tensors, pruned, embeddings) if form == "compact-int8" else {}
    written: dict[str, Tensor | Int8] = {}
    for name, tensor in tensors.items():
        if name in schemes:
            values, scale = quant.to_int8(tensor, schemes[name])
            mask = None if EMBEDDING.search(name) else tensor != 0
            written[name] = Int8(values=values, scale=scale, mask=mask)
        elif form == "compact-int8" and tensor.ndim < 2:
            written[name] = tensor
        else:
            written[name] = _cast(name, tensor, DTYPES[dtype])
    if form == "dense":
        save_file(_tensors(written), directory / PLAIN, {"format": "pt"})
    else:
        compact.write(written, directory / compact.FILE, sparse=pruned)
    found = dict(compact.tensors(directory / (PLAIN if form == "dense" else compact.FILE)))
    for name, tensor in written.items():
        if isinstance(tensor, Tensor) and not _is_same(found[name], tensor):
            raise ModelError(f"{directory}: {name} was not written as it is")
    return all(torch.equal(found[name].float(), t.float()) for name, t in tensors.items())


def _tensors(written: Mapping[str, Tensor | Int8]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in written.items() if isinstance(tensor, Tensor)}


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _schemes(
    source: Path, tensors: Mapping[str, Tensor], pruned: set[str], embeddings: bool
) -> dict[str, quant.Scheme]:
    """How each matrix goes into 8 bits: as the model was quantized, else with a scale a row."""
    schemes: dict[str, quant.Scheme] = {name: "channel" for name in pruned}
    parts = ("encoder", "embeddings") if embeddings else ("encoder",)
    for name, tensor in tensors.items():
        if part_of(name, tensor.shape) in parts:
            schemes[name] = "channel"
    if (source / quant.FILE).is_file():
        for name, scale in load_file(source / quant.FILE).items():
            if name.endswith("weight_scale"):
                matrix = name.removesuffix("_scale")
                if EMBEDDING.search(matrix) and not embeddings:
                    raise RunError(
                        "--embeddings same: this model was trained with its embeddings in 8 bits "
                        "(quantization.embeddings), so that is what they are; int8 is allowed"
                    )
                scheme: quant.Scheme = "channel" if scale.ndim else "tensor"
                schemes[matrix] = scheme
    return schemes


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise ModelError(f"{name}: has values that {dtype} can't hold; release it in bf16 or fp32")
    if tensor.ndim < 2:
        return cast
    return cast.masked_fill((cast == 0) & (tensor != 0), torch.finfo(dtype).tiny)
