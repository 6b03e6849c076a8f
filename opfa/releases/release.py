"""Release: a finished run -> a directory that others can use, verified before it gets its name.

weights            in fp32 or 16 bits, plain or compact; or the matrices in 8 bits, compact
config.json        and the tokenizer, as the run left them
sparsity.json      zeros and fingerprint, checked against the weight file that was written
recipe.toml        of the run, absolute paths shortened
README.md          the model card, with its picture
release.json       size and SHA-256 of every file, and results

"""

import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from opfa.compression import quant
from opfa.downstream.evaluate import measure
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import ModelError, RunError, opening
from opfa.extras import has_or_says
from opfa.hub import manifest
from opfa.hub.publish import check_name, push
from opfa.models import sentences
from opfa.releases import provenance
from opfa.releases.card import PICTURE, Release, model_card
from opfa.releases.provenance import Facts, Measurement, Step
from opfa.releases.results import ReleaseResult, UnpackResult
from opfa.releases.rounding import PLAIN, Dtype, Format, write_weights
from opfa.releases.shape import shape_of
from opfa.sparsity import masks
from opfa.storage import seal
from opfa.storage.files import check_new, new_directory, write_json, write_text
from opfa.storage.runs import RECIPE, model_in
from opfa.training import finished
from opfa.training.checkpoint import model_digest, verify
from opfa.weights import compact
from opfa.weights.findings import Inspection
from opfa.weights.inspection import NOT_STATED, inspect_checkpoint, stated_report
from opfa.weights.sources import read_before

READABLE = 0o644
EXACT = (("dense", "fp32"), ("compact", "fp32"))  # nothing is rounded
COPIED = (
    "config.json generation_config.json tokenizer*.json special_tokens_map.json added_tokens.json "
    f"vocab.* merges.txt *.model *.jinja {quant.FILE} {RECIPE} {' '.join(sentences.FILES)}"
).split()
WRITTEN = ("sparsity.json", "model*.safetensors*")  # anew, so not copied
__all__ = ["push", "release", "unpack"]
log = logging.getLogger(__name__)


def release(
    run: Path,
    output: Path,
    *,
    name: str | None = None,
    form: Format = "dense",
    dtype: Dtype | None = None,
    embeddings: bool | None = None,
    licence: str | None = None,
    base_model: str | None = None,
    compare: Mapping[str, Path] | None = None,
    overrides: Sequence[str] = (),
) -> ReleaseResult:
    """Write a release and return what its manifest says of it.

    `name` is what the card calls it (default: the directory's name). `dtype` is for what is not in
    8 bits (default: fp32; for the few matrices that compact-int8 leaves fp16), `embeddings` says
    whether compact-int8 has them in 8 bits (default: yes). `compare` gives runs to show beside it,
    by label; `overrides` of the recipe say where its data are now.
    """
    name = name or output.name
    check_new(output)
    check_name(name, "--name")
    if embeddings is not None and form != "compact-int8":
        raise RunError(f"--embeddings is for compact-int8, and this is {form}")
    dtype = dtype or ("fp16" if form == "compact-int8" else "fp32")
    has_int8 = embeddings is not False
    _check_is_finished(run)
    steps = list(provenance.steps(run))
    stated = _checked(steps[0])
    rows = provenance.own_rows(steps[0])
    rows += [provenance.row_of(label, path) for label, path in (compare or {}).items()]
    provenance.check_comparable(rows)
    recipe = _measuring(steps[0], overrides, may_round=(form, dtype) not in EXACT)
    with new_directory(output) as aside:
        log.info("%s: writing %s weights", output, form)
        is_same, inspected = _write_model(steps[0], aside, stated, form, dtype, has_int8)
        if recipe is not None and not is_same:
            log.info("%s: its weights are not the run's any more; measuring them", output)
            rows = [*_measured(aside, recipe, rows[0]), *rows[1:]]
        weights = sorted(aside.glob("*.safetensors"))
        found = Release(
            name=name,
            form=form,
            dtype=dtype,
            is_quantized=(aside / quant.FILE).is_file(),
            has_int8_embeddings=has_int8,
            sparsity=stated,
            whole_sparsity=inspected.whole.sparsity,
            num_bytes=sum(path.stat().st_size for path in weights),
            weights_sha256={path.name: seal.digest(path) for path in weights},
            dense_bytes=sum(p.stat().st_size for p in (run / "model").glob("model*.safetensors")),
            steps=steps,
            rows=rows,
            shape=shape_of(run / "model"),
            is_measured=is_same or recipe is not None,
            licence=licence,
            base_model=base_model or provenance.base_model(steps),
        )
        _describe(found, inspected, aside)
    return ReleaseResult.model_validate({"directory": output, **found.facts()})


def _write_model(
    step: Step, directory: Path, stated: Facts, form: Format, dtype: Dtype, embeddings: bool
) -> tuple[bool, Inspection]:
    """Write weights, configuration and tokenizer; whether no weight changed, and what is there."""
    model = step.run / "model"
    _copy(model, directory, finished.model_files(step.done))
    pruned = set(stated["tensors"])
    tensors, is_same = write_weights(model, directory, pruned, form, dtype, embeddings=embeddings)
    if form != "dense":
        config = seal.read_json(directory / "config.json", ModelError)
        _write_config({**config, **compact.CONFIG}, directory)
    write_json(directory / "sparsity.json", stated)
    inspected = inspect_checkpoint(str(directory), read_before(directory, tensors))
    if inspected.stated != "matches":
        raise ModelError(f"{model}: {NOT_STATED}")
    return is_same, inspected


