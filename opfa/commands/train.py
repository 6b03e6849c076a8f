"""Commands that train and evaluate: from documents to a model for a task."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from opfa.api import train as api
from opfa.commands.options import (
    AsJson,
    ModelName,
    NewRun,
    Output,
    Overrides,
    RecipeFile,
    Resume,
    TaskRecipe,
    check_files,
)
from opfa.extras import require
from opfa.report.tables import print_json
from opfa.search.recipe import SearchRecipe
from opfa.storage.files import check_directory
from opfa.training import launch
from opfa.training.run import check_output
from opfa.upstream.recipe import PretrainRecipe

app = typer.Typer()


@app.command(epilog="Example: opfa check sst2 training.epochs=1")
def check(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say whether a recipe would be accepted, and print it with all its defaults."""
    found = api.check(recipe, overrides or ())
    command = "pretrain" if isinstance(found, PretrainRecipe) else "finetune"
    command = "search" if isinstance(found, SearchRecipe) else command
    if as_json:
        values = found.model_dump(mode="json", exclude_none=True)
        print_json({"command": command, "sha256": found.sha256(), "recipe": values})
        return
    print(f"# accepted, for opfa {command}; SHA-256 {found.sha256()}\n{found.to_toml()}", end="")


@app.command(epilog="Example: opfa prepare bert-base-90 --output prepared/bert-base")
def prepare(
    recipe: RecipeFile, output: Output, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Turn documents into tokenized, sharded pre-training examples."""
    api.prepare(recipe, output, overrides or ()).show(as_json=as_json)


@app.command(epilog="Example: opfa pretrain bert-base-90 --output runs/bert-base-90")
def pretrain(
    recipe: RecipeFile,
    output: NewRun,
    overrides: Overrides = None,
    resume: Resume = False,
    check: Annotated[
        bool, Option("--check", help="Only say whether recipe and RUN would be accepted.")
    ] = False,
    trust_data: Annotated[
        bool, Option("--trust-data", help="Don't read all examples first to verify them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a teacher, or prune a student under one."""
    checked = PretrainRecipe.read(recipe, overrides or ())
    if check:
        check_output(output, checked, resume)
        if launch.place().rank == 0:
            _tell_accepted(recipe, checked, output, as_json=as_json)
        return
    found = api.pretrain(checked, output, resume=resume, trust_data=trust_data, watchdog=True)
    if launch.place().rank == 0:
        found.show(as_json=as_json)


def _tell_accepted(file: Path, recipe: PretrainRecipe, output: Path, *, as_json: bool) -> None:
    found = {"recipe": str(file), "output": str(output), "sha256": recipe.sha256()}
    if as_json:
        print_json({"command": "pretrain", **found})
    else:
        print("accepted: {recipe} can run in {output}; SHA-256 {sha256}".format(**found))


@app.command(epilog="Example: opfa finetune sst2 --output runs/sst2")
def finetune(
    recipe: RecipeFile,
    output: NewRun,
    overrides: Overrides = None,
    resume: Resume = False,
    seeds: Annotated[
        int | None, Option(min=1, help="How many seeds to run, from the recipe's on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a sparse model for a task with its zeros held."""
    found = api.finetune(recipe, output, overrides or (), seeds=seeds, resume=resume)
    found.show(as_json=as_json)


@app.command(epilog="Example: opfa evaluate runs/sst2")
def evaluate(
    model: ModelName,
    recipe: TaskRecipe = None,
    output: Annotated[Path | None, Option(help="Also write the result to this new file.")] = None,
    predictions: Annotated[
        Path | None, Option(help="Also write every answer here, as JSON Lines.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned model on its task's validation splits."""
    check_files({"--output": output, "--predictions": predictions})
    files = {"output": output, "predictions": predictions}
    api.evaluate(model, recipe, overrides or (), **files).show(as_json=as_json)


@app.command(epilog="Example: opfa calibrate runs/sst2 --output sst2-8bit")
def calibrate(
    model: ModelName,
    output: Output,
    recipe: TaskRecipe = None,
    examples: Annotated[int, Option(min=1, help="How many training examples it sees.")] = 512,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a fine-tuned model to 8 bits without training."""
    found = api.calibrate(model, output, recipe, overrides or (), examples=examples)
    found.show(as_json=as_json)


@app.command(epilog="Example: opfa quickstart --output quickstart-out")
def quickstart(
    output: Annotated[
        Path, Option("--output", help="A new directory, or that of a quickstart that was stopped.")
    ],
    as_json: AsJson = False,
) -> None:
    """Run the whole method on a small model and four novelists, in minutes on a laptop."""
    check_directory(output)
    require("opfa quickstart", "opfa[pretrain]", "deepspeed", "datasets", "nupunkt")
    from opfa.quickstart.quickstart import quickstart as execute

    execute(output).show(as_json=as_json)
