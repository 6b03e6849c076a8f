"""After `import opfa`, `from_pretrained` knows compact files and uneven layers, whichever is
imported first.

`opfa --help` should not wait for transformers, so a finder acts when its modules are imported.
Uneven layers are registered when a configuration first asks for them: while any class is
registered, transformers looks through all of its modules at each load, for 0.4 s.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_compact_files() -> None:
    from opfa.integrations import loading  # only here: it imports transformers

    loading.register()


def _watch_configurations() -> None:
    from transformers.integrations.heterogeneity import configuration_utils

    mixin: Any = configuration_utils.HeterogeneousConfigMixin
    plain = mixin.per_layer_config

    def set_and_register(config: object, value: object) -> None:
        plain.fset(config, value)
        if value:
            from opfa.integrations import uneven

            uneven.register()

    mixin.per_layer_config = plain.setter(set_and_register)


AFTER: dict[str, Callable[[], None]] = {  # modules of transformers, and what to do then
    "transformers.modeling_utils": _register_compact_files,
    "transformers.integrations.heterogeneity.configuration_utils": _watch_configurations,
}


class _After:
    """Finds modules as anyone would, and acts when one of `AFTER` is loaded."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.names:
            return None
        self.names.remove(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                AFTER[name]()

            spec.loader.exec_module = execute_and_act
        return spec


def register_when_needed() -> None:
    """Register what opfa writes with transformers: now if it is loaded, else then."""
    for name in AFTER.keys() & sys.modules.keys():
        AFTER[name]()
    if later := set(AFTER) - sys.modules.keys():
        sys.meta_path.insert(0, _After(later))