def _write_config(values: Facts, directory: Path) -> None:
    """Not by `write_json`: it names classes, so nothing is redacted."""
    write_text(directory / "config.json", json.dumps(values, indent=2) + "\n")


def _describe(found: Release, inspected: Inspection, directory: Path) -> None:
    """Write what others read first, and the manifest; then check every file."""
    write_text(directory / "recipe.toml", found.steps[0].toml)
    if found.is_sparse and has_or_says(f"drawing {PICTURE}", "opfa[plots]", "matplotlib"):
        from opfa.report import pictures

        pictures.inspection_picture(found.name, inspected.values(), directory / PICTURE)
    write_text(directory / "README.md", f"{model_card(found)}\n")
    for path in filter(Path.is_file, directory.rglob("*")):
        path.chmod(READABLE)  # safetensors makes files for their owner alone
    manifest.write(directory, found.name, found.facts(), found.weights_sha256)
    manifest.check(directory)


def unpack(directory: Path, output: Path) -> UnpackResult:
    """Write the plain form of a compact model: what transformers reads without opfa."""
    check_new(output)
    directory = model_in(directory)
    packed = directory / compact.FILE
    if not packed.is_file():
        raise ModelError(f"{directory}: has no {compact.FILE}, so there is nothing to unpack")
    stated = stated_report(directory)
    config = seal.read_json(directory / "config.json", ModelError)
    with opening(packed):
        tensors = dict(compact.tensors(packed))
    with new_directory(output) as aside:
        _copy(directory, aside)
        save_file(tensors, aside / PLAIN, {"format": "pt"})
        _write_config({k: v for k, v in config.items() if k != compact.ENTRY}, aside)
        if stated is not None:
            shutil.copy(directory / "sparsity.json", aside)
            verify(aside, stated)
    zeros = None if stated is None else stated["total"]["zeros"]
    return UnpackResult(directory=output, bytes=(output / PLAIN).stat().st_size, zeros=zeros)


def _check_is_finished(run: Path) -> None:
    if not (run / "recipe.toml").is_file():
        raise RunError(f"{run}: not a run, it has no recipe.toml")
    if (run / finished.FILE).is_file() and (run / "model").is_dir():
        return
    hint = ""
    if (run / quant.FILE).is_file():
        what = "is a model in 8 bits without a run, such as opfa calibrate writes"
        way = "release its run with --format compact-int8, or a run with [quantization]"
        raise RunError(f"{run}: {what}, and can't be released; {way}. opfa export takes it")
    if (run / "table.md").is_file():
        best = seal.read_json(run / "results.json").get("best_run", "")
        hint = f"; it holds several, the best is {run / best}"
    raise RunError(f"{run}: not a finished run{hint}")


def _checked(step: Step) -> dict[str, Any]:
    """The sparsity report of a model; `ModelError` if a file is not what the run wrote."""
    model = step.run / "model"
    if finished.files(step.done):
        changed = finished.changed_model(model)
    else:
        what = "noted SHA-256 of its weights alone; its other files can't be checked"
        log.warning("%s: was finished by an older version, which %s", step.run, what)
        changed = "" if model_digest(model) == step.done["model_sha256"] else "its weights"
    if changed:
        what = f"not those that the run wrote and evaluated: {changed}"
        raise ModelError(f"{model}: its files are {what} (SHA-256 in {step.run / finished.FILE})")
    stated = stated_report(model)
    if stated is None:
        raise ModelError(f"{model}: has no sparsity.json; was this model written by opfa?")
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{model}: has no tokenizer")
    return {"format": masks.FORMAT, **stated}


def _measuring(step: Step, overrides: Sequence[str], *, may_round: bool) -> FinetuneRecipe | None:
    """The recipe by which rounded weights are measured; None for a pre-trained model."""
    if overrides and (step.kind is None or not may_round):
        raise RunError(f"{overrides[0]}: nothing is measured again here, so nothing is overridden")
    return FinetuneRecipe.read(step.run / "recipe.toml", overrides) if step.kind else None


def _measured(directory: Path, recipe: FinetuneRecipe, before: Measurement) -> list[Measurement]:
    found = measure(str(directory), recipe)
    if found.examples_sha256 != before.data:
        what = "is other data than the run was evaluated on; a release is measured on the same"
        raise RunError(f"task.validation = {recipe.task.validation!r}: {what}")
    return [replace(before, metrics=found.metrics), replace(before, label="before it was rounded")]


def _copy(source: Path, directory: Path, listed: Collection[str] = ()) -> None:
    """Copy configuration, tokenizer and ranges: the listed files, or if none the usual ones."""
    usual = sorted(path for pattern in COPIED for path in source.glob(pattern))
    names = (name for name in listed if not any(fnmatchcase(name, p) for p in WRITTEN))
    for path in (source / name for name in names) if listed else usual:
        if path.is_symlink():
            raise ModelError(f"{path}: is a link; what it points to is not released")
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
