"""A model whose weights are mapped from a packed file: a skeleton of transformers, and its tensors.

No dense matrix of the encoder is made, and embeddings and heads are used where the file is mapped.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.errors import ModelError
from opfa.models.configs import load_config, loading
from opfa.models.encoders import ENCODER, FEW_TOKENS, SPARE_TENSORS, skeleton
from opfa.models.sentences import is_sentence_encoder
from opfa.models.skeleton import try_out
from opfa.models.trained import class_of
from opfa.runtime.families import Layers, Linear
from opfa.runtime.packed import PackedFile
from opfa.storage.foreign import PACKED

Run = Callable[[PreTrainedModel, Layers], PreTrainedModel]  # puts an encoder into the kernels


def load(directory: Path, run: Run) -> PreTrainedModel:
    """The model of a packed directory; raises `ModelError` for one that is damaged."""
    name = str(directory)
    file, config = PackedFile(directory / PACKED), load_config(name)
    if config.model_type != file.facts.family:
        what = f"is of {file.facts.family!r}, and its config.json of {config.model_type!r}"
        raise ModelError(f"{file.path}: {what}")
    head, cls = ("", ENCODER) if is_sentence_encoder(name, config) else class_of(config)
    most = SPARE_TENSORS + 4 * (len(file.tensors) + len(file.layers))
    model = skeleton(config, cls, most_tensors=most)
    _assign(model, file)
    with loading("model", name):
        model = run(model, lambda paths: _layers(model, file, paths))
    if empty := [key for key, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(f"{file.path}: {empty[0]}: is packed, and no matrix of the encoder")
    try_out(model, name, (1, 2, FEW_TOKENS) if head == "MultipleChoice" else (1, FEW_TOKENS))
    return model


def prefix_of(model: PreTrainedModel) -> str:
    """What names of the encoder's tensors begin with in a model with a head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _layers(model: PreTrainedModel, file: PackedFile, paths: Sequence[str]) -> Linear:
    """Layers of the encoder, in the shapes that they have in the skeleton."""
    names = [prefix_of(model) + path for path in paths]
    found = file.layers.get(tuple(names))
    if found is None:
        raise ModelError(f"{file.path}: {' + '.join(names)}: is missing")
    modules: list[Any] = [model.get_submodule(name) for name in names]
    rows, columns = sum(module.out_features for module in modules), modules[0].in_features
    matrix = found.matrix
    if (matrix.rows, matrix.columns) != (rows, columns):
        what = f"is {matrix.rows} x {matrix.columns}, and by its config.json {rows} x {columns}"
        raise ModelError(f"{file.path}: {' + '.join(names)}: {what}")
    return found


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
