"""A fine-tuned model without some of its layers, chosen by Fisher information, without training."""

from pathlib import Path

from opfa.compression.fisher import gone, removal
from opfa.downstream.evaluate import Ready
from opfa.downstream.examples import batches_of, fisher_of, num_rows
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import DepthResult
from opfa.errors import RunError
from opfa.models.depth import drop_layers, first_stays
from opfa.models.gates import LayerGates
from opfa.models.removal import layers_of
from opfa.sparsity.layers import SPARSE_FROM
from opfa.storage.files import check_new, new_directory


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
    layers = [layer for layer, _ in layers_of(model)]
    if not 1 <= num_layers < len(layers):
        what = f"must be from 1 to {len(layers) - 1}, since this model has {len(layers)}"
        raise RunError(f"layers = {num_layers}: {what}")
    before, batches = ready.evaluate(), batches_of(ready)
    (fisher,) = fisher_of(LayerGates(layers), model, task, batches)
    start = int(first_stays(model))  # layers before it stay
    fisher = fisher[start:, start:]
    is_gone = gone(fisher, removal(fisher)[0], num_layers - start)
    kept = [*range(start), *(start + (~is_gone).nonzero()[:, 0]).tolist()]
    drop_layers(model, kept)
    after = ready.evaluate()
    with new_directory(output) as work:
        report = ready.write(model, work)
    return DepthResult(
        directory=output,
        task=recipe.name,
        before=before,
        after=after,
        kept=kept,
        of_layers=len(layers),
        examples=num_rows(batches),
        is_sparse=report["total"]["sparsity"] >= SPARSE_FROM,
    )
