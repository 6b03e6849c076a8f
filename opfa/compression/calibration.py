"""What text says of weights, without training: curvature, and the size of a layer's inputs.

It is measured on a model of its own, with the whole fp32 weights of the moment and on every rank
alike. So a score is the same at every world size and ZeRO stage, and an engine's gradients are left
alone.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from opfa.compression.blocks import Blocks, check_memory
from opfa.compression.measured import GRADIENTS
from opfa.compression.runs import Weights
from opfa.compression.scores import Ask
from opfa.errors import DataError, RunError
from opfa.sparsity.layers import MaskedLinear

Quantity = Literal["curvature", "activation", "fisher"]
Batch = Mapping[str, Tensor]  # a model's keywords, with its attention_mask [..., tokens]
Call = Callable[..., Any]  # a model by its keywords; Any: whatever it gives
ROWS = 4  # sequences of a batch, which is one sample of the curvature
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """Where text comes from, and what a model says of it."""

    batches: Callable[[int], Iterable[Batch]]  # of so many sequences, the same at each call
    outputs: Callable[[Call, Batch], Sequence[Tensor]]  # nothing of padding


def hidden_states(encoder: Call, batch: Batch) -> Sequence[Tensor]:
    """Of all layers, on real tokens."""
    real = batch["attention_mask"].bool()
    states = encoder(**batch, output_hidden_states=True).hidden_states
    return [state[real] for state in states[1:]]


def check_enough(key: str, sequences: int, there: int) -> None:
    """Raise `DataError` where a score measures more sequences than there are."""
    if sequences > there:
        what = f"the score measures {sequences:,} sequences, and {there:,} are there"
        raise DataError(f"{key}: {what}")


class Calibration:
    """Measures a model on text. Make it before layers are masked or an engine wraps the model."""

    def __init__(self, model: nn.Module, text: Text) -> None:
        """`model` is what computes the outputs: all of it, or the encoder. No weight is copied."""
        self._parameters = dict(model.named_parameters())
        empty = {id(p): nn.Parameter(p.detach().to("meta")) for p in self._parameters.values()}
        self._skeleton, self._text = copy.deepcopy(model, empty).eval(), text
        self.blocks: list[Blocks] = []  # of Fisher information, until masks were chosen by it

    def measure(
        self, ask: Ask, layers: Mapping[str, MaskedLinear], weights: Weights
    ) -> dict[str, Tensor]:
        """Whole fp32 tensors [out, in] by the names of the layers' weights, as they are masked now.
        Collective.

        "curvature" is the diagonal of the Gauss-Newton matrix: the squared gradient of
        <v, outputs> with v ~ N(0, I), summed over tokens (Martens, 2020, sections 6 and 8).
        "activation" is the norm of a column's inputs (Sun et al., 2023, eq. 1). "fisher" is the
        diagonal of the inverse of such a matrix in blocks; its blocks stay in `blocks`.
        Raises `RunError` where they are not finite, and where the memory isn't there.
        """
        quantity, sequences = ask.quantity, ask.sequences
        num_weights = sum(layer.mask.numel() for layer in layers.values())
        floats = (ask.block + GRADIENTS if ask.block else 2) * num_weights
        what = f"{quantity} of {len(layers)} matrices on {sequences:,} sequences"
        log.info("%s: needs %.0f MB beside a copy of all weights", what, 4e-6 * floats)
        values = {n: weights.join(p, weights.read(p)) for n, p in self._parameters.items()}
        own = {id(parameter): name for name, parameter in self._parameters.items()}
        places = {name: own[id(layer.weight)] for name, layer in layers.items()}
        for name, place in places.items():
            values[place] = (values[place] * layers[name].mask).requires_grad_()
        device = next(iter(values.values())).device
        less = ("smaller blocks", "another score") if ask.block else ("fewer matrices", "magnitude")
        check_memory(quantity, 4 * floats, device, f"{', or '.join(less)}, need less")
        self._to(device)
        batches = _timed(self._text.batches(sequences), sequences, what)
        if quantity == "activation":
            found = self._activation(values, places, batches)
        elif quantity == "curvature":
            found = {name: torch.zeros_like(values[place]) for name, place in places.items()}
            for gradients in self._gradients(values, places, batches):
                for total, gradient in zip(found.values(), gradients, strict=True):
                    total.addcmul_(gradient, gradient)
        else:
            shapes = {name: layer.mask.shape for name, layer in layers.items()}
            blocks = Blocks(shapes, ask.block, device)
            for gradients in self._gradients(values, places, batches):
                blocks.add(gradients)
            found = blocks.invert(ask.damping)
            self.blocks.append(blocks)
        for name, each in found.items():
            if not bool(each.isfinite().all()):
                raise RunError(f"{name}: its {quantity} on this text is not finite")
        return found

    def _to(self, device: torch.device) -> None:
        """Bring the buffers where the weights are."""
        for module in self._skeleton.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    def _call(self, values: dict[str, Tensor], **inputs: Tensor) -> Any:  # Any: of the model
        return functional_call(self._skeleton, values, kwargs=inputs)

    def _gradients(
        self, values: dict[str, Tensor], places: Mapping[str, str], batches: Iterator[Batch]
    ) -> Iterator[Sequence[Tensor]]:
        """For each batch one of <v, outputs>, v ~ N(0, I), by each weight. Raises `RunError` for a
        weight on which no output depends.
        """
        seed = torch.Generator().manual_seed(0)  # of the CPU, so that devices agree
        weights = [values[place] for place in places.values()]
        for batch in batches:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the same bits on every rank
                outputs = self._text.outputs(partial(self._call, values), batch)
                seeds = [torch.randn(each.shape, generator=seed).to(each) for each in outputs]
                pairs = [pair for pair in zip(outputs, seeds, strict=True) if pair[0].requires_grad]
                ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())  # no earlier layers
                gradients = torch.autograd.grad(ours, weights, theirs, allow_unused=True)
            for name, gradient in zip(places, gradients, strict=True):
                if gradient is None:
                    raise RunError(f"{name}: no output that is measured depends on it; exclude it")
            yield gradients

    @torch.no_grad()
    def _activation(
        self, values: dict[str, Tensor], places: Mapping[str, str], batches: Iterator[Batch]
    ) -> dict[str, Tensor]:
        sums = {place: torch.zeros_like(values[place][0]) for place in places.values()}
        mask = torch.empty(0)  # of the batch

        def see(place: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = inputs[0][mask] if inputs[0].dim() == 3 else inputs[0]  # a pooler has no tokens
            sums[place] += found.square().sum(0)

        with ExitStack() as watching:
            for place in sums:
                layer = self._skeleton.get_submodule(place.removesuffix(".weight"))
                hook = layer.register_forward_pre_hook(partial(see, place))
                watching.callback(hook.remove)
            for batch in batches:
                mask = batch["attention_mask"].flatten(0, -2).bool()
                self._text.outputs(partial(self._call, values), batch)
        rows = {name: len(values[place]) for name, place in places.items()}
        return {n: sums[places[n]].sqrt().repeat(rows[n], 1) for n in places}


def _timed(batches: Iterable[Batch], sequences: int, what: str) -> Iterator[Batch]:
    """The batches; says after the first one how long all of them take."""
    start, is_first = time.monotonic(), True
    for batch in batches:
        yield batch
        if is_first:
            seconds = (time.monotonic() - start) * sequences / ROWS
            log.info("%s: takes about %.0f s", what, seconds)
        is_first = False
