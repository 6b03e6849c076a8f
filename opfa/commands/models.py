"""Commands for finished models: look at them, get them, and pass them on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from opfa.commands.options import (
    AsJson,
    Endpoint,
    ModelName,
    Output,
    Overrides,
    Private,
    check_files,
)
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import ModelError, RunError
from opfa.extras import require
from opfa.report.tables import Table, print_json, show
from opfa.storage.files import check_new

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
    as_json: AsJson = False,
) -> None:
    """Show how sparse a checkpoint is, where and in which pattern; or compare it with another."""
    check_files({"--plot": plot})
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise RunError(f"--plot {plot}: must be a .png file in a directory that exists")
    if plot is not None:
        require(f"--plot {plot}", "opfa[plots]", "matplotlib")
    from opfa.weights.comparison import compare
    from opfa.weights.inspection import inspect_checkpoint

    found = inspect_checkpoint(model) if against is None else compare(against, model)
    if plot is not None:
        if not found.layers:
            raise ModelError(f"{model}: has no numbered layers with matrices, so nothing to draw")
        from opfa.report.pictures import comparison_picture, inspection_picture

        if against is None:
            inspection_picture(model, found.values(), plot)
        else:
            comparison_picture(found.values(), plot)
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
    from opfa.hub.download import download as execute

    result = execute(name, output, revision=revision, endpoint=endpoint)
    if as_json:
        print_json(result)
        return
    source = "its manifest" if result["manifest_sha256"] else "the Hub's listing"
    files = f"{result['files']:,} files, {result['bytes']:,} bytes"
    print(f"{output}: complete; {files}, each checked against {source}")


@app.command("list", epilog="Example: opfa list")
def list_models(as_json: AsJson = False) -> None:
    """Show released models that `opfa download` knows."""
    from opfa.hub.index import released

    models = released()
    if as_json:
        print_json([model.model_dump() for model in models])
        return
    rows = []
    for model in models:
        sparsity = "" if model.sparsity is None else f"{model.sparsity:.0%}"
        size = "" if model.bytes is None else f"{model.bytes:,}"
        results = (model.results or {}).items()
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in results if value is not None)
        rows.append((model.name, model.task, sparsity, size, shown))
    show([Table(("name", "task", "sparsity", "bytes", "results"), rows)])
    print("empty: not measured by this project")


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
) -> None:
    """Make a finished run a release: verified weights, card and manifest; and upload it if asked.

    Rounded weights are measured again, on the recipe's data or on task.validation=DATA.
    """
    if push is None and (private or endpoint):
        raise RunError("--private and --endpoint are for --push")
    check_new(output)
    runs = _labelled(compare or ())
    from opfa.release import release as releasing

    result = releasing.release(
        run,
        output,
        name=name or push,
        form=form,
        dtype=dtype,
        embeddings=None if embeddings is None else embeddings == "int8",
        licence=licence,
        base_model=base_model,
        compare=runs,
        overrides=overrides or (),
    )
    if push is not None:
        result["address"] = releasing.push(output, push, endpoint=endpoint, private=private)
    print_json(result)


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
) -> None:
    """Verify a release and upload it as one commit, which replaces every older file."""
    from opfa.release.release import push as execute

    print(execute(directory, name, endpoint=endpoint, private=private))


@app.command(epilog="Example: opfa unpack bert-base-90-sst2 --output bert-base-90-sst2-plain")
def unpack(
    directory: Annotated[Path, Argument(metavar="DIR", help="A compact model.")], output: Output
) -> None:
    """Write the plain form of a compact model, which transformers reads without opfa."""
    check_new(output)
    from opfa.release.release import unpack as execute

    execute(directory, output)


@app.command(epilog="Example: opfa export runs/sst2-qat/model --output sst2/model.onnx")
def export(
    model: ModelName,
    output: Annotated[Path, Option(help="FILE.onnx; must be new.")],
    is_int8: Annotated[
        bool | None, Option("--int8/--fp32", help="Default: 8 bits if the model has its ranges.")
    ] = None,
    verify: Annotated[
        str | None, Option(help="A file, or a Hub split: compare with torch on it first.")
    ] = None,
    recipe: Annotated[Path | None, Option(help="The recipe whose task is compared.")] = None,
    report: Annotated[Path | None, Option(help="Also write the result here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a fine-tuned model as ONNX, in fp32 or 8 bits."""
    if (verify is None) != (recipe is None):
        raise RunError("--verify and --recipe need each other: data, and what their columns mean")
    check_new(output, "file")
    check_files({"--report": report})
    task = None
    if verify is not None and recipe is not None:
        task = FinetuneRecipe.read(recipe).task.model_copy(update={"validation": verify})
    from opfa.runtimes.export import export as execute

    result = execute(model, output, is_int8=is_int8, task=task, report=report)
    print_json(result) if as_json else show(_exported(output, result))


def _exported(output: Path, result: dict[str, Any]) -> list[Table | str]:
    sides = ("model", "onnx")
    rows = [(key, *(f"{result[key][side]:,}" for side in sides)) for key in ("bytes", "zeros")]
    rows.append(("fingerprint", *(result["fingerprint"][side][:12] for side in sides)))
    lines = []
    if result["zeros"]["rounded"]:
        lines.append(f"live weights that 8 bits round to zero: {result['zeros']['rounded']:,}")
    if parity := result.get("parity"):
        onnx, equal = parity["metrics"]["onnx"], parity["equal_predictions"]
        for name, value in parity["metrics"]["torch"].items():
            rows.append((name, f"{value:.4f}", f"{onnx[name]:.4f}"))
        shown = "" if equal is None else f", {equal:.2%} of the predictions equal"
        difference = f"logits differ by up to {parity['max_difference']:.1e}"
        lines.append(f"{parity['examples']:,} examples: {difference}{shown}")
        again = parity.get("repeated_predictions")
        if again is not None:
            what = "torch with itself, its layers disturbed in the last digit"
            lines.append(f"{what}: {again:.2%} equal")
    title = f"{output} ({result['precision']})"
    return [Table(("", "model", "ONNX"), rows, title, numbers_from=1), *lines]
