"""What one rank of a test's launch runs: upstream runs one after another in one process group.

`ranks.py JOBS` reads a JSON list of {"values": recipe, "output": directory, "resume":
bool, "slow": seconds that every step takes longer, "bad_step": a step in which the last rank's loss
is not a number}. While each trains, every masked layer's effective weight is looked at in every
forward pass, and after every step the masks' fingerprint is noted in OUTPUT.watched.jsonl, with how
many masked weights were seen that took part in a step.
"""

import json
import logging
import math
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from opfa.errors import OpfaError
from opfa.sparsity.layers import MaskedLinear, masks_of
from opfa.sparsity.masks import fingerprint
from opfa.training.distributed import end_process
from opfa.training.loop import Concern, Progress
from opfa.upstream.batches import Batch
from opfa.upstream.objective import Counts, Losses, Objective, Targets
from opfa.upstream.pretrain import pretrain
from opfa.upstream.recipe import PretrainRecipe

EFFECTIVE_WEIGHT = MaskedLinear.effective_weight
FORWARD = Objective.forward
LINEAR = torch.nn.functional.linear
seen = {"layers": 0, "violations": 0}


def watched_weight(layer: MaskedLinear) -> Tensor:
    """What a layer computes with; counts masked weights in it that are not exactly zero."""
    weight = EFFECTIVE_WEIGHT(layer)
    assert weight.shape == layer.mask.shape
    seen["layers"] += 1
    seen["violations"] += int((weight[~layer.mask] != 0).sum())
    return weight


def run(
    output: Path, recipe: PretrainRecipe, *, resume: bool, slow: float, bad_step: int | None
) -> None:
    """One upstream run, watched."""

    def slow_forward(
        objective: Objective, batch: Batch, targets: Targets | None, counts: Counts
    ) -> Losses:
        losses = FORWARD(objective, batch, targets, counts)
        if not torch.is_grad_enabled():
            return losses
        time.sleep(slow)
        is_bad = dist.get_rank() == dist.get_world_size() - 1 and steps[0] + 1 == bad_step
        return losses._replace(total=losses.total * math.nan) if is_bad else losses

    class Watching(Concern):
        def begin(self, at: Progress) -> None:
            if at.step == 0:
                self.after_step(at)

        def after_step(self, at: Progress) -> None:
            steps[0] = at.step
            row = {"step": at.step, "masks": fingerprint(masks_of(at.model)), **seen}
            if at.run.is_writer:
                with output.with_name(f"{output.name}.watched.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")

    seen.update(layers=0, violations=0)
    steps = [0]
    with (
        patch.object(MaskedLinear, "effective_weight", watched_weight),
        patch.object(Objective, "forward", slow_forward),
    ):
        pretrain(recipe, output, resume, concerns=[Watching()])
    assert torch.nn.functional.linear is LINEAR  # nothing of one run is left for the next


def main() -> int:
    """Run the jobs; the exit code that `opfa` would give."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        recipe = PretrainRecipe.check(job["values"])
        try:
            run(
                Path(job["output"]),
                recipe,
                resume=job.get("resume", False),
                slow=job.get("slow", 0.0),
                bad_step=job.get("bad_step"),
            )
        except OpfaError as error:
            print(error, file=sys.stderr)
            return error.status
    return 0


if __name__ == "__main__":
    end_process(main())
