"""Finished models: look at them, get them, make them small and pass them on, as functions.

As in `opfa.api.train`: paths as text or `Path`, frozen results, `OpfaError`, no end of the process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opfa.api.progress import progress
from opfa.api.recipes import AnyRecipe, Overrides, task_recipe_of, words_of
from opfa.downstream.recipe import recipe_of
from opfa.errors import RunError
from opfa.hub.index import Released
from opfa.storage.files import check_file, check_new, check_there

if TYPE_CHECKING:  # these wait for torch, or for huggingface_hub
    from opfa.hub.results import DownloadResult, PushResult
    from opfa.inference.results import ExportResult
    from opfa.inference.shrink import ShrinkResult
    from opfa.releases.results import ReleaseResult, UnpackResult
    from opfa.runtime.packer import PackResult
    from opfa.serving.results import ArchiveResult
    from opfa.weights.comparison import Comparison

ARCHIVE = ".tar.gz"  # of an output for SageMaker
Form = Literal["dense", "compact", "compact-int8"]
Dtype = Literal["fp32", "fp16", "bf16"]


def compare(before: str | Path, after: str | Path) -> "Comparison":
    """What changed between two checkpoints: masks, zeros by layer, and distances of weights.

    Each is a directory, a run, a weight file or a Hub name.
    """
    from opfa.weights.comparison import compare as execute

    return execute(str(before), str(after))


def list_models() -> list[Released]:
    """The released models that `download` knows by name; a figure is None if nobody measured it."""
    from opfa.hub.index import released

    return released()


@progress()
def download(
    name: str, output: str | Path, *, revision: str | None = None, endpoint: str | None = None
) -> "DownloadResult":
    """Get a released model into the new directory `output`, and verify every file.

    `name` is of the Hub or of `list_models`, an https URL or a directory; `revision` a branch, tag
    or commit of the Hub, `endpoint` a mirror of it. An output that is the same already stays.
    """
    from opfa.hub.download import download as execute

    return execute(name, Path(output), revision=revision, endpoint=endpoint)


@progress()
def release(
    run: str | Path,
    output: str | Path,
    overrides: Overrides = (),
    *,
    format: Form = "dense",
    dtype: Dtype | None = None,
    embeddings: Literal["int8", "same"] | None = None,
    name: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    compare: Mapping[str, str | Path] | None = None,
    push: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> "ReleaseResult":
    """Make a finished run a release: verified weights, card and manifest, in the new `output`.

    `format` is plain safetensors, or positions and values; `dtype` (fp32, with compact-int8 fp16)
    is for what is not in 8 bits, and `embeddings` is for compact-int8. Rounded weights are measured
    again; `overrides` say where the data are now. The card has `name` (the directory's), `license`
    as the Hub calls it, the `base_model` it began with, and the results of the runs to `compare`
    with, by label. `push` then uploads it to this Hub name.
    """
    if push is None and (private or endpoint):
        raise RunError("private and endpoint are for push")
    check_new(Path(output))
    check_there(Path(run))
    from opfa.releases import release as releasing

    found = releasing.release(
        Path(run),
        Path(output),
        name=name or push,
        form=format,
        dtype=dtype,
        embeddings=None if embeddings is None else embeddings == "int8",
        licence=license,
        base_model=base_model,
        compare={label: Path(path) for label, path in (compare or {}).items()},
        overrides=words_of(overrides),
    )
    if push is None:
        return found
    uploaded = releasing.push(Path(output), push, endpoint=endpoint, private=private)
    return found.model_copy(update={"address": uploaded.address})


@progress()
def push(
    directory: str | Path, name: str, *, private: bool = False, endpoint: str | None = None
) -> "PushResult":
    """Verify a release and upload it to a Hub name as one commit, which replaces older files."""
    check_there(Path(directory))
    from opfa.hub.publish import push as execute

    return execute(Path(directory), name, endpoint=endpoint, private=private)


@progress()
def unpack(directory: str | Path, output: str | Path) -> "UnpackResult":
    """Write the plain form of a compact model, which transformers reads without opfa."""
    check_new(Path(output))
    check_there(Path(directory))
    from opfa.releases.release import unpack as execute

    return execute(Path(directory), Path(output))


@progress()
def pack(
    model: str | Path, output: str | Path, *, dtype: Literal["fp32", "bf16", "int8"] | None = None
) -> "PackResult":
    """Pack an encoder, with its head if it has one, for CPUs: `opfa.runtime.load` and `predict`.

    `model` is a BERT, RoBERTa, DistilBERT or ModernBERT: a run, a directory in any form or a Hub
    name. The new directory `output` has its configuration, its tokenizer, the recipe of its run and
    one file, which is mapped and not read, so that processes share it. Matrices of which half is
    zero, or more, are there without their zeros. `dtype` is how it computes, as in
    `opfa.runtime.load`.
    """
    if str(output).endswith(ARCHIVE):
        raise RunError(f"{output}: opfa.archive writes an archive; pack writes a directory")
    check_new(Path(output))
    recipe = recipe_of(str(model))
    from opfa.runtime.packer import pack as execute

    return execute(str(model), Path(output), dtype, recipe and recipe.to_public_toml())


@progress()
def archive(
    model: str | Path,
    output: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    dtype: Literal["fp32", "int8"] | None = None,
    keep: float | None = None,
    shrink: bool = False,
    most_gb: float = 5,
) -> "ArchiveResult":
    """Write what a SageMaker endpoint serves: a model as ONNX, and the code that answers there.

    `output` ends in .tar.gz. `shrink` removes dead heads and neurons first. `keep` prunes first, to
    this share of the multiply-adds of heads and neurons, on the task of `recipe` (the run's own),
    and then shrinks. `RunError` is raised for files of more than `most_gb` GB unpacked. Needs
    `opfa[export]`.
    """
    if not str(output).endswith(ARCHIVE):
        raise RunError(f"{output}: the name of an archive ends in {ARCHIVE}")
    if dtype not in (None, "fp32", "int8"):
        raise RunError(f"dtype = {dtype!r}: an archive has a model in ONNX; give 'fp32' or 'int8'")
    if keep is None and (recipe is not None or overrides):
        name = "overrides" if recipe is None else "recipe"
        raise RunError(f"{name}: is for keep, which measures on its task")
    check_new(Path(output), "file")
    checked = None if keep is None else task_recipe_of(model, recipe, overrides)
    from opfa.serving.archive import Making
    from opfa.serving.archive import archive as execute

    making = Making(precision=dtype, keep=keep, has_shrunk=shrink, recipe=checked)
    return execute(str(model), Path(output), making, most_gb=most_gb)


@progress()
def shrink(
    model: str | Path,
    output: str | Path,
    *,
    form: Literal["even", "uneven", "onnx", "same-shape"] = "uneven",
) -> "ShrinkResult":
    """Remove dead heads and neurons exactly: smaller matrices that compute the same.

    `model` is a BERT, RoBERTa, DistilBERT or ModernBERT: a run, a directory in any form or a Hub
    name. The new directory `output` gets the model and its tokenizer, in a `form`: "uneven", where
    each layer has its own number of heads and neurons, and which needs `import opfa` to be loaded;
    "even", one number of neurons for all layers, which any transformers loads; "onnx"; or
    "same-shape", where what is dead is zero throughout. What a dead unit still adds goes into the
    next bias. A head whose queries or keys alone are dead still averages its values, so it stays.
    Raises `ModelError` if nothing else is dead.
    """
    check_new(Path(output))
    from opfa.inference.shrink import shrink as execute

    return execute(str(model), Path(output), form)


@progress()
def export(
    model: str | Path,
    output: str | Path,
    *,
    precision: Literal["int8", "fp32"] | None = None,
    verify: str | Path | None = None,
    recipe: AnyRecipe | None = None,
    report: str | Path | None = None,
) -> "ExportResult":
    """Write a fine-tuned model as the new file `output`, FILE.onnx, tokenizer beside it.

    By default in 8 bits if the model has its ranges. `verify`, a file or a Hub split, goes through
    torch and ONNX Runtime first, as the task of `recipe` (the run's own) says. Nothing is written
    if they differ. `report` is a JSON file for the result. Needs `opfa[export]`.
    """
    if verify is None and recipe is not None:
        raise RunError("recipe is for verify, whose columns it explains")
    check_new(Path(output), "file")
    if report is not None:
        check_file(Path(report))
    task = None
    if verify is not None:
        checked = task_recipe_of(model, recipe, ())
        task = checked.task.model_copy(update={"validation": str(verify)})
    from opfa.inference.export import export as execute

    is_int8 = None if precision is None else precision == "int8"
    file = None if report is None else Path(report)
    return execute(str(model), Path(output), is_int8=is_int8, task=task, report=file)
