"""The models of `opfa bench inference`, in every form that a contestant reads.

A form is made once and kept, so that a bench that is started again needs only to measure. Zeros of
random models are at random places. Ranges of 8 bits are those of random tokens: speed doesn't
depend on them.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from transformers import PreTrainedModel

from opfa.bench.worker import FIRST_ID, LAST_ID
from opfa.compression import quant
from opfa.compression.pattern import Pattern
from opfa.downstream.recipe import Quantization
from opfa.downstream.student import prepare_8_bits
from opfa.errors import ModelError, opening
from opfa.inference import onnx_graph
from opfa.models.configs import load_config, new_config, quiet_transformers
from opfa.models.encoders import HEADS, load_weights
from opfa.storage.files import new_directory, new_file

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OLD_OPSET, OLD_IR = 14, 8  # what DeepSparse reads
SEEN = (4, 64)  # random tokens for the ranges of 8 bits


def write_random(root: Path, config: Mapping[str, Any], sparsities: Sequence[float]) -> None:
    """Write classifiers with random weights to `root`, each in a directory named as its sparsity.

    A weight that is zero in one is zero in all with more zeros.
    """
    wanted = [each for each in sorted({*sparsities}) if not (root / f"{each:g}").exists()]
    if not wanted:
        return
    torch.manual_seed(0)
    model = HEADS["SequenceClassification"].from_config(new_config(dict(config)))
    layers = Pattern().layers(model).values()
    chances = [torch.rand(layer.weight.shape) for layer in layers]
    for sparsity in wanted:
        with torch.no_grad():
            for layer, chance in zip(layers, chances, strict=True):
                layer.weight.masked_fill_(chance < sparsity, 0.0)
        _write(model, root / f"{sparsity:g}")


def write_given(model: str, directory: Path) -> None:
    """Write the encoder of a model under a new classifier."""
    if directory.exists():
        return
    config = load_config(model)
    found, _ = load_weights(HEADS["SequenceClassification"], model, config)
    _write(found, directory)


def _write(model: PreTrainedModel, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(directory) as work, quiet_transformers():
        model.save_pretrained(work)


def write_ranges(directory: Path) -> None:
    """Write ranges of 8 bits beside a model."""
    if not (directory / quant.FILE).exists():
        with new_file(directory / quant.FILE) as work:
            quant.save(_in_8_bits(_load(directory)), work)


def _load(directory: Path) -> PreTrainedModel:
    config = load_config(str(directory))
    head = HEADS["SequenceClassification"]
    return load_weights(head, str(directory), config, attn_implementation="eager")[0].eval()


def _in_8_bits(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which computes in 8 bits from now on."""
    prepare_8_bits(model, Quantization())
    for layer in quant.quant_layers(model).values():
        layer.train()  # it observes in training only
    with torch.no_grad():
        model(input_ids=torch.randint(FIRST_ID, LAST_ID, SEEN))
    quant.start(model)
    quant.freeze(model)
    return model.eval()


def write_onnx(directory: Path, tokens: int) -> dict[str, Path]:
    """Write a model as ONNX: "fp32" and "int8" of any shape, "fixed" for 1 x tokens.

    "int8" is what `opfa export` writes, but weights lie transposed in the file: only then OpenVINO
    computes in integers. "fixed" comes from torch's older exporter; DeepSparse reads no newer one.
    It is missing where this exporter fails.
    """
    files = {name: directory / f"{name}.onnx" for name in ("fp32", "int8", "fixed")}
    if all(file.exists() for name, file in files.items() if name != "fixed"):
        return {name: file for name, file in files.items() if file.exists()}
    model = _load(directory)
    try:
        _write_fixed(model, files["fixed"], tokens)
    except ModelError:
        del files["fixed"]
    graph = onnx_graph.trace(model, onnx_graph.input_names(model, INPUTS))
    with new_file(files["fp32"]) as work:
        onnx_graph.write(graph, work)
    onnx_graph.quantize(graph, _in_8_bits(model))
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
