"""A model whose weights are mapped from a packed file: a skeleton of transformers, and its tensors.

No dense matrix of the encoder is made, and embeddings and heads are used where the file is mapped.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.errors import ModelError, RunError
from opfa.models.configs import load_config, loading
from opfa.models.encoders import ENCODER, FEW_TOKENS, SPARE_TENSORS, skeleton
from opfa.models.sentences import is_sentence_encoder
from opfa.models.skeleton import try_out
from opfa.models.trained import class_of
from opfa.runtime.layers import Layers, Linear
from opfa.runtime.packed import PackedFile
from opfa.runtime.packing import for_this_cpu
from opfa.runtime.program import Form
from opfa.storage.foreign import PACKED

# Puts an encoder into the kernels: its layers, and the type of their products.
Run = Callable[[PreTrainedModel, Layers, str], PreTrainedModel]


def load(directory: Path, dtype: str | None, run: Run) -> PreTrainedModel:
    """The model of a packed directory; raises `ModelError` for one that is damaged, and `RunError`
    for one that was packed in another type than `dtype`.
    """
    name = str(directory)
    file, config = PackedFile(directory / PACKED), load_config(name)
    if dtype not in (None, file.facts.dtype):
        what = f"is packed in {file.facts.dtype}; `opfa pack` its model ({file.facts.model}) again"
        raise RunError(f"model {name!r}: dtype = {dtype!r}: {what}")
    if config.model_type != file.facts.family:
        what = f"is of {file.facts.family!r}, and its config.json of {config.model_type!r}"
        raise ModelError(f"{file.path}: {what}")
    head, cls = ("", ENCODER) if is_sentence_encoder(name, config) else class_of(config)
    most = SPARE_TENSORS + 4 * (len(file.tensors) + len(file.layers))
    model = skeleton(config, cls, most_tensors=most)
    _assign(model, file)
    if (directory / quant.FILE).is_file():  # layers of a head
        quant.load(model, directory / quant.FILE)
    with loading("model", name):
        model = run(model, MappedLayers(model, file), file.facts.dtype)
    if empty := [key for key, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(f"{file.path}: {empty[0]}: is packed, and no matrix of the encoder")
    try_out(model, name, (1, 2, FEW_TOKENS) if head == "MultipleChoice" else (1, FEW_TOKENS))
    return model


def prefix_of(model: PreTrainedModel) -> str:
    """What names of the encoder's tensors begin with in a model with a head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


class MappedLayers:
    """Layers of a packed file, in the shapes that they have in the skeleton."""

    def __init__(self, model: PreTrainedModel, file: PackedFile) -> None:
        """Those of this model."""
        self.model, self.file = model, file
        self._forms = {name: it.form for names, it in file.layers.items() for name in names}

    def form(self, path: str) -> Form | None:
        """The form of a layer's input."""
        return self._forms.get(prefix_of(self.model) + path)

    def linear(self, paths: Sequence[str]) -> Linear:
        """Layers of one matrix; raises `ModelError` where it is missing or has another shape."""
        names = [prefix_of(self.model) + path for path in paths]
        found = self.file.layers.get(tuple(names))
        where = f"{self.file.path}: {' + '.join(names)}"
        if found is None:
            raise ModelError(f"{where}: is missing")
        modules: list[Any] = [self.model.get_submodule(name) for name in names]
        rows = sum(module.out_features for module in modules)
        columns = max(1, modules[0].in_features)  # none where a layer lost its heads or neurons
        if (found.matrix.rows, found.matrix.columns) != (rows, columns):
            what = f"is {found.matrix.rows} x {found.matrix.columns}"
            raise ModelError(f"{where}: {what}, and by its config.json {rows} x {columns}")
        return replace(found, matrix=for_this_cpu(found.matrix))


def _assign(model: PreTrainedModel, file: PackedFile) -> None:
    """Give a skeleton the tensors of a file, but for those of packed layers."""
    packed = {name for names in file.layers for name in names}
    parameters = list(model.named_parameters(remove_duplicate=False))
    tied: dict[int, str] = {id(p): key for key, p in parameters if key in file.tensors}
    made: dict[str, nn.Parameter] = {}
    left = set(file.tensors)
    for key, wanted in chain(parameters, model.named_buffers(remove_duplicate=False)):
        stored = key if key in file.tensors else tied.get(id(wanted))
        if stored is None:
            if key.rpartition(".")[0] in packed:
                continue
            raise ModelError(f"{file.path}: {key}: is missing")
        tensor = file.tensors[stored]
        if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            what = f"is {_kind(tensor)}, and by its config.json {_kind(wanted)}"
            raise ModelError(f"{file.path}: {key}: {what}")
        left.discard(stored)
        path, _, leaf = key.rpartition(".")
        if isinstance(wanted, nn.Parameter):
            tensor = made.setdefault(stored, nn.Parameter(tensor, requires_grad=False))
        setattr(model.get_submodule(path), leaf, tensor)
    if left:
        raise ModelError(f"{file.path}: {min(left)}: is not in a {type(model).__name__}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
