"""From documents to a model for a task: the commands that need a recipe, as functions.

They take what a program has: paths as text or `Path`, a recipe as a file, an object or plain
values, overrides as a mapping. They return frozen results that print themselves as the command's
table, raise `opfa.OpfaError`, and never end the process. torch is imported when one is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from opfa.api.progress import progress
from opfa.api.recipes import (
    AnyRecipe,
    Overrides,
    any_recipe_of,
    recipe_of,
    task_recipe_of,
    words_of,
)
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import CalibrateResult, EvaluateResult, FinetuneResult, SweepResult
from opfa.extras import require
from opfa.storage.files import check_file, check_new, write_json
from opfa.storage.shipped import name_of
from opfa.training import launch
from opfa.training.run import check_output
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.results import PrepareResult, PretrainResult

if TYPE_CHECKING:  # its formulas need torch
    from opfa.upstream.plan import Plan


def check(recipe: AnyRecipe, overrides: Overrides = ()) -> PretrainRecipe | FinetuneRecipe:
    """The checked recipe; raises `RecipeError` with all its problems. No data or model is read."""
    return any_recipe_of(recipe, overrides)


@progress()
def prepare(recipe: AnyRecipe, output: str | Path, overrides: Overrides = ()) -> PrepareResult:
    """Turn documents into tokenized, sharded pre-training examples, in the new directory `output`.

    Raises `RecipeError`, `DataError` for documents that can't be used, `ModelError` for examples
    that don't fit `model.init`, and `RunError` for an output that can't be made.
    """
    check_new(Path(output))
    checked = recipe_of(PretrainRecipe, recipe, overrides)
    require("opfa prepare", "opfa[pretrain]", "datasets", "nupunkt")
    from opfa.upstream.corpus import prepare as execute

    found = execute(checked.corpus, Path(output), checked.model.init)
    if not isinstance(recipe, (str, Path)):
        return found
    words = (name_of(recipe), "--output", f"runs/{checked.name}", *words_of(overrides))
    return found.model_copy(update={"training": words})


@progress()
def pretrain(
    recipe: AnyRecipe,
    output: str | Path,
    overrides: Overrides = (),
    *,
    resume: bool = False,
    trust_data: bool = False,
    watchdog: bool = False,
) -> PretrainResult:
    """Train a teacher, or prune a student under one, and write the run directory `output`.

    `resume` goes on from the newest resume point. `trust_data` doesn't read all examples first to
    verify them. With `watchdog`, as in the command, this process ends with exit code 76 when
    nothing was finished for `launch.timeout_seconds`. In a launch of several processes, each of
    which calls this, it is always on: one that waits for another can't be told otherwise.

    The first Ctrl-C saves and raises an `OpfaError` that says how to resume; the second stops at
    once. In other threads than the main one signals are left alone.
    """
    checked = recipe_of(PretrainRecipe, recipe, overrides)
    check_output(Path(output), checked, resume)  # here too, before torch is imported
    from opfa.upstream.pretrain import pretrain as execute

    watched = watchdog or launch.place().world_size > 1
    return execute(checked, Path(output), resume, trust_data=trust_data, has_watchdog=watched)


@progress()
def finetune(
    recipe: AnyRecipe,
    output: str | Path,
    overrides: Overrides = (),
    *,
    seeds: int | None = None,
    resume: bool = False,
) -> FinetuneResult | SweepResult:
    """Fine-tune a sparse model for a task with its zeros held, into the run directory `output`.

    With `seeds`, or a recipe that has [sweep], there are several runs, one after the other, and a
    `SweepResult`. Either has `.metrics` and `.model`, the directory of the (best) model.
    `resume` goes on where a run stopped. Ctrl-C works as in `pretrain`.
    """
    launch.refuse_several("opfa finetune")
    checked = recipe_of(FinetuneRecipe, recipe, overrides)
    has_several = seeds is not None or checked.sweep is not None
    check_output(Path(output), checked, resume, has_several=has_several)  # before torch is imported
    if has_several:
        from opfa.downstream.sweep import sweep

        return sweep(checked, Path(output), num_seeds=seeds or 1, resume=resume)
    from opfa.downstream.finetune import finetune as execute

    return execute(checked, Path(output), resume)


@progress()
def evaluate(
    model: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    output: str | Path | None = None,
    predictions: str | Path | None = None,
) -> EvaluateResult:
    """Measure a fine-tuned model on the validation splits of a recipe's task, in 8 bits if it is.

    The recipe of a run, or of a model that has one beside it, need not be given.
    `output` is a new JSON file for the result, `predictions` one of JSON Lines for every answer.
    """
    if output is not None:
        check_new(Path(output), "file")
    if predictions is not None:
        check_file(Path(predictions))
    checked = task_recipe_of(model, recipe, overrides)
    from opfa.downstream.evaluate import evaluate_model

    found = evaluate_model(str(model), checked, None if predictions is None else Path(predictions))
    if output is not None:
        write_json(Path(output), found.values())
    return found


@progress()
def calibrate(
    model: str | Path,
    output: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    examples: int = 512,
) -> CalibrateResult:
    """Quantize a fine-tuned model to 8 bits without training, into the new directory `output`.

    Ranges of activations are means over so many training examples of the recipe's task, by default
    of the run's own.
    """
    check_new(Path(output))
    checked = task_recipe_of(model, recipe, overrides)
    from opfa.downstream.calibrate import calibrate as execute

    return execute(str(model), checked, Path(output), num_examples=examples)


def plan(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    gpus: int,
    memory_gb: float,
    bandwidth_gbps: float,
    teraflops: float = 150.0,
) -> "Plan":
    """Calculate what a launch of `pretrain` needs, and which DeepSpeed file to use.

    `memory_gb` is of each GPU, `bandwidth_gbps` in Gbit/s of each GPU to the others, `teraflops`
    what a GPU sustains, in 10^12 operations a second.
    """
    checked = recipe_of(PretrainRecipe, recipe, overrides)
    from opfa.upstream.plan import plan as execute

    return execute(
        checked, gpus=gpus, memory_gb=memory_gb, bandwidth_gbps=bandwidth_gbps, teraflops=teraflops
    )
