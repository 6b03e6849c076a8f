"""Commands that make a model smaller without training: prune, shrink, pack."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from typer import Option

from opfa.api import models as api
from opfa.api.prune import CostName, Scope, prune_structured
from opfa.api.prune import prune as execute_prune
from opfa.commands.options import AsJson, ModelName, Output, Overrides, TaskRecipe
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
    as_json: AsJson = False,
) -> None:
    """Pack an encoder for the CPU runtime, which skips zeros: one file, mapped and shared."""
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
    of: Annotated[CostName | None, Option(help="With --keep, of what; default: macs.")] = None,
    score: Annotated[
        Literal["magnitude", "fisher"] | None,
        Option(help="What each is worth; default: magnitude, with --keep fisher."),
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
    recipe: TaskRecipe = None,
    examples: Annotated[
        int | None, Option(help="With --keep: how many training examples it sees; default: 8192.")
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
    """Prune without training: exactly so many weights, or whole heads and neurons under a budget.

    --keep needs a fine-tuned model and its task: the run's own recipe, or --recipe.
    """
    of_weights = {"grain": grain, "scope": scope, "include": include, "exclude": exclude}
    of_units = {"of": of, "examples": examples, "batch": batch, "tokens": tokens}
    if (sparsity is None) == (keep is None):
        what = "give one, for single weights or for whole heads and neurons"
        raise RunError(f"--sparsity, --keep: {what}")
    if keep is not None:
        _refuse("--keep", of_weights)
        options = _given({**of_units, "score": score})
        found = prune_structured(model, output, recipe, overrides or (), keep=keep, **options)
        found.show(as_json=as_json)
    if sparsity is not None:
        _refuse("--sparsity", {**of_units, "recipe": recipe, "[section.key=value]": overrides})
        if not 0 <= sparsity < 1:
            raise RunError(f"--sparsity {sparsity:g}: must be a share below 1, such as 0.9")
        options = _given({**of_weights, "score": score})
        execute_prune(model, sparsity, output, **options).show(as_json=as_json)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that aren't left out."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse(with_option: str, options: Mapping[str, Any]) -> None:
    if given := [n if n.startswith("[") else f"--{n}" for n in _given(options)]:
        raise RunError(f"{given[0]}: has no meaning with {with_option}")
