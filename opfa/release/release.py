"""Release: a finished run -> a directory that others can use, verified before it gets its name.

    weights            in fp32 or 16 bits, plain or compact; or the matrices in 8 bits, compact
    config.json        and the tokenizer, as the run left them
    sparsity.json      zeros and fingerprint, checked against the weight file that was written
    recipe.toml        of the run, absolute paths shortened
    README.md          the model card, with its picture
    release.json       size and SHA-256 of every file, and results

Weights that differ from the run's (rounded, or in 8 bits) are measured anew on the task of the run:
a card has no number of another model.
"""

import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from opfa.compression import quant
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import ModelError, RunError, opening
from opfa.hub import manifest
from opfa.hub.publish import check_name, push
from opfa.release import provenance
from opfa.release.card import PICTURE, Release, model_card
from opfa.release.provenance import Row
from opfa.release.rounding import PLAIN, Dtype, Format, write_weights
from opfa.report import pictures as report
from opfa.storage import seal
from opfa.storage.files import check_new, new_directory, write_json, write_text
from opfa.training import finished
from opfa.training.checkpoint import model_digest, verify
from opfa.weights import compact
from opfa.weights.inspection import check_stated, inspect, stated_report

READABLE = 0o644
EXACT = (("dense", "fp32"), ("compact", "fp32"))  # nothing is rounded
COPIED = (
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "generation_config.json",
    "*.jinja",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    quant.FILE,
)
__all__ = ["push", "release", "unpack"]
WEIGHTS = "model*.safetensors"
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
) -> dict[str, Any]:
    """Write a release and return what its manifest says of it.

    `name` is what the card calls it (default: that of the directory). `dtype` is for what is not in
    8 bits (default: fp32; for the few matrices that compact-int8 leaves fp16), `embeddings` says
    whether compact-int8 has them in 8 bits (default: yes). `compare` gives runs whose results stand
    beside it, by label; `overrides` of the recipe say where its data are now. Raises `ModelError`
    or `RunError`, and leaves nothing, when a check fails.
    """
    name = name or output.name
    check_new(output)
    check_name(name, "--name")
    if embeddings is not None and form != "compact-int8":
        raise RunError(f"--embeddings is for compact-int8, and this is {form}")
    dtype = dtype or ("fp16" if form == "compact-int8" else "fp32")
    stated = _checked(run)
    steps = list(provenance.steps(run))
    rows = provenance.own_rows(run)
    rows += [provenance.row_of(label, path) for label, path in (compare or {}).items()]
    provenance.check_comparable(rows)
    recipe = _measuring(run, steps[0].kind, overrides, may_round=(form, dtype) not in EXACT)
    with new_directory(output) as aside:
        _copy(run / "model", aside, finished.model_files(finished.read(run)))
        log.info("%s: writing %s weights", output, form)
        is_same = write_weights(
            run / "model",
            aside,
            set(stated["tensors"]),
            form=form,
            dtype=dtype,
            embeddings=embeddings is not False,
        )
        if form != "dense":
            config = aside / "config.json"
            values = {**seal.read_json(config, ModelError), **compact.CONFIG}
            write_text(config, json.dumps(values, indent=2) + "\n")  # as it is: it names classes
        verify(aside, stated)
        write_json(aside / "sparsity.json", stated)
        write_text(aside / "recipe.toml", steps[0].toml)
        if recipe is not None and not is_same:
            log.info("%s: its weights are not the run's any more; measuring them", output)
            measured = _measured(aside, recipe, rows[0])
            rows = [measured, replace(rows[0], label="before it was rounded"), *rows[1:]]
        weights = sorted(aside.glob("*.safetensors"))
        inspected = inspect(aside)
        found = Release(
            name=name,
            form=form,
            dtype=dtype,
            is_quantized=(aside / quant.FILE).is_file(),
            has_int8_embeddings=embeddings is not False,
            sparsity=stated,
            whole_sparsity=inspected["whole"]["sparsity"],
            num_bytes=sum(path.stat().st_size for path in weights),
            weights_sha256={path.name: seal.digest(path) for path in weights},
            dense_bytes=sum(p.stat().st_size for p in (run / "model").glob(WEIGHTS)),
            steps=steps,
            rows=rows,
            is_measured=is_same or recipe is not None,
            licence=licence,
            base_model=base_model or provenance.base_model(steps),
        )
        facts = _facts(found)
        if found.is_sparse:
            report.inspection_picture(name, inspected, aside / PICTURE)
        write_text(aside / "README.md", f"{model_card(found)}\n")
        for path in aside.iterdir():
            path.chmod(READABLE)  # safetensors makes files for their owner alone
        manifest.write(aside, name, facts)
        manifest.check(aside)
    return facts


