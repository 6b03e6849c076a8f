"""The models of `opfa bench inference` as ONNX files."""

import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from opfa.bench.forms import in_8_bits, load
from opfa.errors import ModelError, opening
from opfa.extras import importing
from opfa.inference import onnx_graph
from opfa.storage.files import new_file

with importing("a comparison with other engines", "opfa[export]"):
    import onnx
    from onnx import numpy_helper

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OLD_OPSET, OLD_IR = 14, 8  # what DeepSparse reads


def write_onnx(directory: Path, tokens: int) -> dict[str, Path]:
    """Write a model as ONNX: "fp32" and "int8" of any shape, "fixed" for 1 x tokens.

    "int8" is what `opfa export` writes, but weights lie transposed in the file: only then OpenVINO
    computes in integers. "fixed" comes from torch's older exporter; DeepSparse reads no newer one.
    It is missing where this exporter fails.
    """
    files = {name: directory / f"{name}.onnx" for name in ("fp32", "int8", "fixed")}
    if all(file.exists() for name, file in files.items() if name != "fixed"):
        return {name: file for name, file in files.items() if file.exists()}
    model = load(directory)
    try:
        _write_fixed(model, files["fixed"], tokens)
    except ModelError:
        del files["fixed"]
    graph = onnx_graph.trace(model, onnx_graph.input_names(model, INPUTS))
    with new_file(files["fp32"]) as work:
        onnx_graph.write(graph, work)
    onnx_graph.quantize(graph, in_8_bits(model))
    transpose_weights(graph.graph)
    with new_file(files["int8"]) as work:
        onnx_graph.write(graph, work)
    return files


def _write_fixed(model: PreTrainedModel, path: Path, tokens: int) -> None:
    names = onnx_graph.input_names(model, INPUTS)
    example = {name: torch.ones(1, tokens, dtype=torch.long) for name in names}
    with new_file(path) as work, warnings.catch_warnings(action="ignore"):
        with opening(type(model).__name__, ModelError, "torch can't export it"), torch.no_grad():
            torch.onnx.export(
                model,
                kwargs=example,
                f=str(work),
                dynamo=False,
                opset_version=OLD_OPSET,
                input_names=names,
            )
        graph = onnx.load(work)
        graph.ir_version = min(graph.ir_version, OLD_IR)
        onnx.save(graph, work)


def transpose_weights(graph: onnx.GraphProto) -> None:
    """Replace each Transpose of a weight by the transposed weight."""
    weights = {item.name: item for item in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] not in weights:
            kept.append(node)
            continue
        weight = weights[node.input[0]]
        values = numpy_helper.to_array(weight).T.copy()
        weight.CopyFrom(numpy_helper.from_array(values, node.output[0]))
    rewritten = onnx.GraphProto(node=kept)  # copies, before the old ones go
    del graph.node[:]
    graph.node.extend(rewritten.node)
