"""A model whose weights are mapped from a packed file: a skeleton of transformers, and its tensors.

No dense matrix of the encoder is made, and embeddings and heads are used where the file is mapped.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from opfa.errors import ModelError
from opfa.models.configs import load_config, loading
from opfa.models.encoders import ENCODER, FEW_TOKENS, SPARE_TENSORS, skeleton
from opfa.models.sentences import is_sentence_encoder
from opfa.models.skeleton import try_out
from opfa.models.trained import class_of
from opfa.runtime.families import Matrices
from opfa.runtime.packed import PackedFile
from opfa.runtime.packing import Packed
from opfa.storage.foreign import PACKED

Run = Callable[[PreTrainedModel, Matrices], PreTrainedModel]  # puts an encoder into the kernels


def load(directory: Path, run: Run) -> PreTrainedModel:
    """The model of a packed directory; raises `ModelError` for one that is damaged."""
    name = str(directory)
    file, config = PackedFile(directory / PACKED), load_config(name)
    if config.model_type != file.facts.family:
        what = f"is of {file.facts.family!r}, and its config.json of {config.model_type!r}"
        raise ModelError(f"{file.path}: {what}")
    head, cls = ("", ENCODER) if is_sentence_encoder(name, config) else class_of(config)
    most = SPARE_TENSORS + 4 * (len(file.tensors) + len(file.matrices))
    model = skeleton(config, cls, most_tensors=most)
    _assign(model, file)
    encoder = model.base_model
    assert isinstance(encoder, PreTrainedModel), "heads stand on one"
    prefix = prefix_of(model)

    def matrix(paths: Sequence[str]) -> Packed:
        weights = [encoder.get_submodule(path).weight for path in paths]
        rows = sum(len(weight) for weight in weights if isinstance(weight, Tensor))
        columns = encoder.get_submodule(paths[0]).weight.shape[1]
        return file.matrix([prefix + path for path in paths], rows, int(columns))

    with loading("model", name):
        model = run(model, matrix)
    if empty := [key for key, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(f"{file.path}: {empty[0]}: is packed, and no matrix of the encoder")
    try_out(model, name, (1, 2, FEW_TOKENS) if head == "MultipleChoice" else (1, FEW_TOKENS))
    return model


def prefix_of(model: PreTrainedModel) -> str:
    """What names of the encoder's tensors begin with in a model with a head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _assign(model: PreTrainedModel, file: PackedFile) -> None:
    """Give a skeleton the tensors of a file, but for the weights of packed matrices."""
    packed = {f"{layer}.weight" for layers in file.matrices for layer in layers}
    parameters = list(model.named_parameters(remove_duplicate=False))
    tied: dict[int, str] = {id(p): key for key, p in parameters if key in file.tensors}
    made: dict[str, nn.Parameter] = {}
    left = set(file.tensors)
    for key, wanted in chain(parameters, model.named_buffers(remove_duplicate=False)):
        stored = key if key in file.tensors else tied.get(id(wanted))
        if stored is None:
            if key in packed:
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
