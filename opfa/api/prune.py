"""One-shot pruning of any encoder, in memory or on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from opfa.api.progress import progress
from opfa.api.recipes import AnyRecipe, Overrides, task_recipe_of
from opfa.compression.grains import Grain
from opfa.compression.pattern import ENCODER_LAYER
from opfa.compression.scores import Score
from opfa.errors import ModelError, RunError
from opfa.report.outcome import Outcome, Place, percent
from opfa.report.tables import Table
from opfa.storage.files import check_new, new_directory

if TYPE_CHECKING:
    from torch import nn

    from opfa.compression.oneshot import OneShot
    from opfa.downstream.results import DepthResult, StructuredResult

Scope = Literal["layer", "global"]
ScoreName = Literal["magnitude"]
GrainName = str  # "weight", "neurons", "heads", or the size of blocks, such as "32x32"
CostName = Literal["macs", "milliseconds", "parameters"]


class PruneResult(Outcome):
    """What was pruned, counted; the last keys are those of `sparsity.json`."""

    directory: Place | None  # None for a model in memory
    score: str
    grain: str
    scope: Scope
    left: dict[str, tuple[int, int]]  # heads, neurons or blocks: how many, and of how many
    zeros: int
    size: int  # of the pruned tensors together
    sparsity: float
    fingerprint: str
    tensors: dict[str, dict[str, Any]]  # by name: shape, zeros, sparsity

    def table(self) -> Table:
        """How many weights of how many."""
        rows = [
            ("zeros", f"{self.zeros:,}"),
            ("weights", f"{self.size:,}"),
            ("sparsity", percent(self.sparsity)),
            ("matrices", f"{len(self.tensors):,}"),
            *((f"{units} left", f"{kept:,} of {of:,}") for units, (kept, of) in self.left.items()),
        ]
        name = "model" if self.directory is None else self.directory.name
        return Table((name, f"{self.score}, one shot"), rows, numbers_from=1)

    def places(self) -> Mapping[str, Path | str]:
        """The model, if it was written."""
        return {} if self.directory is None else {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """To look at it, to make it smaller, and to fine-tune it with its zeros held."""
        if self.directory is None:
            return []
        tune = ("finetune", "RECIPE", "--output", "RUN", f"model.init={self.directory}")
        small = ("shrink", self.directory, "--output", f"{self.directory}-small")
        can_shrink = not self.left.keys().isdisjoint({"heads", "neurons"})
        return [("inspect", self.directory), *([small] if can_shrink else []), tune]


@overload
def prune(
    model: "nn.Module",
    sparsity: float,
    output: None = None,
    *,
    scope: Scope = "layer",
    score: ScoreName | Score = "magnitude",
    grain: GrainName | Grain = "weight",
    include: Sequence[str] = (ENCODER_LAYER,),
    exclude: Sequence[str] = (),
) -> PruneResult: ...
@overload
def prune(
    model: str | Path,
    sparsity: float,
    output: str | Path,
    *,
    scope: Scope = "layer",
    score: ScoreName | Score = "magnitude",
    grain: GrainName | Grain = "weight",
    include: Sequence[str] = (ENCODER_LAYER,),
    exclude: Sequence[str] = (),
) -> PruneResult: ...
@progress()
def prune(
    model: "str | Path | nn.Module",
    sparsity: float,
    output: str | Path | None = None,
    *,
    scope: Scope = "layer",
    score: ScoreName | Score = "magnitude",
    grain: GrainName | Grain = "weight",
    include: Sequence[str] = (ENCODER_LAYER,),
    exclude: Sequence[str] = (),
) -> PruneResult:
    """Prune an encoder in one shot: exactly round(sparsity * size) of its weights become +0.0.

    A model in memory is changed in place and stays plain: `opfa.lock` it before training. A
    directory, a run or a Hub name is written to the new directory `output`, with its head, its
    tokenizer and its files of sentence-transformers, for them and for `model.init` of a recipe.

    `scope` says whether each matrix reaches the sparsity, or all together. `score` is what a weight
    is worth, `grain` what is pruned together: a name, or an object of your own class; "neurons" and
    "heads" are removed by `opfa.shrink`, and "32x32" are blocks of any size. `include` and
    `exclude` are regular expressions that are searched for in names of linear layers; by default
    those of the numbered layers. Raises `RecipeError` for settings, `ModelError` for models.
    """
    from opfa.compression.oneshot import OneShot

    named = {} if isinstance(score, Score) else {"score": score}
    named |= {} if isinstance(grain, Grain) else {"grain": grain}
    given = {"include": [*include], "exclude": [*exclude], "scope": scope, "sparsity": sparsity}
    settings = OneShot.check({**given, **named}, "prune")
    own = {
        "score": score if isinstance(score, Score) else None,
        "grain": grain if isinstance(grain, Grain) else None,
    }
    if not isinstance(model, (str, Path)):
        if output is not None:
            raise RunError(f"output = {str(output)!r}: is for a model on disk; save this one after")
        return _pruned(model, settings, None, own)
    if output is None:
        raise RunError(f"{model}: is not in memory, so give the new directory `output`")
    return _written(str(model), settings, Path(output), own)


def _pruned(
    model: "nn.Module", settings: "OneShot", output: Path | None, own: Mapping[str, Any]
) -> PruneResult:
    from opfa.compression.oneshot import prune_once

    report = prune_once(model, settings, **own)
    names = {key: own[key] or getattr(settings, key) for key in ("score", "grain")}
    return PruneResult(
        directory=output,
        # one of your own may have no name
        **{key: getattr(one, "kind", type(one).__name__) for key, one in names.items()},
        scope=settings.scope,
        left=report["left"],
        **report["total"],
        fingerprint=report["fingerprint"],
        tensors=report["tensors"],
    )


def _written(name: str, settings: "OneShot", output: Path, own: Mapping[str, Any]) -> PruneResult:
    check_new(output)
    from opfa.models.configs import load_config, load_tokenizer
    from opfa.models.sentences import files_of, write_files
    from opfa.models.trained import load, ranges_of
    from opfa.training.checkpoint import fill_finished
    from opfa.training.engine import choose_accelerator

    choose_accelerator()  # else DeepSpeed, where it is installed, says on stdout that it guessed
    if ranges_of(name) is not None:
        raise ModelError(f"{name}: is in 8 bits; prune the model that it was made of")
    tokenizer, model = load_tokenizer(name), load(name, exact=False)
    files = files_of(name, load_config(name))  # a sentence encoder stays one
    result = _pruned(model, settings, output, own)
    with new_directory(output) as work:
        fill_finished(model, tokenizer, work, lambda directory: write_files(files, directory))
    return result


@progress()
def prune_structured(
    model: str | Path,
    output: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    keep: float,
    of: CostName = "macs",
    score: Literal["fisher", "magnitude"] = "fisher",
    examples: int = 8192,
    batch: int = 1,
    tokens: int | None = None,
) -> "StructuredResult":
    """Prune whole heads and neurons of a fine-tuned model, without training, into `output`.

    The model keeps the share `keep` of its multiply-adds, of its milliseconds in torch on this
    machine, or of its parameters. The first and the last count heads and neurons alone. They are
    of `batch` sequences of `tokens` tokens, by default those of the recipe's task. What a unit is
    worth is the Fisher information of its gate on training examples of the recipe's task (by
    default of the run's own), or its magnitude. The output matrices are then fitted by least
    squares. The zeros have the old shape; `opfa.shrink` makes smaller matrices of them.
    Raises `RecipeError` for settings, `RunError` for a budget that can't be met, and `ModelError`.
    """
    check_new(Path(output))
    checked = task_recipe_of(model, recipe, overrides)
    from opfa.downstream.budget import Budget

    given = {"keep": keep, "of": of, "score": score, "examples": examples, "batch": batch}
    budget = Budget.check({**given, **({} if tokens is None else {"tokens": tokens})}, "prune")
    from opfa.downstream.structured import prune_structured as execute

    return execute(str(model), checked, Path(output), budget)


@progress()
def prune_layers(
    model: str | Path,
    output: str | Path,
    recipe: AnyRecipe | None = None,
    overrides: Overrides = (),
    *,
    layers: int,
    examples: int = 8192,
) -> "DepthResult":
    """Keep so many layers of a fine-tuned model, those that its loss needs most, in `output`.

    What a layer is worth is the Fisher information of its gate, on training examples of the
    recipe's task, by default of the run's own. Any transformers loads the result. It has to be
    fine-tuned again. Raises `RunError` where there are not more layers, and `ModelError`.
    """
    check_new(Path(output))
    checked = task_recipe_of(model, recipe, overrides)
    from opfa.downstream.depth import prune_layers as execute

    return execute(str(model), checked, Path(output), layers, examples)
