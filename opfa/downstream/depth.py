"""A fine-tuned model without some of its layers, chosen by Fisher information, without training."""

from pathlib import Path

import torch

from opfa.compression.fisher import improve, removal
from opfa.downstream.evaluate import Ready
from opfa.downstream.examples import batches_of, loss_of
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import DepthResult
from opfa.errors import RunError
from opfa.models.depth import LayerGates, drop_layers, first_stays
from opfa.models.removal import layers_of
from opfa.report.bars import Bar
from opfa.sparsity.layers import SPARSE_FROM
from opfa.storage.files import check_new, new_directory, write_text
from opfa.storage.runs import RECIPE
from opfa.tasks import kinds as tasks
from opfa.training.checkpoint import fill_finished


def prune_layers(
    name: str, recipe: FinetuneRecipe, output: Path, num_layers: int, num_examples: int
) -> DepthResult:
    """Write the new directory `output`: a model with so many layers, which any transformers loads.

    The examples are the first of a shuffle with the recipe's seed. Raises `RunError` where there
    are not more layers, `ModelError` for a model of another family or in 8 bits.
    """
    check_new(output)
    ready = Ready.load(name, recipe, num_examples)
    model, task = ready.model.requires_grad_(False), ready.task
    all_layers = len(list(layers_of(model)))
    if not 1 <= num_layers < all_layers:
        what = f"must be from 1 to {all_layers - 1}, since this model has {all_layers}"
        raise RunError(f"layers = {num_layers}: {what}")
    before, batches, gradients = ready.evaluate(), batches_of(ready), []
    torch.manual_seed(0)
    with LayerGates(model) as gates, Bar("scores", len(batches)) as bar:
        for batch in batches:
            outputs = tasks.call(task, model, batch)
            gradients.append(gates.gradients(loss_of(task, outputs, batch)).cpu().double())
            bar.advance(1)
    found = torch.cat(gradients)
    start = int(first_stays(model))  # layers before it stay
    fisher = (found.T @ found)[start:, start:]
    is_gone = torch.zeros(len(fisher), dtype=torch.bool)
    is_gone[removal(fisher)[0][: all_layers - num_layers]] = True
    kept = [*range(start), *(start + (~improve(fisher, is_gone)).nonzero()[:, 0]).tolist()]
    drop_layers(model, kept)
    after = ready.evaluate()
    with new_directory(output) as work:
        tasks.write_more(task, model, work)
        report = fill_finished(model.cpu(), ready.tokenizer, work)
        write_text(work / RECIPE, recipe.to_public_toml())  # how other commands read its inputs
    return DepthResult(
        directory=output,
        task=recipe.name,
        before=before,
        after=after,
        kept=kept,
        of_layers=all_layers,
        examples=sum(len(batch["input_ids"]) for batch in batches),
        is_sparse=report["total"]["sparsity"] >= SPARSE_FROM,
    )
