"""Commands for finished models: look at them, get them, and pass them on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from opfa.api import models as api
from opfa.commands.options import (
    AsJson,
    Endpoint,
    ModelName,
    Output,
    Overrides,
    Private,
    TaskRecipe,
    check_files,
)
from opfa.errors import ModelError, RunError
from opfa.extras import require
from opfa.report.tables import print_json

app = typer.Typer()


@app.command(epilog="Example: opfa inspect Intel/bert-base-uncased-sparse-90-unstructured-pruneofa")
def inspect(
    model: Annotated[
        str, Argument(metavar="MODEL", help="A directory, a run, a weight file or a Hub name.")
    ],
    against: Annotated[
        str | None,
        Option(
            "--against",
            metavar="OTHER",
            help="Show changes from OTHER to MODEL; the exit code is 1 if masks changed.",
        ),
    ] = None,
    has_tensors: Annotated[
        bool, Option("--tensors", help="Every tensor instead of layers.")
    ] = False,
    plot: Annotated[Path | None, Option(help="FILE.png: draw it too.")] = None,
    page: Annotated[Path | None, Option(help="FILE.html: every matrix, for a browser.")] = None,
    with_runtime: Annotated[
        bool, Option("--runtime", help="Run it in the CPU runtime: kernel and speed by layer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how sparse a checkpoint is, where and in which pattern; or compare it with another."""
    if with_runtime:
        if against or has_tensors or plot or page:
            raise RunError("--runtime: goes with no option but --json")
        from opfa import runtime

        runtime.explain(runtime.load(model)).show(as_json=as_json)
        return
    check_files({"--plot": plot, "--page": page})
    if page is not None and (page.suffix != ".html" or not page.parent.is_dir()):
        raise RunError(f"--page {page}: must be a .html file in a directory that exists")
    if page is not None and against is not None:
        raise RunError("--page: shows one model; leave --against out, or take --plot")
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise RunError(f"--plot {plot}: must be a .png file in a directory that exists")
    if plot is not None:
        require(f"--plot {plot}", "opfa[plots]", "matplotlib")
    from opfa.weights.inspection import inspect_masks

    if against is None:
        inspected = inspect_masks(model)
        found = inspected.found
    else:
        inspected, found = None, api.compare(against, model)
    if plot is not None:
        if not found.layers:
            raise ModelError(f"{model}: has no numbered layers with matrices, so nothing to draw")
        from opfa.report.pictures import comparison_picture, inspection_picture

        if against is None:
            inspection_picture(model, found.values(), plot)
        else:
            comparison_picture(found.values(), plot)
    if page is not None and inspected is not None:
        from opfa.report.model_page import write_model_page

        write_model_page(page, model, inspected.found, inspected.masks, inspected.num_heads)
    found.show(as_json=as_json, is_long=has_tensors)
    if not getattr(found, "same_masks", True):
        raise typer.Exit(1)


