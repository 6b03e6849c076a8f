"""opfa: prune once for all. Sparse pre-trained encoders, and fine-tuning that holds their zeros.

opfa.lock(model)      # the zeros that are there now stay; returns what was locked, and how sparse
...                   # any training
opfa.fuse(model)      # plain modules again, exact zeros
opfa.inspect(model)   # the sparsity report of a model, or of a checkpoint on disk or the Hub

Importing opfa also makes `transformers.AutoModel*.from_pretrained` read compact files.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opfa.integrations.registration import register_when_needed

if TYPE_CHECKING:
    from opfa.sparsity.layers import fuse, lock
    from opfa.weights.inspection import inspect

__version__ = version("opfa")
__all__ = ["fuse", "inspect", "lock"]
register_when_needed()


def __getattr__(
    name: str,
) -> Any:  # Any: whatever the attribute is. Lazy, so that `opfa --help` needs no torch
    if name in ("lock", "fuse"):
        from opfa.sparsity import layers

        return getattr(layers, name)
    if name == "inspect":
        from opfa.weights.inspection import inspect

        return inspect
    raise AttributeError(f"module 'opfa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
