"""What one rank of a test's launch runs: upstream runs one after another in one process group.

`python tests/ranks.py JOBS` reads a JSON list of {"values": recipe, "output": directory, "resume":
bool}. While each trains, every masked layer's effective weight is looked at in every forward pass,
and after every step the masks' fingerprint is noted in OUTPUT/watched.jsonl, with how many masked
weights were seen that took part in a step.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from opfa.distributed import end_process
from opfa.sparsity.layers import MaskedLinear
from opfa.sparsity.masks import fingerprint
from opfa.upstream.pretrain import Trainer, pretrain
from opfa.upstream.recipe import PretrainRecipe

EFFECTIVE_WEIGHT, PRUNE = MaskedLinear.effective_weight, Trainer.prune
seen = {"layers": 0, "violations": 0}


def watched_weight(layer: MaskedLinear) -> Tensor:
    """What a layer computes with; counts masked weights in it that are not exactly zero."""
    weight = EFFECTIVE_WEIGHT(layer)
    assert weight.shape == layer.mask.shape
    seen["layers"] += 1
    seen["violations"] += int((weight[~layer.mask] != 0).sum())
    return weight


def run(output: Path, recipe: PretrainRecipe, resume: bool) -> None:
    """One upstream run, watched."""

    def watched_prune(trainer: Trainer, step: int) -> None:
        PRUNE(trainer, step)
        assert trainer.pruner is not None
        row = {"step": step, "masks": fingerprint(trainer.pruner.masks()), **seen}
        if trainer.order.rank == 0:
            with output.with_name(f"{output.name}.watched.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    seen.update(layers=0, violations=0)
    with (
        patch.object(MaskedLinear, "effective_weight", watched_weight),
        patch.object(Trainer, "prune", watched_prune),
    ):
        pretrain(recipe, output, resume)


def main() -> None:
    """Run the jobs."""
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        recipe = PretrainRecipe.check(job["values"])
        run(Path(job["output"]), recipe, job.get("resume", False))
    end_process(0)


if __name__ == "__main__":
    main()
