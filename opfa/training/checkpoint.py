"""Resume points and finished models: made in a temporary place, verified, and then renamed."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.errors import ModelError, RunError
from opfa.models.encoders import write_model
from opfa.sparsity import masks
from opfa.sparsity.anatomy import is_matrix
from opfa.sparsity.chosen import Chosen, noted
from opfa.sparsity.layers import fuse, masked_layers, masks_of, zero_masks
from opfa.storage.files import new_directory, new_directory_at, sync, sync_all, write_json, writing
from opfa.storage.seal import SEAL, digest, one_digest, read_json, sealed
from opfa.storage.temporary import remove
from opfa.training.distributed import barrier, rank
from opfa.weights.compact import tensors

MANIFEST = "MANIFEST.json"
KEPT = "nothing half-written is kept, and earlier resume points are as they were"
log = logging.getLogger(__name__)


def save_point(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    facts: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Save a resume point. Of the old ones the newest `keep` stay, and the best that they name.

    Collective: every rank's `write` puts its files in one shared directory.
    """
    work, final = root / ".incomplete", root / point_name(step)
    is_writer = rank() == 0
    if is_writer:
        with writing(root, KEPT):
            new_directory_at(work)
    barrier()
    try:
        with writing(root, KEPT):
            write(work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    barrier()
    if is_writer:
        paths = [path for path in sorted(work.rglob("*")) if path.is_file()]
        files = {str(path.relative_to(work)): digest(path) for path in paths}
        with writing(root, KEPT):
            manifest = sealed({"step": step, "files": files, **facts})
            (work / MANIFEST).write_text(json.dumps(manifest))
            sync_all(work)
            remove(final)
            os.replace(work, final)  # the commit point
            sync(root)
        points = sorted(root.glob("step-*"))
        # newer ones are damaged, and those without a manifest were being removed
        kept = [p for p in points if p <= final and (p / MANIFEST).exists()][-keep:]
        best = {root / point_name(b) for p in kept if (b := _best_of(p)) is not None}
        for other in set(points) - set(kept) - best:
            shutil.rmtree(other, ignore_errors=True)
    barrier()


def point_name(step: int) -> str:
    """The name of a resume point's directory."""
    return f"step-{step:08d}"


def newest_point(root: Path) -> Path | None:
    """The newest undamaged resume point, or None. Raises `RunError` if all are damaged."""
    points = sorted(root.glob("step-*"), reverse=True)
    for point in points:
        if (problem := problem_of(point)) is None:
            return point
        log.warning("%s: passed over, %s", point, problem)
    if points:  # to start anew in silence would throw a run away
        what = "restore one, or remove them all to start anew"
        raise RunError(
            f"{root}: every resume point here is damaged, or of an older version; {what}"
        )
    return None


def facts_of(point: Path) -> dict[str, Any]:
    """What was saved beside the state, such as the step."""
    return read_json(point / MANIFEST)


def _best_of(point: Path) -> int | None:
    """The step that a resume point names as the best so far; None if it is damaged."""
    try:
        return facts_of(point).get("best")
    except RunError:
        return None


def problem_of(point: Path) -> str | None:
    """What is wrong with a resume point; None where its files are what its manifest says."""
    try:
        facts = json.loads((point / MANIFEST).read_text())
        if SEAL not in facts:
            return "was written by an older version"
        if sealed(facts) != facts:
            return f"{MANIFEST} is damaged"
        for name, expected in facts["files"].items():
            if digest(point / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error.__class__.__name__}: {error})"
    return None


def write_finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    write_more: Callable[[Path], None] = lambda _: None,
    chosen_by: Iterable[Chosen] = (),
) -> dict[str, Any]:
    """Write a run's finished model, in place of one that a stopped process left."""
    with new_directory(directory, is_new=False) as aside:
        return fill_finished(model, tokenizer, aside, write_more, chosen_by)


def fill_finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    write_more: Callable[[Path], None] = lambda _: None,
    chosen_by: Iterable[Chosen] = (),
) -> dict[str, Any]:
    """Fuse a model, save it in an empty directory with `sparsity.json`, and verify the files.

    `chosen_by` are the scores that its zeros are of. Returns the sparsity report: masked tensors,
    and others with zeros that nothing held.
    """
    write_more(directory)  # before the layers are plain again
    held = masks_of(model)  # not what fuse made of them: the files are verified against this
    if masked_layers(model):
        fuse(model)
    others = {n: m for n, m in zero_masks(model).items() if n not in held and is_matrix(n, m.shape)}
    report = {**masks.report({**held, **others}), **noted(chosen_by)}
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"{name}: holds a non-finite value; this model is not saved")
    write_model(model, tokenizer, directory)
    write_json(directory / "sparsity.json", report)
    verify(directory, report)
    return report


def verify(directory: Path, report: dict[str, Any]) -> None:
    """Check that the tensors in a directory have exactly the zeros of a sparsity report."""
    stated = report["tensors"]
    files = directory.glob("*.safetensors")
    found = {n: t != 0 for path in files for n, t in tensors(path) if n in stated}
    again = masks.report({name: found[name] for name in stated if name in found})
    for name, expected in stated.items():
        if (now := again["tensors"].get(name)) != expected:
            raise ModelError(f"{directory}: {name} has {now}, not {expected}")
    if again["fingerprint"] != report["fingerprint"]:
        raise ModelError(f"{directory}: the zeros are not where its sparsity.json says")


def model_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a model's safetensors files."""
    return one_digest({path.name: digest(path) for path in directory.glob("*.safetensors")})


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch: dropout is a function of (seed, step, rank), so a resume needs no state."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))
