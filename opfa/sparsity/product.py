"""How a room above multiplies by masked weights in its own way."""

from typing import Any, Protocol  # Any: a MaskedLinear, whose file names this one

from torch import Tensor, nn


class Product(Protocol):
    """Another way to multiply by a masked layer's weight, put under the layer (its `product`).

    With `live`, the live weights [live] are what is trained, as one vector, and the layer's weight
    follows: an optimizer holds `live` instead of it, and puts it there after each step. `layer` is
    the masked layer, always the same.
    """

    live: nn.Parameter | None

    def __call__(self, layer: Any, input: Tensor) -> Tensor | None:
        """The layer's output, or None where `functional.linear` is to be used."""
        ...

    def take(self, layer: Any, whole: Tensor) -> Tensor:
        """The numbers [live] of a tensor like the weight, in the order of `live`."""
        ...

    def put(self, layer: Any, values: Tensor, whole: Tensor) -> None:
        """Write numbers [live] to their places in a tensor like the weight."""
        ...

    def check(self, layer: Any, name: str) -> None:
        """Raise `ModelError` if the layer's mask is not the one that was multiplied with."""
        ...
