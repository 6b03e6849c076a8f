"""The resume points of a run, upstream and downstream: README.md says which files they have."""

import logging
from pathlib import Path

from opfa.errors import RunError
from opfa.sparsity import masks
from opfa.sparsity.layers import masks_of, set_masks
from opfa.training import distributed
from opfa.training.checkpoint import facts_of, newest_point, save_point
from opfa.training.loop import Progress

MASKS = "masks.safetensors"
log = logging.getLogger(__name__)


def save(at: Progress, keep: int) -> None:
    """Save a resume point; keep the newest ones and the best. Collective."""

    def write(directory: Path) -> None:
        at.engine.save(directory)
        if at.run.is_writer and (found := masks_of(at.model)):
            masks.save(found, directory / MASKS)
        for concern in at.concerns:
            concern.save(at, directory)
        distributed.barrier()
        wanted = at.engine.num_files
        if at.run.is_writer and not distributed.eventually(
            lambda: len(list(directory.glob("state-*"))) == wanted
        ):
            what = f"not the state of all {wanted} ranks is here; {distributed.SHARED}"
            raise RunError(f"{directory}: {what}")

    facts = {"world_size": distributed.world_size(), "best": at.best_step}
    if at.run.is_writer:
        facts |= at.run.state()
    save_point(at.run.directory / "checkpoints", at.step, write, facts, keep=keep)


def restore(at: Progress, point: Path) -> None:
    """Set weights, optimizer, masks and concerns to what a resume point holds. Collective."""
    facts = facts_of(point)
    if (point / "state.pt").exists() or "metrics" not in facts:
        raise RunError(
            f"{point}: an older version wrote this resume point, and this one can't read it; "
            "finish the run with that version, or start anew in another directory"
        )
    at.step, at.best_step = facts["step"], facts.get("best")
    at.engine.load(point)
    if masks_of(at.model):
        set_masks(at.model, masks.load(point / MASKS))
    for concern in at.concerns:
        concern.load(at, point)


def resume(at: Progress) -> None:
    """Go back to the newest resume point, or to the beginning where there is none. Collective."""
    directory = at.run.directory
    name = distributed.on_first_rank(lambda: str(newest_point(directory / "checkpoints") or ""))
    if not name:
        log.warning("%s: no resume point; starting anew", directory)
        return at.run.go_back(0)
    restore(at, Path(name))
    distributed.on_first_rank(lambda: at.run.go_back(at.step, facts_of(Path(name))))
    return log.info("%s: resumed at step %d", directory, at.step)
