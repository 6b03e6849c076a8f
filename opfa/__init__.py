"""opfa: prune once for all. Sparse pre-trained encoders, and fine-tuning that holds their zeros.

    opfa.finetune("recipe.toml", "runs/mine", {"model.init": "my-encoder"})  # zeros held
    opfa.predict("runs/mine", ["a text", "another one"])  # what the model says of them
    model = opfa.load("runs/mine")  # computes as it was trained, in 8 bits too

In a training of your own:

    opfa.prune(model, 0.9)    # one shot; or opfa.PruningCallback, along a ramp, in Trainer
    opfa.lock(model)          # the zeros that are there now stay
    ...                       # any training, with opfa.SparsityGuard as a callback of Trainer
    opfa.fuse(model)          # plain modules again, exact zeros
    opfa.inspect(model)       # the sparsity report of a model, or of a checkpoint
    opfa.masked_lora(...)     # a LoRA configuration whose updates keep the zeros

Every command is a function of the same name. Importing opfa also makes
`transformers.AutoModel*.from_pretrained` read compact files.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from opfa.errors import DataError, DivergedError, ModelError, OpfaError, RecipeError, RunError
from opfa.integrations.registration import register_when_needed

if TYPE_CHECKING:
    from opfa.api.models import (
        archive,
        compare,
        download,
        export,
        list_models,
        pack,
        push,
        release,
        shrink,
        unpack,
    )
    from opfa.api.own import list_recipes, new_recipe
    from opfa.api.prune import prune
    from opfa.api.search import search_models
    from opfa.api.serve import serve
    from opfa.api.structured import prune_layers, prune_structured
    from opfa.api.train import calibrate, check, evaluate, finetune, plan, prepare, pretrain
    from opfa.api.trim import trim
    from opfa.inference.predict import predict
    from opfa.integrations.guard import SparsityGuard
    from opfa.integrations.lora import masked_lora
    from opfa.integrations.pruning import PruningCallback
    from opfa.models.trained import load
    from opfa.runtime.training import lock
    from opfa.sparsity.layers import fuse
    from opfa.weights.inspection import inspect

__version__ = version("opfa")
LAZY = {  # where the rest is, so that `opfa --help` needs no torch
    "PruningCallback": "opfa.integrations.pruning",
    "SparsityGuard": "opfa.integrations.guard",
    "archive": "opfa.api.models",
    "calibrate": "opfa.api.train",
    "check": "opfa.api.train",
    "compare": "opfa.api.models",
    "download": "opfa.api.models",
    "evaluate": "opfa.api.train",
    "export": "opfa.api.models",
    "finetune": "opfa.api.train",
    "fuse": "opfa.sparsity.layers",
    "inspect": "opfa.weights.inspection",
    "list_models": "opfa.api.models",
    "list_recipes": "opfa.api.own",
    "load": "opfa.models.trained",
    "lock": "opfa.runtime.training",
    "masked_lora": "opfa.integrations.lora",
    "new_recipe": "opfa.api.own",
    "pack": "opfa.api.models",
    "plan": "opfa.api.train",
    "predict": "opfa.inference.predict",
    "prepare": "opfa.api.train",
    "pretrain": "opfa.api.train",
    "prune": "opfa.api.prune",
    "prune_layers": "opfa.api.structured",
    "prune_structured": "opfa.api.structured",
    "push": "opfa.api.models",
    "release": "opfa.api.models",
    "search_models": "opfa.api.search",
    "serve": "opfa.api.serve",
    "shrink": "opfa.api.models",
    "trim": "opfa.api.trim",
    "unpack": "opfa.api.models",
}
__all__ = [
    "DataError",
    "DivergedError",
    "ModelError",
    "OpfaError",
    "PruningCallback",
    "RecipeError",
    "RunError",
    "SparsityGuard",
    "__version__",
    "archive",
    "calibrate",
    "check",
    "compare",
    "download",
    "evaluate",
    "export",
    "finetune",
    "fuse",
    "inspect",
    "list_models",
    "list_recipes",
    "load",
    "lock",
    "masked_lora",
    "new_recipe",
    "pack",
    "plan",
    "predict",
    "prepare",
    "pretrain",
    "prune",
    "prune_layers",
    "prune_structured",
    "push",
    "release",
    "search_models",
    "serve",
    "shrink",
    "trim",
    "unpack",
]
register_when_needed()

if not TYPE_CHECKING:  # else a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name in LAZY:
            return getattr(importlib.import_module(LAZY[name]), name)
        raise AttributeError(f"module 'opfa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
