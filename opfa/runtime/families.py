"""The families of encoders, as steps for the kernels: BERT, RoBERTa, DistilBERT and ModernBERT.

Weights are taken from a transformers model by the paths of its modules. Queries, keys and values
become one matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from opfa.errors import ModelError
from opfa.runtime.layers import Layers, array_of, table_of
from opfa.runtime.packing import Floats, Packed
from opfa.runtime.program import Form, Program
from opfa.sparsity.units import FAMILIES, head_size

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Build:
    """A program while it is put together from the modules of an encoder."""

    def __init__(self, encoder: PreTrainedModel, layers: Layers) -> None:
        """Begin with no steps."""
        self.encoder, self.layers, self.program = encoder, layers, Program()
        self._narrowed: dict[int, int] = {}  # buffers, and those of their values in another form
        self.channels, self.table_sizes = 0, list[int]()
        self.most_tokens: int | None = None  # where no table has positions
        self.first_position: int | None = None  # the id of padding, if positions begin behind it
        self.matrices: dict[str, Packed] = {}  # by the paths of the layers that they stand for

    def module(self, path: str) -> Any:  # Any: a module of the family
        """A module of the encoder."""
        return self.encoder.get_submodule(path)

    def width(self, path: str) -> int:
        """The channels that a layer reads."""
        return self.module(path).in_features

    def embed(self, paths: Sequence[str], target: int) -> None:
        """Sums of embeddings."""
        tables = [table_of(self.module(path)) for path in paths]
        self.table_sizes = [len(table) for table in tables]
        self.program.embed(tables, target)

    def store(self, source: int, channels: int) -> None:
        """The hidden states that a call gives."""
        self.channels = channels
        self.program.store(source, channels)

    def norm(self, path: str, source: int, target: int) -> None:
        """Layer normalization."""
        module = self.module(path)
        self.program.norm(
            source, target, array_of(module.weight), array_of(module.bias), float(module.eps)
        )

    def linear(
        self, paths: Sequence[str], source: int, target: int, *, feeds: str = "", **options: Any
    ) -> None:
        """Layers with the same input, one below the other in target; `feeds` is the layer whose
        input target is, and `options` are those of `Program.linear`.
        """
        forms = [self.layers.form(path) for path in paths]
        if len(set(forms)) > 1:  # in 8 bits, each with its own range
            first = 0
            for path in paths:
                first += self._linear([path], source, target, first=first, **options)
            return
        if feeds and (form := self.layers.form(feeds)) is not None:
            options["form"] = form
            self._narrowed[target] = target
        self._linear(paths, source, target, **options)

    def _linear(self, paths: Sequence[str], source: int, target: int, **options: Any) -> int:
        """Layers as one step; gives how many rows they have."""
        found = self.layers.linear(paths)
        self.matrices[" ".join(paths)] = found.matrix
        if found.form is not None:
            source = self._narrow(source, found.matrix.columns, found.form)
        options["scales"] = found.scales
        self.program.linear(found.matrix, found.bias, source, target, **options)
        return found.matrix.rows

    def _narrow(self, source: int, channels: int, form: Form) -> int:
        """The buffer of a source in a form; what `feeds` wrote has it already."""
        if self._narrowed.get(source) != source:
            if source not in self._narrowed:
                self._narrowed[source] = self.program.buffer(channels)
            self.program.narrow(source, self._narrowed[source], channels, form)
        return self._narrowed[source]


def _activation(name: object) -> str:
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r}: the runtime has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[str(name)]


@dataclass(frozen=True, kw_only=True)
class PostNorm:
    """Layers that normalize after each residual: what families call by names of their own."""

    activation: object
    tables: Sequence[str]
    norms: tuple[str, str]  # after attention, and after the feed-forward


def _post_norm(build: Build, config: Any, own: PostNorm) -> None:  # Any: of the family
    hidden, program, size = config.hidden_size, build.program, head_size(config)
    family = FAMILIES[config.model_type]
    x, sums = program.buffer(hidden), program.buffer(hidden)
    qkv, attended = program.buffer(3 * hidden), program.buffer(hidden)
    layers = [f"{family.stack}.{number}." for number in range(config.num_hidden_layers)]
    middle = program.buffer(max(build.width(layer + family.neurons_out) for layer in layers))
    build.embed(own.tables, x)
    build.norm("embeddings.LayerNorm", x, x)
    activation = _activation(own.activation)
    for layer in layers:  # one without heads or neurons adds its bias alone
        out, down = layer + family.heads_out, layer + family.neurons_out
        if width := build.width(out):
            build.linear([layer + rows.path for rows in family.heads], x, qkv)
            program.attention(qkv, attended, width, width // size)
        build.linear([out], attended, sums, residual=x)
        build.norm(layer + own.norms[0], sums, x)
        if build.width(down):
            up = [layer + rows.path for rows in family.neurons]
            build.linear(up, x, middle, feeds=down, activation=activation)
        build.linear([down], middle, sums, residual=x)
        build.norm(layer + own.norms[1], sums, x)
    build.store(x, hidden)


def _bert(build: Build, config: Any) -> None:  # Any: the family's configuration
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    own = PostNorm(
        activation=config.hidden_act,
        tables=[f"embeddings.{table}" for table in tables],
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
    )
    _post_norm(build, config, own)


def _roberta(build: Build, config: Any) -> None:
    build.first_position = config.pad_token_id
    _bert(build, config)


def _distilbert(build: Build, config: Any) -> None:
    own = PostNorm(
        activation=config.activation,
        tables=["embeddings.word_embeddings", "embeddings.position_embeddings"],
        norms=("sa_layer_norm", "output_layer_norm"),
    )
    _post_norm(build, config, own)


def _modernbert(build: Build, config: Any) -> None:
    """Layers that normalize before; gated, with rotated queries and keys, and some local."""
    hidden, program, size = config.hidden_size, build.program, head_size(config)
    x, normed, attended = (program.buffer(hidden) for _ in range(3))
    most = max(build.width(f"layers.{n}.mlp.Wo") for n in range(config.num_hidden_layers))
    qkv, both, middle = (program.buffer(n) for n in (3 * hidden, 2 * most, most))
    tables = {
        kind: _rotations(build.module("rotary_emb"), config, kind)
        for kind in set(config.layer_types)
    }
    build.most_tokens = config.max_position_embeddings
    build.embed(["embeddings.tok_embeddings"], x)
    build.norm("embeddings.norm", x, x)
    for number, kind in enumerate(config.layer_types):
        path = f"layers.{number}"
        if number:
            build.norm(f"{path}.attn_norm", x, normed)
        if width := build.width(f"{path}.attn.Wo"):
            build.linear([f"{path}.attn.Wqkv"], normed if number else x, qkv)
            program.rotate(qkv, width, width // size, tables[kind])
            window = config.sliding_window if kind == "sliding_attention" else 0
            program.attention(qkv, attended, width, width // size, window=window)
        build.linear([f"{path}.attn.Wo"], attended, x, residual=x)
        build.norm(f"{path}.mlp_norm", x, normed)
        if width := build.width(f"{path}.mlp.Wo"):
            build.linear([f"{path}.mlp.Wi"], normed, both)
            program.gate(both, middle, width, _activation(config.hidden_activation))
        build.linear([f"{path}.mlp.Wo"], middle, x, residual=x)
    build.norm("final_norm", x, normed)
    build.store(normed, hidden)


def _rotations(rotary: Any, config: Any, kind: str) -> list[Floats]:  # Any: the family's own
    """Cosines and sines [positions, half of a head]."""
    frequencies = getattr(rotary, f"{kind}_inv_freq").numpy().astype(np.float32)
    angles = np.arange(config.max_position_embeddings, dtype=np.float32)[:, None] * frequencies
    scaling = np.float32(getattr(rotary, f"{kind}_attention_scaling"))
    return [np.cos(angles) * scaling, np.sin(angles) * scaling]


BUILDERS: dict[str, Callable[[Build, Any], None]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
}


def build(encoder: PreTrainedModel, layers: Layers) -> Build:
    """The program of an encoder with its layers; raises `ModelError` for another family."""
    config: PretrainedConfig = encoder.config
    check_family(config)
    found = Build(encoder, layers)
    BUILDERS[config.model_type](found, config)
    return found


def check_family(config: PretrainedConfig) -> None:
    """Raise `ModelError` for a model that the runtime doesn't run."""
    if config.model_type not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise ModelError(f"model_type {config.model_type!r}: the runtime runs {known}")
    if getattr(config, "is_decoder", False):
        raise ModelError("is_decoder = true: the runtime runs encoders")
