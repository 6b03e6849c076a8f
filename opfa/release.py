"""Release: a finished run -> a directory that others can use, verified before it gets its name.

    weights            in fp32 or 16 bits, plain or compact; or the matrices in 8 bits, compact
    config.json        and the tokenizer, as the run left them
    sparsity.json      zeros and fingerprint, checked against the weight file that was written
    recipe.toml        and results.json of the run
    README.md          the model card, with its picture
    release.json       size and SHA-256 of every file

Weights that differ from the run's (rounded, or in 8 bits) are measured anew on the task of the run:
a card has no number of another model.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file

from opfa import compact, manifest, provenance, quant, report
from opfa.card import PICTURE, Release, model_card
from opfa.checkpoint import model_digest, new_directory, verify
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.recipe import FinetuneRecipe
from opfa.inspection import check_stated, inspect, stated_report
from opfa.recipe import ModelError, RunError
from opfa.run import write_json
from opfa.weights import PLAIN, Dtype, Format, write_weights

READABLE = 0o644
log = logging.getLogger(__name__)


def release(
    run: Path,
    output: Path,
    *,
    name: str | None = None,
    form: Format = "dense",
    dtype: Dtype | None = None,
    embeddings: bool = True,
    licence: str | None = None,
    base_model: str | None = None,
    compare: Mapping[str, Path] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a release and return what its manifest says of it.

    `name` is what the card calls it (default: that of the directory). `dtype` is for what is not in
    8 bits (default: fp32; for the few matrices that compact-int8 leaves fp16). `compare` gives runs
    whose results stand beside it, by label. Raises `ModelError` or `RunError`, and leaves nothing,
    when a check fails.
    """
    if output.exists():
        raise RunError(f"{output}: exists already; give a new directory")
    dtype = dtype or ("fp16" if form == "compact-int8" else "fp32")
    model = run / "model"
    stated = _checked(run, model)
    steps = list(provenance.steps(run))
    rows = provenance.own_rows(run)
    rows += [provenance.row_of(label, path) for label, path in (compare or {}).items()]
    with new_directory(output) as aside:
        _copy(model, aside)
        log.info("%s: writing %s weights", output, form)
        options: dict[str, Any] = {"form": form, "dtype": dtype, "embeddings": embeddings}
        is_changed = write_weights(model, aside, set(stated["tensors"]), **options)
        if form != "dense":
            _set_config(aside / "config.json")
        verify(aside, stated)
        write_json(aside / "sparsity.json", stated)
        shutil.copy(run / "recipe.toml", aside)
        if is_changed and "task" in steps[0].recipe:
            log.info("%s: the weights are not the run's any more, measuring them", output)
            recipe = FinetuneRecipe.read(run / "recipe.toml", overrides)
            rows[0] = replace(rows[0], metrics=evaluate_model(str(aside), recipe)["metrics"])
        found = Release(
            name=name or output.name,
            form=form,
            dtype=dtype,
            is_quantized=(model / quant.FILE).is_file(),
            sparsity=stated,
            files={path.name: path.stat().st_size for path in aside.glob("model*.safetensors")},
            dense_bytes=sum(path.stat().st_size for path in model.glob("model*.safetensors")),
            steps=steps,
            rows=rows,
            is_measured=not is_changed or "task" in steps[0].recipe,
            licence=licence,
            base_model=base_model or provenance.base_model(steps),
        )
        facts = _facts(found)
        write_json(aside / "results.json", facts)
        if stated["tensors"]:
            report.inspection_picture(found.name, inspect(aside), aside / PICTURE)
        model_card(found).save(aside / "README.md")
        for path in aside.iterdir():
            path.chmod(READABLE)  # safetensors makes files for their owner alone
        manifest.write(aside, found.name, facts)
        manifest.check(aside)
    return facts


def unpack(directory: Path, output: Path) -> None:
    """Write the plain form of a compact model: what transformers reads without opfa."""
    if output.exists():
        raise RunError(f"{output}: exists already; give a new directory")
    packed = directory / compact.FILE
    if not packed.is_file():
        raise ModelError(f"{directory}: has no {compact.FILE}, so there is nothing to unpack")
    stated = stated_report(directory)
    tensors = dict(compact.tensors(packed))
    with new_directory(output) as aside:
        _copy(directory, aside)
        (aside / manifest.MANIFEST).unlink(missing_ok=True)  # it lists the compact file
        save_file(tensors, aside / PLAIN, {"format": "pt"})
        config = json.loads((aside / "config.json").read_text())
        config.pop("quantization_config", None)
        write_json(aside / "config.json", config)
        if stated is not None:
            shutil.copy(directory / "sparsity.json", aside)
            verify(aside, stated)


def push(directory: Path, name: str, *, endpoint: str | None = None, private: bool = False) -> str:
    """Upload a verified release as one commit; its address."""
    manifest.check(directory)
    try:
        validate_repo_id(name)
        api = HfApi(endpoint=endpoint)
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=directory, commit_message="Release, by opfa"
        )
    except (HTTPError, ValueError, OSError) as error:  # a refused card or name is a ValueError
        raise RunError(f"{name}: not uploaded: {str(error).strip()}") from error
    return str(commit.commit_url)


def _checked(run: Path, model: Path) -> dict[str, Any]:
    """The sparsity report of a finished run's model, if the model is what the run wrote."""
    if not (run / "recipe.toml").is_file():
        raise RunError(f"{run}: not a run, it has no recipe.toml")
    if not (run / "done.json").is_file():
        hint = ""
        if (run / "table.md").is_file():
            best = json.loads((run / "results.json").read_text())["best_run"]
            hint = f"; it holds several, the best is {run / best}"
        raise RunError(f"{run}: not a finished run{hint}")
    found = check_stated(str(model))
    stated = stated_report(model)
    if stated is None or found["stated"] != "matches":
        raise ModelError(f"{model}: has no sparsity.json; was this model written by opfa?")
    results = run / "results.json"
    if results.is_file():
        expected = json.loads(results.read_text())["model_sha256"]
        if model_digest(model) != expected:
            raise ModelError(
                f"{model}: its files are not those that were evaluated (SHA-256 in {results}); "
                "they were changed after the run"
            )
    return {"format": found["format"], **stated}


def _copy(source: Path, directory: Path) -> None:
    for path in source.iterdir():
        is_weights = path.match("model*.safetensors*") or path.match("*.bin")
        if path.is_file() and not is_weights and path.name != "sparsity.json":
            shutil.copy(path, directory)


def _set_config(path: Path) -> None:
    entry = {"quant_method": compact.METHOD, "version": compact.VERSION}
    write_json(path, {**json.loads(path.read_text()), "quantization_config": entry})


def _facts(found: Release) -> dict[str, Any]:
    return {
        "name": found.name,
        "task": found.steps[0].recipe["name"],
        "kind": found.kind,
        "format": found.form,
        "dtype": found.dtype,
        "quantized": found.is_quantized,
        "sparsity": found.sparsity["total"]["sparsity"],
        "fingerprint": found.sparsity["fingerprint"],
        "bytes": sum(found.files.values()),
        "metrics": dict(found.rows[0].metrics),
        "seed": found.steps[0].recipe["seed"],
        "recipe_sha256": found.steps[0].sha256,
        "base_model": found.base_model,
        "license": found.licence,
    }
