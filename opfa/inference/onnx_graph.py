"""A fine-tuned model as an ONNX graph, in fp32 or with 8-bit weights and activations.

    x -> QuantizeLinear -> DequantizeLinear ----------------------> MatMul
    weight, int8 [out, in] -> Transpose -> DequantizeLinear ------^

Initializers keep the names and the layout of the state dict, so zeros can be counted in the file.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.compression.quant import activation_scale, int8_weight, quant_embeddings, quant_layers
from opfa.errors import ModelError, opening
from opfa.extras import importing
from opfa.models.encoders import head_of
from opfa.models.sentences import VECTOR, Pooling
from opfa.sparsity.masks import Masks
from opfa.weights.onnx import read_onnx

with importing("opfa export", "opfa[export]"):
    import onnx
    from onnx import helper, numpy_helper
    from onnxscript import optimizer

OPSET = 20  # the first with Gelu
EXTERNAL_FROM = 2_000_000_000  # bytes of weights that one protobuf file can't hold any more


class _Pooled(nn.Module):
    """A sentence encoder: hidden states [B, T, H] and vectors [B, H] of tokens."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        states = outputs.last_hidden_state
        return states, self.pooling(states, attention_mask)


def trace(
    model: PreTrainedModel, input_names: Sequence[str], pooling: Pooling | None = None
) -> onnx.ModelProto:
    """The graph of a plain model; every axis of its inputs may have any size. With a pooling its
    outputs are hidden states and vectors.
    """
    head = head_of(model.config) if pooling is None else ""
    axes = ("batch", "choices", "tokens") if head == "MultipleChoice" else ("batch", "tokens")
    extents = (2, 3, 5)[: len(axes)]  # the exporter makes constants of 0 and 1
    example = {name: torch.zeros(extents, dtype=torch.long) for name in input_names}
    weights = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    outputs = ("start_logits", "end_logits") if head == "QuestionAnswering" else ("logits",)
    outputs = ("last_hidden_state", VECTOR) if pooling else outputs
    whole = _Pooled(model, pooling) if pooling else model
    with _quiet(), torch.no_grad():
        with opening(type(model).__name__, ModelError, "torch can't export this class"):
            program = torch.onnx.export(
                whole,
                kwargs=example,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                output_names=outputs,
                dynamic_shapes={name: dict(enumerate(axes)) for name in example},
                verbose=False,
            )
        assert program is not None, "the exporter was asked for a program"
        initializers = list(program.model.graph.initializers.values())
        for item in initializers if pooling else ():
            item.name = str(item.name).removeprefix("model.")
        matrices = [(item, item.const_value) for item in initializers if item.name in weights]
        for item, _ in matrices:  # equal small ones, such as zeros, would become one
            item.const_value = None
        optimizer.optimize_ir(
            program.model, should_fold=lambda node: False if node.op_type == "Transpose" else None
        )
        for item, values in matrices:
            item.const_value = values
    graph = program.model_proto
    for item in (*graph.graph.node, *graph.graph.value_info):
        item.ClearField("metadata_props")  # paths of this machine
    return graph


