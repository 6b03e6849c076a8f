"""The weights of a release: in fp32, in 16 bits, or the matrices in 8; plain, or compact.

Zeros stay where the masks have them: a live weight that a smaller type rounds to zero becomes its
smallest normal number.
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
    form: Format,
    dtype: Dtype,
    *,
    embeddings: bool = True,
) -> tuple[dict[str, Tensor], bool]:
    """Write the weights of a finished model into a directory; what is read again, and whether all
    of it is as it was.

    `pruned` names the matrices with zeros. With `compact-int8` these, all matrices of the layers,
    what the model was quantized in, and with `embeddings` every embedding are written in 8 bits,
    other matrices in `dtype`, and vectors in fp32.
    """
    files = sorted(source.glob("model*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in compact.tensors(path)}
    schemes = _schemes(source, tensors, pruned, embeddings) if form == "compact-int8" else {}
    plain: dict[str, Tensor] = {}
    in_8_bits: dict[str, Int8] = {}
    for name, tensor in tensors.items():
        if name in schemes:
            values, scale = quant.to_int8(tensor, schemes[name])
            mask = None if EMBEDDING.search(name) else tensor != 0
            in_8_bits[name] = Int8(values=values, scale=scale, mask=mask)
        elif form == "compact-int8" and tensor.ndim < 2:
            plain[name] = tensor
        else:
            plain[name] = _cast(name, tensor, DTYPES[dtype])
    path = directory / (PLAIN if form == "dense" else compact.FILE)
    if form == "dense":
        save_file(plain, path, {"format": "pt"})
    else:
        compact.write({**plain, **in_8_bits}, path, sparse=pruned)
    found = dict(compact.tensors(path))
    for name, tensor in plain.items():
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor):
            raise ModelError(f"{directory}: {name} was not written as it is")
    return found, all(torch.equal(found[n].float(), t.float()) for n, t in tensors.items())


def _schemes(
    source: Path, tensors: Mapping[str, Tensor], pruned: set[str], embeddings: bool
) -> dict[str, quant.Scheme]:
    """How each matrix goes into 8 bits: as the model was quantized, else with a scale a row."""
    parts = ("encoder", "embeddings") if embeddings else ("encoder",)
    chosen = {name for name, tensor in tensors.items() if part_of(name, tensor.shape) in parts}
    schemes: dict[str, quant.Scheme] = dict.fromkeys(pruned | chosen, "channel")
    ranges = source / quant.FILE
    for key, scale in (load_file(ranges) if ranges.is_file() else {}).items():
        name = key.removesuffix("_scale")
        if not key.endswith("weight_scale"):
            continue
        if EMBEDDING.search(name) and not embeddings:
            raise RunError(
                "--embeddings same: this model was trained with its embeddings in 8 bits "
                "(quantization.embeddings), so that is what they are; int8 is allowed"
            )
        schemes[name] = "channel" if scale.ndim else "tensor"
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
