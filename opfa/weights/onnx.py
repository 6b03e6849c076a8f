"""The weights in an ONNX file, ours or another exporter's.

Our files have the names and the layout of the state dict. Others transpose matrices to [input,
output] and call them onnx::MatMul_123; the node that multiplies by one says which module it was
(/bert/encoder/layer.0/…/query/MatMul). In 8 bits, a zero is whatever equals the zero point.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opfa.errors import ModelError, opening, shown
from opfa.extras import importing
from opfa.storage.foreign import check_shards, check_weights

with importing("an ONNX file", "opfa[export]"):
    import onnx
    from onnx import helper, numpy_helper

PRODUCTS = ("MatMul", "MatMulInteger")


class _Use(NamedTuple):
    """What the nodes say of a matrix: the name of its module, and its zero point."""

    name: str
    is_transposed: bool
    zero_point: str | None
    axis: int


def read_onnx(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The initializers of a file, matrices as [output, input]."""
    graph = _graph(file)
    if not graph.initializer:
        raise ModelError(f"{file}: has no weights, or is no ONNX file")
    items = {item.name: item for item in graph.initializer}
    uses = _uses(graph)
    for name, item in items.items():
        values = _values(item, file)
        use = uses.get(name)
        if use is None or values.ndim != 2:
            yield name, _tensor(values, file, name)
            continue
        if use.zero_point in items:
            values = _centred(values, _values(items[use.zero_point], file), use.axis)
        values = values.T if use.is_transposed else values
        yield use.name, _tensor(values, file, name)


def data_files(file: Path) -> list[Path]:
    """The files beside it in which its weights are; raises `ModelError` where one can't be."""
    entries = [entry for item in _graph(file).initializer for entry in item.external_data]
    places = sorted({entry.value for entry in entries if entry.key == "location"})
    for place in places:
        if not place or Path(place).is_absolute() or ".." in Path(place).parts:
            raise ModelError(f"{file}: its weights: {shown(place)} is no file beside it")
    paths = [file.parent / place for place in places]
    there = [place for place, path in zip(places, paths, strict=True) if os.path.lexists(path)]
    check_shards(places, there, file)
    for path in paths:
        check_weights(path)
    return paths


def _graph(file: Path) -> onnx.GraphProto:
    with opening(file, ModelError, "can't be read as ONNX"):
        return onnx.load(file, load_external_data=False).graph


def _tensor(values: np.ndarray, file: Path, name: str) -> Tensor:
    with opening(f"{file}: {name}"):
        return torch.from_numpy(values.copy())


def _values(item: onnx.TensorProto, file: Path) -> np.ndarray:
    with opening(f"{file}: {item.name}"):
        return numpy_helper.to_array(item, str(file.parent))


def _centred(values: np.ndarray, zero_point: np.ndarray, axis: int) -> np.ndarray:
    """8-bit integers minus their zero point; what leaves the range wraps around, never to zero."""
    shape = [1] * values.ndim
    shape[axis] = zero_point.size if zero_point.size > 1 else 1
    return (values.astype(np.int16) - zero_point.astype(np.int16).reshape(shape)).astype(np.int8)


def _uses(graph: onnx.GraphProto) -> dict[str, _Use]:
    """By initializer, for those that nodes multiply by."""
    dequantized: dict[str, tuple[str, str | None, int]] = {}
    uses: dict[str, _Use] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            zero_point = node.input[2] if len(node.input) > 2 else None
            axes = [helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"]
            dequantized[node.output[0]] = node.input[0], zero_point, int(axes[0]) if axes else 1
        elif node.op_type in PRODUCTS:
            source = node.input[1]
            zero_point = node.input[3] if len(node.input) > 3 else None
            initializer, zero_point, axis = dequantized.get(source, (source, zero_point, 1))
            path, _, _ = node.name.strip("/").rpartition("/")
            if path and not initializer.endswith("weight"):
                name = f"{path.replace('/', '.')}.weight"
                uses[initializer] = _Use(name, True, zero_point, axis)
    return uses
