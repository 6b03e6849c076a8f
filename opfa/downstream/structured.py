"""Structured pruning of a fine-tuned model without training: whole heads and neurons go.

The Fisher information of gates says what each unit is worth. Which units stay is chosen exactly
under a budget. Least squares make up for those that went. The model keeps its shape, with zeros;
`opfa shrink` makes its matrices smaller.
"""

import copy
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opfa.compression.budget import choose
from opfa.compression.fisher import gone, removal
from opfa.downstream.budget import Budget
from opfa.downstream.evaluate import Ready
from opfa.downstream.examples import batches_of, fisher_of, num_rows
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import Kept, StructuredResult
from opfa.errors import RunError
from opfa.models.costs import Costs, macs, milliseconds, parameters
from opfa.models.gates import UnitGates
from opfa.models.refit import refit
from opfa.models.removal import groups_of, layers_of
from opfa.models.skeleton import check_positions
from opfa.report.bars import Bar
from opfa.storage.files import check_new, new_directory
from opfa.tasks import kinds as tasks
from opfa.tasks.features import Batch
from opfa.tasks.recipe import Task

FITTED_TOKENS = 1 << 16  # that least squares see


def prune_structured(
    name: str, recipe: FinetuneRecipe, output: Path, budget: Budget
) -> StructuredResult:
    """Write the new directory `output`: a model whose heads and neurons cost at most the budget.

    The examples are the first of a shuffle with the recipe's seed. Raises `RunError` for a budget
    that can't be met, `ModelError` for a model of another family or in 8 bits.
    """
    check_new(output)
    ready = Ready.load(name, recipe, budget.examples)
    model, task = ready.model.requires_grad_(False), ready.task
    costs = _costs(model, budget, task.sequence_tokens)
    before = ready.evaluate()
    batches = batches_of(ready)
    pruned = copy.deepcopy(model)
    lost = _choose(model, task, batches, costs, budget)
    for units, is_gone in zip(groups_of(pruned), lost, strict=True):
        units.erase(is_gone)
    fit_again(pruned, model, task, batches)
    after = ready.evaluate(pruned)
    with new_directory(output) as work:
        report = ready.write(pruned, work)
    kept = [int((~is_gone).sum()) for is_gone in lost]
    return StructuredResult(
        directory=output,
        task=recipe.name,
        before=before,
        after=after,
        of=budget.of,
        cost=costs.whole,
        left=costs.of(kept),
        layers=[Kept.of_gone(*pair) for pair in zip(lost[::2], lost[1::2], strict=True)],
        examples=num_rows(batches),
        sparsity=report["total"]["sparsity"],
    )


def _costs(model: PreTrainedModel, budget: Budget, longest: int) -> Costs:
    """What units cost; raises `RunError` for a budget that none of them fits in, and `ModelError`
    for more tokens than the model has positions.
    """
    if budget.tokens is not None:
        check_positions(model, model.config, budget.tokens, "tokens")
    if budget.of == "parameters":
        found = parameters(model)
    else:
        count = macs if budget.of == "macs" else milliseconds
        found = count(model, budget.batch, budget.tokens or longest)
    least = found.of([0] * len(found.curves)) / found.whole
    if budget.keep < least:
        what = f"must be at least {least:.3g}; so many of all {budget.of} are left without any unit"
        raise RunError(f"keep = {budget.keep:g}: {what}")
    return found


def _choose(
    model: PreTrainedModel, task: Task, batches: Sequence[Batch], costs: Costs, budget: Budget
) -> list[Tensor]:
    """Which units of each group go."""
    groups = groups_of(model)
    if budget.score == "magnitude":
        information = [units.squares().diag() for units in groups]
    else:
        information = fisher_of(UnitGates(groups), model, task, batches)
    orders, losses = zip(*map(removal, information), strict=True)
    curves = [loss.flip(0).numpy() for loss in losses]  # by how many are kept
    kept = choose(curves, costs.curves, budget.keep * costs.whole - costs.rest)
    return [gone(*each) for each in zip(information, orders, kept, strict=True)]


def fit_again(
    pruned: PreTrainedModel,
    model: PreTrainedModel,
    task: Task,
    batches: Sequence[Batch],
    gone: Collection[int] = (),
) -> None:
    """Fit what is left of a model to the whole one, in place; layers of these numbers are gone."""
    texts, num_tokens = [], 0
    for number in torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist():
        batch = batches[number]
        texts.append((batch["attention_mask"].flatten(0, -2), partial(_call, task, batch)))
        num_tokens += int(batch["attention_mask"].sum())
        if num_tokens >= FITTED_TOKENS:
            break
    with Bar("least squares", len(list(layers_of(model)))) as bar:
        for layer in refit(pruned, model, texts, gone):
            bar.move_to(layer + 1)


def _call(task: Task, batch: Batch, model: PreTrainedModel) -> None:
    tasks.call(task, model, batch)
