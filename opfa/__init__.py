"""opfa: prune once for all. Sparse pre-trained encoders, and fine-tuning that holds their zeros.

opfa.lock(model)      # the zeros that are there now stay; returns what was locked, and how sparse
...                   # any training, with opfa.SparsityGuard as a callback of transformers' Trainer
opfa.fuse(model)      # plain modules again, exact zeros
opfa.inspect(model)   # the sparsity report of a model, or of a checkpoint on disk or the Hub
opfa.predict(...)     # what a finished model says of texts, or of a file of them
opfa.masked_lora(...) # a LoRA configuration whose updates keep the zeros of a locked model

Importing opfa also makes `transformers.AutoModel*.from_pretrained` read compact files.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opfa.errors import DataError, DivergedError, ModelError, OpfaError, RecipeError, RunError
from opfa.integrations.registration import register_when_needed

if TYPE_CHECKING:
    from opfa.integrations.guard import SparsityGuard
    from opfa.integrations.lora import masked_lora
    from opfa.runtimes.predict import predict
    from opfa.sparsity.layers import fuse, lock
    from opfa.weights.inspection import inspect

__version__ = version("opfa")
__all__ = [
    "DataError",
    "DivergedError",
    "ModelError",
    "OpfaError",
    "RecipeError",
    "RunError",
    "SparsityGuard",
    "__version__",
    "fuse",
    "inspect",
    "lock",
    "masked_lora",
    "predict",
]
LAZY = {  # where the rest is, so that `opfa --help` needs no torch
    "SparsityGuard": "opfa.integrations.guard",
    "fuse": "opfa.sparsity.layers",
    "inspect": "opfa.weights.inspection",
    "lock": "opfa.sparsity.layers",
    "masked_lora": "opfa.integrations.lora",
    "predict": "opfa.runtimes.predict",
}
register_when_needed()


def __getattr__(name: str) -> Any:  # Any: whatever the attribute is
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module 'opfa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
