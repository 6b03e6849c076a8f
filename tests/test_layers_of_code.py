"""The house: imports go down only, and each outside library has its one door."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opfa"
LEVELS = [
    {"errors", "anatomy", "clock"},
    {"aside"},
    {"recipe", "files", "lines", "order", "sparsity.structure", "foreign", "skeleton", "launch"},
    {"machine"},
    {
        "seal",
        "metrics",
        "tables",
        "schedules",
        "hub",
        "onnx_weights",
        "json_records",
        "sparsity.masks",
        "sparsity.packing",
        "zero",
        "state",
        "distributed",
        "index",
        "streams",
    },
    {"finished", "sparsity.pattern", "sparsity.layers", "upstream.masking", "compact", "transfer"},
    {"loading", "parquet_records", "sources"},
    {"records", "registration", "distill", "quant"},
    {"models", "engine", "run", "upstream.recipe", "downstream.recipe"},
    {"fit", "lora", "guard", "onnx_graph", "manifest", "provenance"},
    {"comparison", "pruner", "checkpoint", "report"},
    {"upstream.segments", "upstream.sentences", "downstream.examples", "downstream.beginnings"},
    {"inspection", "upstream.corpus", "began"},
    {"downstream.classes", "downstream.features", "plan", "weights", "hub_listing"},
    {"hub_origin"},
    {"origin"},
    {"download"},
    {"upstream.prepared", "downstream.scores", "downstream.squad"},
    {"upstream.batches"},
    {"upstream.objective", "downstream.tasks"},
    {"downstream.evaluate", "downstream.selection", "downstream.student"},
    {"downstream.teacher", "parity"},
    {"upstream.progress"},
    {"upstream.pretrain", "downstream.finetune"},
    {"bench_plain", "bench_markdown", "measure"},
    {"quickstart", "bench", "bench_files", "bench_train"},
    {"downstream.sweep", "downstream.calibrate"},
    {"card"},
    {"export", "release"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def internal(path: Path) -> set[str]:
    found = set()
    for name in imports(path):
        parts = name.removeprefix("opfa.").split(".") if name.startswith("opfa.") else []
        found |= {".".join(parts[:n]) for n in (1, 2) if ".".join(parts[:n]) in MODULES}
    return found


def test_every_module_has_its_place() -> None:
    assert set(LEVEL) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    above = {other for other in internal(MODULES[name]) if LEVEL[other] >= LEVEL[name]}
    assert not above


def test_upstream_and_downstream_do_not_know_each_other() -> None:
    for name, path in MODULES.items():
        for side, other in (("upstream.", "downstream."), ("downstream.", "upstream.")):
            if name.startswith(side):
                assert not [found for found in internal(path) if found.startswith(other)]


def test_only_the_engine_names_deepspeed() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(i.startswith("deepspeed") for i in imports(path))
    }
    assert users == {"engine"}


def test_only_models_and_tasks_name_model_classes() -> None:
    def classes(path: Path) -> set[str]:
        types = {"PreTrainedModel", "PreTrainedTokenizerBase", "BatchEncoding"}
        types |= {"PretrainedConfig", "PreTrainedConfig"}
        found = {i.split(".")[1] for i in imports(path) if i.startswith("transformers.")}
        return {name for name in found if name[0].isupper()} - types

    users = {name for name, path in MODULES.items() if classes(path)}
    assert users == {"models", "downstream.tasks", "guard"}
