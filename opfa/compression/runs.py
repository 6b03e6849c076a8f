"""Where the fp32 weights are that are pruned: runs of flattened parameters, on some ranks."""

from torch import Tensor

from opfa.compression.selection import ALONE, Ranks
from opfa.sparsity.layers import MaskedLinear


class Weights:
    """Where fp32 weights are: all in this process. An engine whose ranks hold runs of flattened
    parameters overrides every method, each then collective.
    """

    ranks: Ranks = ALONE

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's run of a parameter's flattened fp32 value, [n]; possibly empty."""
        return parameter.detach().float().view(-1)

    def read_gradient(self, layer: MaskedLinear) -> Tensor:
        """This rank's fp32 run of the global batch's gradient, which the layer has to keep."""
        return layer.take_gradient().view(-1)

    def join(self, parameter: Tensor, run: Tensor) -> Tensor:
        """The whole tensor, in the parameter's shape, from every rank's run, bit for bit."""
        return run.view(parameter.shape)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's run, [n], of a tensor in the parameter's shape."""
        return whole.to(parameter.device).view(-1)

    def write(self, parameter: Tensor, whole: Tensor) -> None:
        """Give a parameter another fp32 value, in its shape."""
        parameter.data.copy_(whole)

    def compare(self, text: str) -> list[str]:
        """This text of every rank."""
        return [text]


HERE = Weights()
