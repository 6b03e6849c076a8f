"""Commands that train and evaluate: from documents to a model for a task."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from opfa.commands.options import (
    ModelName,
    NewRun,
    Output,
    Overrides,
    RecipeFile,
    Resume,
    TaskRecipe,
    check_files,
)
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RecipeError
from opfa.extras import require
from opfa.recipe import read_values
from opfa.report.tables import print_json
from opfa.storage.files import check_directory, check_new, write_json
from opfa.training import launch
from opfa.training.run import check_output
from opfa.upstream.recipe import PretrainRecipe

app = typer.Typer()


@app.command(epilog="Example: opfa check recipes/downstream/sst2.toml training.epochs=1")
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Say whether a recipe would be accepted, and print it with all its defaults."""
    values = read_values(recipe, overrides or ())
    if not values.keys() & {"corpus", "task"}:
        what = "has neither [corpus], for opfa pretrain, nor [task], for opfa finetune"
        raise RecipeError(f"{recipe}: {what}")
    kind = PretrainRecipe if "corpus" in values else FinetuneRecipe
    command = "pretrain" if kind is PretrainRecipe else "finetune"
    found = kind.read(recipe, overrides or ())
    print(f"# accepted, for opfa {command}; SHA-256 {found.sha256()}\n{found.to_toml()}", end="")


@app.command(epilog="Example: opfa prepare recipes/upstream/bert-base-90.toml --output prepared")
def prepare(recipe: RecipeFile, output: Output, overrides: Overrides = None) -> None:
    """Turn documents into tokenized, sharded pre-training examples."""
    check_new(output)
    checked = PretrainRecipe.read(recipe, overrides or ())
    require("opfa prepare", "opfa[pretrain]", "datasets", "nupunkt")
    from opfa.upstream.corpus import prepare as execute

    execute(checked.corpus, output)


@app.command(
    epilog="Example: opfa pretrain recipes/upstream/bert-base-90.toml --output runs/bert-base-90"
)
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
) -> None:
    """Train a teacher, or prune a student under one."""
    checked = PretrainRecipe.read(recipe, overrides or ())
    check_output(output, checked, resume)  # already here, before torch is imported
    if check:
        return
    from opfa.upstream.pretrain import pretrain as execute

    execute(checked, output, resume, trust_data=trust_data)


@app.command(epilog="Example: opfa finetune recipes/downstream/sst2.toml --output runs/sst2")
def finetune(
    recipe: RecipeFile,
    output: NewRun,
    overrides: Overrides = None,
    resume: Resume = False,
    seeds: Annotated[
        int | None, Option(min=1, help="How many seeds to run, from the recipe's on.")
    ] = None,
) -> None:
    """Fine-tune a sparse model for a task with its zeros held."""
    launch.refuse_several("opfa finetune")
    checked = FinetuneRecipe.read(recipe, overrides or ())
    has_several = seeds is not None or checked.sweep is not None
    check_output(output, checked, resume, has_several=has_several)
    if has_several:
        from opfa.downstream.sweep import sweep as execute_all

        print_json(execute_all(checked, output, num_seeds=seeds or 1, resume=resume))
        return
    from opfa.downstream.finetune import finetune as execute

    print_json(execute(checked, output, resume))


@app.command(epilog="Example: opfa evaluate runs/sst2/model --recipe runs/sst2/recipe.toml")
def evaluate(
    model: ModelName,
    recipe: TaskRecipe,
    output: Annotated[Path | None, Option(help="Also write the result here.")] = None,
    predictions: Annotated[
        Path | None, Option(help="Also write every answer here, as JSON Lines.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Measure a fine-tuned model on its task's validation splits."""
    check_files({"--output": output, "--predictions": predictions})
    checked = FinetuneRecipe.read(recipe, overrides or ())
    from opfa.downstream.evaluate import evaluate_model

    result = evaluate_model(model, checked, predictions)
    if output is not None:
        write_json(output, result)
    print_json(result)


@app.command(
    epilog="Example: opfa calibrate runs/sst2/model --recipe runs/sst2/recipe.toml --output sst2-8"
)
def calibrate(
    model: ModelName,
    recipe: TaskRecipe,
    output: Output,
    examples: Annotated[int, Option(min=1, help="How many training examples it sees.")] = 512,
    overrides: Overrides = None,
) -> None:
    """Quantize a fine-tuned model to 8 bits without training."""
    check_new(output)
    checked = FinetuneRecipe.read(recipe, overrides or ())
    from opfa.downstream.calibrate import calibrate as execute

    print_json(execute(model, checked, output, num_examples=examples))


@app.command(epilog="Example: opfa quickstart --output quickstart-out")
def quickstart(
    output: Annotated[
        Path, Option("--output", help="A new directory, or that of a quickstart that was stopped.")
    ],
) -> None:
    """Run the whole method on a small model and four novelists, in minutes on a laptop."""
    check_directory(output)
    require("opfa quickstart", "opfa[pretrain]", "deepspeed", "datasets", "nupunkt")
    from opfa.quickstart.quickstart import quickstart as execute

    execute(output)