def input_names(model: PreTrainedModel, tokenizer_names: Sequence[str]) -> list[str]:
    """What the tokenizer gives and the model knows."""
    known = inspect.signature(model.forward).parameters
    return [name for name in tokenizer_names if name in known]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which concern its authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def quantize(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Give the graph of a model the 8 bits that its quantized layers compute with."""
    rewriting = _Rewriting(proto.graph, model)
    nodes = [new for node in proto.graph.node for new in rewriting.of(node)]
    missed = {*rewriting.layers, *rewriting.embeddings} - rewriting.done
    if missed:
        raise ModelError(f"{min(missed)}: torch exports this layer in an unknown form")
    rewritten = onnx.GraphProto(node=nodes)  # copies, before the old ones go
    del proto.graph.node[:]
    proto.graph.node.extend(rewritten.node)


class _Rewriting:
    """One pass over the nodes of a graph: which weights are in 8 bits, and under which names."""

    def __init__(self, graph: onnx.GraphProto, model: nn.Module) -> None:
        self.graph = graph
        self.layers = {f"{name}.weight": m for name, m in quant_layers(model).items()}
        self.embeddings = {f"{name}.weight": m for name, m in quant_embeddings(model).items()}
        self.done: set[str] = set()
        self.transposed: dict[str, str] = {}  # name of a transposed weight -> of the weight
        for initializer in graph.initializer:
            layer = self.layers.get(initializer.name) or self.embeddings.get(initializer.name)
            if layer is not None:
                weight, scale = int8_weight(layer)
                self._add(f"{initializer.name}_scale", scale.cpu().numpy())
                values = weight.cpu().numpy()
                initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))

    def of(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What stands for this node in 8 bits."""
        if node.op_type == "Gather" and node.input[0] in self.embeddings:
            return self._after(node, node.input[0])
        if node.op_type == "Transpose" and node.input[0] in self.layers:
            self.transposed[node.output[0]] = node.input[0]
            return self._after(node, node.input[0], axis=1)
        if node.op_type == "MatMul" and node.input[1] in self.transposed:
            return [*self._input(node, self.transposed[node.input[1]]), node]
        if node.op_type == "Gemm" and node.input[1] in self.layers:
            weight = node.input[1]
            node.input[1] = f"{weight}_values"
            # Said here, since ONNX Runtime's session.x64quantprecision asks for it before a Gemm.
            _, scale = int8_weight(self.layers[weight])
            zero_point = self._add(f"{weight}_zero_point", np.zeros(scale.shape, np.int8))
            numbers = self._dequantize(weight, node.input[1], weight, 0, zero_point)
            return [*self._input(node, weight), numbers, node]
        return [node]

    def _add(self, name: str, values: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def _after(self, node: onnx.NodeProto, weight: str, axis: int = 0) -> list[onnx.NodeProto]:
        """Move integers with this node, then make them numbers."""
        values = node.output[0]
        node.output[0] = f"{values}_int8"
        if weight in self.embeddings:
            self.done.add(weight)
        return [node, self._dequantize(node.output[0], values, weight, axis)]

    def _dequantize(
        self, integers: str, values: str, weight: str, axis: int, *zero_point: str
    ) -> onnx.NodeProto:
        inputs = [integers, f"{weight}_scale", *zero_point]
        return helper.make_node("DequantizeLinear", inputs, [values], name=values, axis=axis)

    def _input(self, node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
        """Round the layer's input; zero points are uint8."""
        if weight in self.done:
            raise ModelError(f"{weight}: is shared by layers; not exported in 8 bits")
        layer, name = self.layers[weight], weight.removesuffix(".weight")
        scale, zero_point = activation_scale(layer.low, layer.high)
        parameters = [
            self._add(f"{name}.input_scale", scale.cpu().numpy()),
            self._add(f"{name}.input_zero_point", zero_point.cpu().numpy().astype(np.uint8)),
        ]
        integers, values = f"{name}.input_int8", f"{name}.input_values"
        to_integers = helper.make_node("QuantizeLinear", [node.input[0], *parameters], [integers])
        node.input[0] = values
        self.done.add(weight)
        return [
            to_integers,
            helper.make_node("DequantizeLinear", [integers, *parameters], [values]),
        ]


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Write one file, or for the largest models two."""
    is_external = sum(len(item.raw_data) for item in proto.graph.initializer) > EXTERNAL_FROM
    location = f"{path.name}.data" if is_external else None
    onnx.save(proto, path, save_as_external_data=is_external, location=location)


def nonzeros(path: Path, names: Container[str]) -> Masks:
    """Where the named initializers of a file are not zero."""
    return {name: tensor != 0 for name, tensor in read_onnx(path) if name in names}


def rounded_to_zero(model: nn.Module) -> dict[str, Tensor]:
    """Live weights that 8 bits round to zero, by the name of their tensor."""
    layers = quant_layers(model).items()
    return {f"{n}.weight": (m.weight != 0) & (int8_weight(m)[0] == 0) for n, m in layers}
