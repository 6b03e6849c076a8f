"""An encoder, layer by layer: what each layer is called with, and calling it again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from opfa.errors import ModelError


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the hidden states [B, T, hidden]."""

    args: tuple[Any, ...]  # masks and positions, as a family has them
    kwargs: dict[str, Any]

    def again(self, layer: nn.Module, states: Tensor) -> Tensor:
        """The call of a layer, or of one like it, for these hidden states."""
        found = layer(states, *self.args, **self.kwargs)
        return found[0] if isinstance(found, tuple) else found


def calls_of(layers: Iterable[nn.Module], run: Callable[[], Any]) -> tuple[Tensor, list[Call]]:
    """The hidden states that come into the first layer, and how each layer is called, while `run`
    calls their model once. Raises `ModelError` for layers that get no hidden states in first place.
    """
    calls, states = list[Call](), list[Tensor]()

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise ModelError(f"{type(layer).__name__}: is not called with hidden states first")
        calls.append(Call(args[1:], kwargs))
        states.append(args[0])
        del states[1:]

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return states[0], calls


@dataclass
class Text:
    """A batch on its way through a dense model and a pruned one."""

    is_token: Tensor  # [B, T], False where it is padding
    calls: list[Call]  # of the layers
    theirs: Tensor  # hidden states of the dense model, [B, T, hidden]
    ours: Tensor  # of the pruned one


def begun(
    layers: Sequence[nn.Module], texts: Iterable[tuple[Tensor, Callable[[], Any]]]
) -> list[Text]:
    """Texts before the first layer: for each a mask of tokens [B, T], and what calls the model."""
    found = []
    for is_token, run in texts:
        states, calls = calls_of(layers, run)
        found.append(Text(is_token.bool(), calls, states, states))
    return found


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of a module, while the context lasts."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def outputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states after each call of a layer, while the context lasts."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
