"""Commands that make a model smaller without training: prune, shrink, pack."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from opfa.api import models as api
from opfa.api.prune import SEQUENCES, Scope
from opfa.api.prune import prune as execute_prune
from opfa.api.structured import CostName, prune_layers, prune_structured
from opfa.commands.options import (
    AsJson,
    Columns,
    HubConfig,
    HubSplit,
    HubTexts,
    ModelName,
    Output,
    Overrides,
    TaskRecipe,
    Texts,
)
from opfa.errors import RunError

app = typer.Typer()


@app.command(epilog="Example: opfa shrink runs/sst2 --output sst2-small")
def shrink(
    model: ModelName,
    output: Output,
    form: Annotated[
        Literal["even", "uneven", "onnx", "same-shape"],
        Option(help="even: any transformers loads it; uneven: smallest, for `import opfa`."),
    ] = "uneven",
    as_json: AsJson = False,
) -> None:
    """Remove dead heads and neurons exactly: smaller matrices that compute the same."""
    api.shrink(model, output, form=form).show(as_json=as_json)


@app.command(epilog="Example: opfa pack runs/sst2 --output sst2-packed")
def pack(
    model: ModelName,
    output: Output,
    dtype: Annotated[
        Literal["fp32", "bf16", "int8"] | None,
        Option(help="Of the products; default: int8 for a model in 8 bits, else fp32."),
    ] = None,
    keep: Annotated[
        float | None,
        Option(help="Of an archive: prune first, to this share of multiply-adds; then shrink."),
    ] = None,
    shrink: Annotated[
        bool, Option("--shrink", help="Of an archive: remove dead heads and neurons first.")
    ] = False,
    most_gb: Annotated[
        float | None, Option(help="Of an archive: the most that it may unpack to; default: 5.")
    ] = None,
    recipe: TaskRecipe = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Pack an encoder for the CPU runtime, which skips zeros: one file, mapped and shared.

    An output that ends in .tar.gz is an archive for a SageMaker endpoint: ONNX, and what answers
    there. Example: opfa pack runs/sst2 --output model.tar.gz --keep 0.5
    """
    of_archive = {"keep": keep, "shrink": shrink or None, "most_gb": most_gb}
    if str(output).endswith(api.ARCHIVE):
        options = _given({**of_archive, "dtype": dtype})
        api.archive(model, output, recipe, overrides or (), **options).show(as_json=as_json)
    else:
        others = {"recipe": recipe, "[section.key=value]": overrides or None}
        _refuse(f"is for an archive, an output that ends in {api.ARCHIVE}", of_archive | others)
        api.pack(model, output, dtype=dtype).show(as_json=as_json)


@app.command(
    epilog="Example: opfa prune sentence-transformers/all-MiniLM-L6-v2 --sparsity 0.9 "
    "--output minilm-90"
)
def prune(
    model: ModelName,
    output: Output,
    sparsity: Annotated[
        float | None, Option(help="Weights, or whole --grain: the share that goes, below 1.")
    ] = None,
    keep: Annotated[
        float | None, Option(help="Heads and neurons of a fine-tuned model: the share that stays.")
    ] = None,
    layers: Annotated[
        int | None, Option(help="Whole layers of a fine-tuned model: how many stay.")
    ] = None,
    of: Annotated[CostName | None, Option(help="With --keep, of what; default: macs.")] = None,
    score: Annotated[
        Literal["magnitude", "activation", "curvature", "admm", "fisher"] | None,
        Option(
            help="What each is worth; default: magnitude, with --keep fisher. With --text, "
            "activation, curvature, fisher or admm."
        ),
    ] = None,
    grain: Annotated[
        str | None,
        Option(help="With --sparsity, what goes together: weight, heads, neurons, or 32x32."),
    ] = None,
    scope: Annotated[
        Scope | None,
        Option(help="With --sparsity, whether each matrix has it, or all together; default: layer"),
    ] = None,
    include: Annotated[
        list[str] | None,
        Option(help="With --sparsity: a regular expression for names of layers; repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, Option(help="Of those, what stays dense.")] = None,
    reconstruct: Annotated[
        bool, Option("--reconstruct", help="With --text: fit what is left by least squares.")
    ] = False,
    text: Texts = None,
    column: Columns = None,
    hub: HubTexts = None,
    hub_config: HubConfig = None,
    hub_split: HubSplit = "train",
    sequences: Annotated[
        int | None,
        Option(
            help=f"Of the texts, of up to 128 tokens; a tenth is held out; default: {SEQUENCES}."
        ),
    ] = None,
    recipe: TaskRecipe = None,
    examples: Annotated[
        int | None,
        Option(help="Training examples that --keep and --layers see; default: 8192."),
    ] = None,
    batch: Annotated[
        int | None, Option(help="With --keep: costs are of so many sequences; default: 1.")
    ] = None,
    tokens: Annotated[
        int | None, Option(help="Tokens of each; default: the recipe's sequence_tokens.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Prune without training: exactly so many weights, heads and neurons under a budget, or layers.

    --keep and --layers need a fine-tuned model and its task: the run's own recipe, or --recipe.
    """
    of_weights = {"grain": grain, "scope": scope, "include": include, "exclude": exclude}
    of_weights |= {"reconstruct": reconstruct or None, "hub": hub, "hub_config": hub_config}
    of_weights |= {"text": text, "column": column, "sequences": sequences}
    of_units = {"of": of, "batch": batch, "tokens": tokens}
    of_task = {"examples": examples, "recipe": recipe, "[section.key=value]": overrides}
    if sum(each is not None for each in (sparsity, keep, layers)) != 1:
        what = "give one of them, for single weights, heads and neurons, or whole layers"
        raise RunError(f"--sparsity, --keep, --layers: {what}")
    if sparsity is not None:
        _refuse("has no meaning with --sparsity", {**of_units, **of_task})
        if not 0 <= sparsity < 1:
            raise RunError(f"--sparsity {sparsity:g}: must be a share below 1, such as 0.9")
        options = {"score": score, "grain": grain, "scope": scope, "sequences": sequences}
        options |= {"include": include, "exclude": exclude, "columns": column, "hub": hub}
        options |= {"hub_config": hub_config, "hub_split": hub_split, "reconstruct": reconstruct}
        options |= {"texts": [Path(each) for each in text or ()]}
        execute_prune(model, sparsity, output, **_given(options)).show(as_json=as_json)
    task = (recipe, overrides or ())
    if keep is not None:
        _refuse("has no meaning with --keep", of_weights)
        options = _given({**of_units, "examples": examples, "score": score})
        prune_structured(model, output, *task, keep=keep, **options).show(as_json=as_json)
    if layers is not None:
        _refuse("has no meaning with --layers", {**of_weights, **of_units, "score": score})
        options = _given({"examples": examples})
        prune_layers(model, output, *task, layers=layers, **options).show(as_json=as_json)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that aren't left out."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse(why: str, options: Mapping[str, Any]) -> None:
    """One error for what is given of options that have no meaning here."""
    for name in _given(options):
        option = name if name.startswith("[") else f"--{name.replace('_', '-')}"
        raise RunError(f"{option}: {why}")