def unpack(directory: Path, output: Path) -> None:
    """Write the plain form of a compact model: what transformers reads without opfa."""
    check_new(output)
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
        values = {k: v for k, v in config.items() if k != compact.ENTRY}
        write_text(aside / "config.json", json.dumps(values, indent=2) + "\n")
        if stated is not None:
            shutil.copy(directory / "sparsity.json", aside)
            verify(aside, stated)


def _checked(run: Path) -> dict[str, Any]:
    """The sparsity report of a finished run's model, if the model is what the run wrote."""
    model = run / "model"
    if not (run / "recipe.toml").is_file():
        raise RunError(f"{run}: not a run, it has no recipe.toml")
    if not (run / "done.json").is_file() or not model.is_dir():
        hint = ""
        if (run / "table.md").is_file():
            best = seal.read_json(run / "results.json").get("best_run", "")
            hint = f"; it holds several, the best is {run / best}"
        raise RunError(f"{run}: not a finished run{hint}")
    found = check_stated(str(model))
    stated = stated_report(model)
    if stated is None:
        raise ModelError(f"{model}: has no sparsity.json; was this model written by opfa?")
    _check_files(run, model)
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{model}: has no tokenizer")
    return {"format": found["format"], **stated}


def _check_files(run: Path, model: Path) -> None:
    """Refuse a model any file of which is another one than the run wrote and evaluated."""
    done = finished.check(run)
    if not finished.files(done):
        log.warning(
            "%s: was finished by an older version, which noted SHA-256 of its weights alone; that "
            "its configuration, tokenizer, recipe and results are what it wrote can't be checked",
            run,
        )
    if model_digest(model) != done["model_sha256"]:
        raise ModelError(
            f"{model}: its weights are not those that the run wrote and evaluated (SHA-256 in "
            f"{run / finished.FILE}); they were changed afterwards"
        )


def _measuring(
    run: Path, kind: str | None, overrides: Sequence[str], *, may_round: bool
) -> FinetuneRecipe | None:
    """The recipe by which rounded weights are measured; None for a pre-trained model."""
    if overrides and (kind is None or not may_round):
        raise RunError(f"{overrides[0]}: nothing is measured again here, so nothing is overridden")
    return None if kind is None else FinetuneRecipe.read(run / "recipe.toml", overrides)


def _measured(directory: Path, recipe: FinetuneRecipe, before: Row) -> Row:
    found = evaluate_model(str(directory), recipe)
    if found["examples_sha256"] != before.data:
        raise RunError(
            f"task.validation = {recipe.task.validation!r}: is other data than the run was "
            "evaluated on; a release is measured on the same"
        )
    return replace(before, metrics=found["metrics"])


def _copy(source: Path, directory: Path, listed: Collection[str] = ()) -> None:
    """Take configuration, tokenizer and ranges along, and nothing else that may lie there: what a
    run listed of its model, or what is usual.
    """
    usual = sorted(path for pattern in COPIED for path in source.glob(pattern))
    written = (source / name for name in listed if not _is_written_anew(name))
    for path in written if listed else usual:
        if path.is_symlink():
            raise ModelError(f"{path}: is a link; what it points to is not released")
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)


def _is_written_anew(name: str) -> bool:
    return name == "sparsity.json" or (name.startswith("model") and ".safetensors" in name)


def _facts(found: Release) -> dict[str, Any]:
    return {
        "name": found.name,
        "task": found.steps[0].recipe["name"],
        "kind": found.steps[0].kind,
        "format": found.form,
        "dtype": found.dtype,
        "quantized": found.is_quantized,
        "sparsity": found.sparsity["total"]["sparsity"],
        "fingerprint": found.sparsity["fingerprint"],
        "bytes": found.num_bytes,
        "metrics": dict(found.rows[0].metrics),
        "metrics_of": "these files" if found.is_measured else "the weights before rounding",
        "examples_sha256": found.rows[0].data,
        "seed": found.steps[0].recipe["seed"],
        "recipe_sha256": found.steps[0].sha256,
        "base_model": found.base_model,
        "license": found.licence,
    }
