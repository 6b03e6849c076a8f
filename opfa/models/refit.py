"""Least squares for what is left: the matrices behind heads and neurons make up for those gone.

Layer by layer, from the first to the last, each output matrix W and its bias are fitted so that the
pruned model's hidden states become those of the dense model, on the same text:

    W + D' with D = (X' X + ridge)^-1 X' E

where X [tokens, live channels] is what comes in and E [tokens, hidden] what is missing. A matrix
with zeros of its own gets one factor for each unit instead, as in Kwon et al. 2022, section 4.3, so
that its zeros stay.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opfa.models.removal import family_of, layers_of
from opfa.models.stepping import Call, Text, begun, inputs_of
from opfa.sparsity.layers import SPARSE_FROM
from opfa.sparsity.units import HEADS, NEURONS, Units

RIDGE = 1e-2  # of the mean square of a channel
Run = Callable[[PreTrainedModel], Any]  # calls a model on some text


class Passed(NamedTuple):
    """What comes into an output matrix [B, T, width], and its output with what is added to it."""

    given: Tensor
    stream: Tensor


@torch.no_grad()
def refit(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    texts: Sequence[tuple[Tensor, Run]],
    gone: Collection[int] = (),
) -> Iterator[int]:
    """Fit the output matrices of `pruned`; yields the number of each layer that is done.

    Each text is a mask of tokens [B, T], and how a model is called on it. Units whose columns are
    zero stay so. Layers of these numbers are gone from `pruned`. Both models are in evaluation
    mode.
    """
    residual = {HEADS: "", NEURONS: family_of(dense).residual}  # "" is the layer itself
    layers = [layer for layer, _ in layers_of(dense)]
    ongoing = begun(layers, [(is_token, partial(run, dense)) for is_token, run in texts])
    left = layers_of(pruned)
    for number, (_, theirs) in enumerate(layers_of(dense)):
        wanted: list[dict[str, Tensor]] = []  # the streams of each text in the dense layer
        for text in ongoing:
            text.theirs, passed = _run(theirs, residual, text.calls[number], text.theirs)
            wanted.append({kind: each.stream for kind, each in passed.items()})
        if number not in gone:
            layer, ours = next(left)
            for kind, units in ours.items():
                streams = [each.pop(kind) for each in wanted]
                _fit(units, _missing(number, ongoing, streams, {kind: units}, residual))
            for text in ongoing:
                text.ours = text.calls[number].again(layer, text.ours)
        yield number


def _missing(
    number: int,
    texts: Sequence[Text],
    wanted: Sequence[Tensor],
    units: Mapping[str, Units],
    residual: Mapping[str, str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """What comes into the output matrix [tokens, width], and what is missing behind it
    [tokens, hidden], for each text.
    """
    for text, stream in zip(texts, wanted, strict=True):
        _, passed = _run(units, residual, text.calls[number], text.ours)
        (found,) = passed.values()
        yield found.given[text.is_token], (stream - found.stream)[text.is_token]


def _run(
    by_kind: Mapping[str, Units], residual: Mapping[str, str], call: Call, states: Tensor
) -> tuple[Tensor, dict[str, Passed]]:
    """The hidden states after a layer, and what passed its units."""
    layer = next(iter(by_kind.values())).layer
    with ExitStack() as watching:
        given, before = {}, {}
        for kind, units in by_kind.items():
            given[kind] = watching.enter_context(inputs_of(units.out))
            before[kind] = watching.enter_context(inputs_of(layer.get_submodule(residual[kind])))
        after = call.again(layer, states)
    return after, {
        kind: Passed(given[kind][0], units.out(given[kind][0]) + before[kind][0])
        for kind, units in by_kind.items()
    }


def _fit(units: Units, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
    weight, bias = units.out.weight, units.out.bias
    is_live = units.columns().any(2).any(0).repeat_interleave(units.size)
    width, hidden = int(is_live.sum()), len(weight)
    gram = weight.new_zeros(width + 1, width + 1, dtype=torch.float64)
    missing = weight.new_zeros(width + 1, hidden, dtype=torch.float64)
    for given, error in pairs:
        inputs = torch.cat([given[:, is_live], given.new_ones(len(given), 1)], 1)
        gram += inputs.T @ inputs
        missing += inputs.T @ error
    live = weight[:, is_live].double()
    change, of_bias = fitted(live, gram, missing, units.size, has_bias=bias is not None)
    if bias is not None:
        bias.copy_(bias + of_bias)
    weight[:, is_live] = (live + change).to(weight.dtype)


def fitted(
    live: Tensor, gram: Tensor, missing: Tensor, size: int, *, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """How a matrix [hidden, width], fp64, and its bias [hidden] change so that they give what is
    missing.

    `gram` [width + 1, width + 1] is X' X, `missing` [width + 1, hidden] X' E, and the last input a
    one, for the bias. A matrix with zeros of its own gets a factor for each unit of `size` columns,
    and its bias stays.
    """
    width = live.shape[1]
    if width and bool((live == 0).double().mean() >= SPARSE_FROM):
        change = _factors(live, gram[:-1, :-1], missing[:-1], size)
        return change, live.new_zeros(len(live))
    num = width + has_bias
    change = _solve(gram[:num, :num], missing[:num], width)
    return change[:width].T, change[-1] if has_bias else live.new_zeros(len(live))


def _factors(live: Tensor, gram: Tensor, missing: Tensor, size: int) -> Tensor:
    """The change of weights [hidden, width] when each unit gets a factor."""
    num = live.shape[1] // size
    sums = (gram * (live.T @ live)).unflatten(0, (num, size)).unflatten(2, (num, size)).sum((1, 3))
    wanted = (missing.T * live).sum(0).unflatten(0, (num, size)).sum(1)
    return live * _solve(sums, wanted[:, None], num)[:, 0].repeat_interleave(size)


def _solve(gram: Tensor, wanted: Tensor, num: int) -> Tensor:
    """Ridge regression; what comes after the first `num` inputs is not held back."""
    ridge = gram.new_zeros(len(gram))
    ridge[:num] = RIDGE * gram.diagonal()[:num].mean() if num else 0.0
    return torch.linalg.solve(gram + ridge.diag(), wanted)
