"""After `import opfa`, `from_pretrained` knows compact files, whichever is imported first.

`opfa --help` should not wait for transformers: a finder registers when its models are imported.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = "transformers.modeling_utils"


class _AfterModels:
    """Finds transformers' models as anyone would, and registers when they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(MODELS)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def register_when_needed() -> None:
    """Register compact files with transformers: now if its models are loaded, else then."""
    if MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterModels())


def _register() -> None:
    from opfa.integrations.loading import register  # only here: it imports transformers

    register()
