"""Layer-wise reconstruction: the matrices of an encoder in the order of computation, each fitted on
what the model that is pruned so far feeds it, beside what the dense model feeds it.

The hidden states of all texts pass both models one layer at a time. Of the dense model one layer is
in memory, and sums of one matrix' inputs (`Inputs`). Matrices with the same input, such as queries,
keys and values, share them.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from opfa.compression.layerwise import Inputs
from opfa.errors import ModelError
from opfa.models.stepping import Call, Text, begun, outputs_of
from opfa.sparsity.anatomy import layer_of
from opfa.sparsity.layers import MaskedLinear

Layers = Mapping[str, MaskedLinear]  # by the names of their weights
Run = Callable[[], Any]  # calls the model on some text
Fit = Callable[[Layers, Inputs], None]  # sets weights, biases and masks of those that share inputs


class _Reached(Exception):  # noqa: N818 - not an error
    """The input of the matrix that a forward pass was for."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given


def check_stack(model: PreTrainedModel, names: Sequence[str]) -> nn.Module:
    """The one stack of numbered layers in the encoder that holds these weights; raises `ModelError`
    for any other.
    """
    stacks = {}
    for name in names:
        found = layer_of(name)
        path = name.removesuffix(f".{found.kind}.weight").rpartition(".")[0] if found else ""
        stacks.setdefault(path, name)
    inside = {id(module) for module in model.base_model.modules()}
    for path, name in stacks.items():
        if not path or id(model.get_submodule(path)) not in inside:
            what = "is in no numbered layer of the encoder, so texts say nothing of it"
            raise ModelError(f"{name}: {what}; exclude it")
    if len(stacks) > 1:
        what = f"the layers of {' and of '.join(map(repr, stacks))}: only one stack can be fitted"
        raise ModelError(f"{what}; exclude the others")
    return model.get_submodule(next(iter(stacks)))


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel, targets: Layers, texts: Sequence[tuple[Tensor, Run]], fit: Fit
) -> Iterator[int]:
    """Let `fit` change masked layers whose weights still are dense; yields the number of each layer
    of the encoder that is done.

    Each text is a mask of tokens [B, T], and how `model` is called on it. Raises `ModelError` for
    an encoder that doesn't compute layer by layer.
    """
    layers = list(check_stack(model, list(targets)).children())
    names = {id(layer): name for name, layer in targets.items()}
    ongoing = begun(layers, texts)
    _check(layers, ongoing[0], texts[0][1])
    for number, layer in enumerate(layers):
        dense = _dense(layer)
        paths = {path: names[id(m)] for path, m in layer.named_modules() if id(m) in names}
        for group in _groups(layer, paths, ongoing[0], number):
            inputs = _inputs(layer, dense, group[0], ongoing, number)
            fit({paths[path]: targets[paths[path]] for path in group}, inputs)
        for text in ongoing:
            text.theirs = text.calls[number].again(dense, text.theirs)
            text.ours = text.calls[number].again(layer, text.ours)
        yield number


def _check(layers: Sequence[nn.Module], text: Text, run: Run) -> None:
    """Hidden states that pass layer after layer must become what the whole model makes of them."""
    with outputs_of(layers[-1]) as found:
        run()
    states = text.ours
    if len(text.calls) == len(layers):
        for layer, call in zip(layers, text.calls, strict=True):
            states = call.again(layer, states)
    if len(text.calls) != len(layers) or not torch.allclose(
        states, found[0], atol=1e-4, equal_nan=True
    ):
        raise ModelError("this encoder doesn't compute layer by layer, so it can't be fitted so")


def _dense(layer: nn.Module) -> nn.Module:
    """A copy of a layer that computes with all of its weights."""
    found = copy.deepcopy(layer)
    for module in found.modules():
        if isinstance(module, MaskedLinear):
            module.mask.fill_(True)
    return found


def _groups(layer: nn.Module, paths: Mapping[str, str], text: Text, number: int) -> list[list[str]]:
    """The paths of matrices in the order of computation, those with the same input together."""
    seen: list[tuple[str, Tensor]] = []

    def note(path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((path, args[0]))

    with ExitStack() as watching:
        for path in paths:
            hook = layer.get_submodule(path).register_forward_pre_hook(partial(note, path))
            watching.callback(hook.remove)
        text.calls[number].again(layer, text.ours)
    groups: dict[int, list[str]] = {}
    for path, given in seen:
        if given.shape[:2] != text.is_token.shape:
            raise ModelError(f"{paths[path]}: its inputs are not those of tokens; exclude it")
        groups.setdefault(id(given), []).append(path)
    for path, name in paths.items():
        if (times := sum(path in group for group in groups.values())) != 1:
            raise ModelError(f"{name}: has {times} inputs in a pass, and needs one; exclude it")
    return list(groups.values())


def _inputs(
    layer: nn.Module, dense: nn.Module, path: str, texts: Sequence[Text], number: int
) -> Inputs:
    """What comes into a matrix, of real tokens."""
    weight = layer.get_submodule(path).weight
    assert isinstance(weight, Tensor), "a linear layer's"
    found = Inputs(weight.shape[1], weight.device)
    for text in texts:
        call = text.calls[number]
        ours = _input(layer, path, call, text.ours)
        theirs = _input(dense, path, call, text.theirs)
        found.add(ours[text.is_token], theirs[text.is_token])
    return found


def _input(layer: nn.Module, path: str, call: Call, states: Tensor) -> Tensor:
    """What comes into a matrix when a layer is called; what follows it is not computed."""

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    handle = layer.get_submodule(path).register_forward_pre_hook(stop)
    try:
        call.again(layer, states)
    except _Reached as reached:
        return reached.given
    finally:
        handle.remove()
    raise AssertionError("a matrix of a group was called before")


@torch.no_grad()
def distance(
    model: PreTrainedModel, dense: Mapping[str, Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[float, float]:
    """The mean squared difference of a value of the hidden states on real tokens from those with
    the `dense` parameters: in the last layer, and in all layers and the embeddings.
    """
    sums, num = torch.zeros(0, dtype=torch.float64), 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        given = {**batch, "output_hidden_states": True}
        theirs = functional_call(model.base_model, dict(dense), kwargs=given).hidden_states
        ours = model.base_model(**given).hidden_states
        pairs = zip(ours, theirs, strict=True)
        found = [
            (one[real].double() - other[real].double()).square().mean() for one, other in pairs
        ]
        added = int(real.sum()) * torch.stack(found).cpu()
        sums, num = sums + added if num else added, num + int(real.sum())
    if not bool(sums.isfinite().all()):
        raise ModelError("hidden states on these texts are not finite")
    return float(sums[-1] / num), float(sums.mean() / num)