@app.command(
    epilog="Example: opfa download Intel/bert-base-uncased-sparse-90-unstructured-pruneofa "
    "--output bert-base-90"
)
def download(
    name: Annotated[str, Argument(metavar="NAME", help="A Hub name, an https URL or a directory.")],
    output: Output,
    revision: Annotated[str | None, Option(help="A branch, tag or commit on the Hub.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Get a released model and verify every file."""
    api.download(name, output, revision=revision, endpoint=endpoint).show(as_json=as_json)


@app.command("list", epilog="Example: opfa list")
def list_models(as_json: AsJson = False) -> None:
    """Show released models that `opfa download` knows."""
    models = api.list_models()
    if as_json:
        print_json([model.model_dump() for model in models])
        return
    for model in models:  # no table, which would fold names that a reader wants to copy
        facts = [model.task]
        if model.sparsity is not None:
            facts.append(f"{model.sparsity:.0%} zeros")
        if model.bytes is not None:
            facts.append(f"{model.bytes:,} bytes")
        results = (model.results or {}).items()
        facts += [f"{metric} {value:.4g}" for metric, value in results if value is not None]
        print(f"{model.name}\n    {', '.join(facts)}")


@app.command(
    epilog="Example: opfa release runs/sst2-qat --output bert-base-90-sst2 --format compact-int8"
)
def release(
    run: Annotated[Path, Argument(metavar="RUN", help="A finished run.")],
    output: Output,
    form: Annotated[
        Literal["dense", "compact", "compact-int8"],
        Option("--format", help="Plain safetensors, or positions and values."),
    ] = "dense",
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        Option(help="Default: fp32; for what compact-int8 leaves as it is: fp16."),
    ] = None,
    embeddings: Annotated[
        Literal["int8", "same"] | None, Option(help="For compact-int8; default: int8.")
    ] = None,
    name: Annotated[str | None, Option(help="For the card; default: the directory's.")] = None,
    licence: Annotated[
        str | None, Option("--license", help="For the card, as the Hub calls it: apache-2.0.")
    ] = None,
    base_model: Annotated[
        str | None, Option(help="For the card: the Hub name it began with.")
    ] = None,
    compare: Annotated[
        list[str] | None, Option(help="LABEL=RUN: its results too, in the card; repeatable.")
    ] = None,
    push: Annotated[str | None, Option(help="Then upload to this Hub name.")] = None,
    private: Private = False,
    endpoint: Endpoint = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a finished run a release: verified weights, card and manifest; and upload it if asked.

    Rounded weights are measured again, on the recipe's data or on task.validation=DATA.
    """
    if push is None and (private or endpoint):
        raise RunError("--private and --endpoint are for --push")
    api.release(
        run,
        output,
        overrides or (),
        format=form,
        dtype=dtype,
        embeddings=embeddings,
        name=name,
        license=licence,
        base_model=base_model,
        compare=_labelled(compare or ()),
        push=push,
        private=private,
        endpoint=endpoint,
    ).show(as_json=as_json)


def _labelled(pairs: Sequence[str]) -> dict[str, Path]:
    runs = {}
    for pair in pairs:
        label, _, path = pair.partition("=")
        if not label.strip() or not path:
            raise RunError(f"--compare {pair!r}: give LABEL=RUN")
        runs[label] = Path(path)
    return runs


@app.command(epilog="Example: opfa push bert-base-90-sst2 my-team/bert-base-90-sst2")
def push(
    directory: Annotated[Path, Argument(metavar="DIR", help="A release.")],
    name: Annotated[str, Argument(metavar="NAME", help="Its name on the Hub.")],
    private: Private = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Verify a release and upload it as one commit, which replaces every older file."""
    api.push(directory, name, endpoint=endpoint, private=private).show(as_json=as_json)


@app.command(epilog="Example: opfa unpack bert-base-90-sst2 --output bert-base-90-sst2-plain")
def unpack(
    directory: Annotated[Path, Argument(metavar="DIR", help="A compact model.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write the plain form of a compact model, which transformers reads without opfa."""
    api.unpack(directory, output).show(as_json=as_json)


@app.command(epilog="Example: opfa export runs/sst2-qat --output sst2/model.onnx")
def export(
    model: ModelName,
    output: Annotated[Path, Option(help="FILE.onnx; must be new.")],
    is_int8: Annotated[
        bool | None, Option("--int8/--fp32", help="Default: 8 bits if the model has its ranges.")
    ] = None,
    verify: Annotated[
        str | None, Option(help="A file, or a Hub split: compare with torch on it first.")
    ] = None,
    recipe: TaskRecipe = None,
    report: Annotated[Path | None, Option(help="Also write the result here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a fine-tuned model as ONNX, in fp32 or 8 bits."""
    if verify is None and recipe is not None:
        raise RunError("--recipe is for --verify, whose columns it explains")
    check_files({"--report": report})
    precision = None if is_int8 is None else ("int8" if is_int8 else "fp32")
    api.export(
        model, output, precision=precision, verify=verify, recipe=recipe, report=report
    ).show(as_json=as_json)
