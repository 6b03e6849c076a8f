"""What a model is, found in the model itself: how large, what its tables hold, whether it computes.

Positions and token types are counted in tables, since families name them in different ways in a
configuration.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel

from opfa.errors import ModelError, opening

MOST_TENSORS = 200_000
POSITIONS = ("position_embeddings", "embed_positions", "positions_embed", "wpe")
SPECIAL = ("pad", "cls", "sep", "bos", "eos")
TYPES = ("token_type_embeddings",)
TOKENS = "task.sequence_tokens"  # the key that says how long a sequence is, where no other does


@contextlib.contextmanager
def without_memory(
    most_tensors: int = MOST_TENSORS, most_weights: int | None = None
) -> Iterator[None]:
    """Let modules be made without memory; `ModelError` for more tensors or weights than these."""
    tensors = weights = 0

    def look(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, weights
        if parameter is None:
            return
        tensors, weights = tensors + 1, weights + parameter.numel()
        if tensors > most_tensors or (most_weights is not None and weights > most_weights):
            what = f"more than {most_weights:,} weights" if tensors <= most_tensors else "layers"
            where = f"at a {name} of {' x '.join(map(str, parameter.shape))}, tensor {tensors:,}"
            what = f"its config.json asks for {what}, more than its files can hold"
            raise ModelError(f"{what} ({where})")

    watching = register_module_parameter_registration_hook(look)  # pyright: ignore[reportArgumentType] - may return nothing
    with watching, torch.device("meta"), torch.random.fork_rng(devices=[]):
        yield


def _tables(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Modules of these names with their tables [rows, hidden]."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in names and isinstance(weight, Tensor) and weight.ndim == 2:
            yield module, weight


def num_positions(model: nn.Module, config: PretrainedConfig) -> int | None:
    """The longest sequence that a model has positions for. Some tables begin after a padding row
    (RoBERTa) or an offset (BART).
    """
    found = [getattr(config, "max_position_embeddings", None)]
    for module, table in _tables(model, POSITIONS):
        padding = getattr(module, "padding_idx", None)
        first = getattr(module, "offset", 0) if padding is None else padding + 1
        found.append(len(table) - first)
    counts = [count for count in found if isinstance(count, int) and count >= 0]
    return min(counts, default=None)


def padding_of_positions(model: nn.Module) -> int | None:
    """The id of padding from which a model counts its positions (RoBERTa); None in others."""
    found = (getattr(module, "padding_idx", None) for module, _ in _tables(model, POSITIONS))
    return next((index for index in found if index is not None), None)


def check_positions(
    model: nn.Module, config: PretrainedConfig, tokens: int, key: str = TOKENS
) -> None:
    """Refuse sequences that are longer than the model's positions; `key` has said how long."""
    positions = num_positions(model, config)
    if positions is not None and tokens > positions:
        raise ModelError(f"{key} = {tokens}: this model has only {positions} positions")


def num_token_types(model: nn.Module) -> int | None:
    """How many token types a model has a table for; None where it has none."""
    return min((len(table) for _, table in _tables(model, TYPES)), default=None)


def num_entries(model: PreTrainedModel) -> int:
    """How many tokens a model has an embedding for."""
    with opening(type(model).__name__, ModelError, "has no embeddings of tokens"):
        table = model.get_input_embeddings().weight
        assert isinstance(table, Tensor), "it is a table"
        return len(table)


def try_out(model: PreTrainedModel, name: str, shape: Sequence[int]) -> Mapping[str, Tensor]:
    """What a model answers to tokens of this shape; a wrong configuration may show only then."""
    check_positions(model, model.config, shape[-1])
    special = {getattr(model.config, f"{each}_token_id", None) for each in SPECIAL}
    rows = num_entries(model)
    ids = torch.full(tuple(shape), next((i for i in range(rows) if i not in special), 0))
    eos = getattr(model.config, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < rows:
        ids[..., -1] = eos  # BART's head looks for it
    was_training = model.training
    is_padded = model.config.pad_token_id is not None
    hint = "" if is_padded else " (its config.json has pad_token_id = null)"
    problem = f"can't compute with {shape[-1]} tokens{hint}"
    with opening(f"model {name!r}", ModelError, problem), torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            outputs = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        model.train(was_training)
        if not isinstance(outputs, Mapping):
            raise TypeError(f"answers with a {type(outputs).__name__} (return_dict)")
    return outputs
