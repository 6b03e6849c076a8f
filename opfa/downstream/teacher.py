"""The dense teacher of a fine-tuning: a frozen model of any family with the student's tokenizer.

    soft = T^2 * KL(teacher || student), over classes, choices, tags, or an answer's start and end
    hidden = squared distance of hidden states

Numbers and vectors have no distribution: there soft is their mean squared error.

README.md says why the logits are kept in a file.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.compression.distill import hidden_loss, soft_loss
from opfa.downstream.evaluate import predict
from opfa.downstream.recipe import Distillation
from opfa.errors import ModelError, RunError, blaming, opening
from opfa.models.configs import load_tokenizer
from opfa.models.fit import fit_tokenizer
from opfa.storage.files import new_file
from opfa.storage.seal import SEAL
from opfa.tasks.batches import in_context, is_target
from opfa.tasks.embeddings import settled
from opfa.tasks.features import Batch, Split
from opfa.tasks.kinds import call, load_model, logits_of
from opfa.tasks.recipe import Task
from opfa.training.loop import Concern, Progress

FILE = "teacher.safetensors"  # its logits, while a run lasts
PER_TOKEN = ("question-answering", "token-classification")  # logits [B, T] and [B, T, C]
MATCHED = ("regression", "embedding")  # numbers have no distribution: their squared error
PROBE = "Naïve ÜNITS: 3.5 coats, don't they?"
Precision = Callable[[], contextlib.AbstractContextManager]
log = logging.getLogger(__name__)


class Teacher:
    """A teacher for one student and one task."""

    def __init__(
        self,
        settings: Distillation,
        task: Task,
        classes: Sequence[str],
        student: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Load it. Raises `ModelError` unless tokenizer, classes and sizes fit the student's."""
        self.settings = settings
        with blaming("distillation.teacher", settings.teacher):
            self.task = settled(task, settings.teacher, is_own=True)
            _check_lengths(settings.teacher, self.task, task)
            self.model = load_model(task, settings.teacher, classes, is_trained=True)
            theirs = load_tokenizer(settings.teacher)
        self.device = student.device
        nn.Module.to(self.model, self.device)
        self.model.eval().requires_grad_(False)
        self._kept: tuple[Tensor, ...] | None = None
        fit_tokenizer(self.model.config, theirs, task.sequence_tokens)
        _check_tokenizer(settings.teacher, theirs, tokenizer)
        ours, theirs = student.config.hidden_size, self.model.config.hidden_size
        if task.kind == "embedding" and ours != theirs:
            what = f"its vectors have {theirs} numbers, the student's {ours}"
            raise ModelError(f"distillation.teacher = {settings.teacher!r}: {what}")
        if settings.hidden_weight and ours != theirs:
            raise ModelError(
                f"distillation.hidden_weight = {settings.hidden_weight}: the teacher's hidden "
                f"size is {theirs}, the student's {ours}; 0 leaves hidden states out"
            )

    def remember(self, split: Split, path: Path, precision: Precision) -> None:
        """Compute the logits of a whole split, or take those that an earlier launch left."""
        if self.settings.hidden_weight or not (self.settings.cache and self.settings.soft_weight):
            return
        kept = _read(path)
        if kept is None:
            log.info("teacher: computing its logits of %d sequences", len(split.features))
            with precision():
                logits = predict(self.model, self.task, split, batch=64, device=self.device)
            kept = tuple(tensor.contiguous() for tensor in logits)
            with new_file(path) as work:
                named = {str(i): tensor for i, tensor in enumerate(kept)}
                save_file(named, work, {SEAL: _digest(kept)})
        self._kept = kept
        nn.Module.to(self.model, "cpu")  # its memory is the student's now

    def losses(
        self, outputs: Any, batch: Batch, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor | float]:
        """Mean soft loss over targets, and summed hidden loss over tokens, of these features."""
        targets, states = self._targets(batch, indices)
        soft = soft_mean(self.task, outputs, targets, batch, self.settings.temperature)
        if not self.settings.hidden_weight:
            return soft, 0.0
        kept = batch["attention_mask"].bool().flatten(0, -2)
        return soft, hidden_loss(outputs.hidden_states, states, kept.flatten())

    @torch.no_grad()
    def _targets(self, batch: Batch, indices: Sequence[int]) -> tuple[list[Tensor], Any]:
        """Logits, and hidden states if they count."""
        states = ()
        if self._kept is None:
            wants_states = bool(self.settings.hidden_weight)
            outputs = call(self.task, self.model, batch, output_hidden_states=wants_states)
            logits = list(logits_of(self.task, outputs))
            states = outputs.hidden_states if wants_states else ()
        else:
            logits = [tensor[list(indices)].to(self.device) for tensor in self._kept]
        if self.task.kind in PER_TOKEN:
            logits = [tensor[:, : batch["input_ids"].shape[1]] for tensor in logits]
        return in_context(self.task, logits, batch), states


def soft_mean(
    task: Task, outputs: Any, targets: Sequence[Tensor], batch: Batch, temperature: float
) -> Tensor:
    """Mean loss over targets of a model's outputs, when it learns these logits, which are
    `in_context`.
    """
    logits = in_context(task, logits_of(task, outputs), batch)
    pairs = zip(logits, targets, strict=True)
    if task.kind in MATCHED:
        losses = [mse_loss(ours, theirs) for ours, theirs in pairs]
    else:
        rows = is_target(batch)
        num_rows = rows.sum().clamp(min=1)
        losses = [soft_loss(s[rows], t[rows], temperature) / num_rows for s, t in pairs]
    return torch.stack(losses).mean()


@dataclass
class Remembering(Concern):
    """Lets a teacher compute its logits of the training examples once, before the first step."""

    teacher: Teacher
    split: Split
    precision: Precision

    def begin(self, at: Progress) -> None:
        """Compute them, or read what an earlier launch left."""
        self.teacher.remember(self.split, at.run.directory / FILE, self.precision)


def _read(path: Path) -> tuple[Tensor, ...] | None:
    """The logits that an earlier launch left; None where there are none, or damaged ones."""
    if not path.exists():
        return None
    try:
        with opening(path, RunError), safe_open(path, "pt") as file:
            names = sorted(file.keys(), key=int)
            kept = tuple(file.get_tensor(name) for name in names)
            if (file.metadata() or {}).get(SEAL) != _digest(kept):
                raise RunError(f"{path}: is damaged")
    except RunError as error:
        log.warning("%s; computing them again", error)
        return None
    return kept


def _digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_lengths(teacher: str, theirs: Task, ours: Task) -> None:
    """Vectors of length 1 can't become others."""
    if theirs.normalize != ours.normalize:
        does = "does not normalize its vectors" if ours.normalize else "normalizes its vectors"
        advice = f"task.normalize = {str(theirs.normalize).lower()} fits"
        raise ModelError(f"distillation.teacher = {teacher!r}: {does}; {advice}")


def _check_tokenizer(
    teacher: str, theirs: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours, vocabulary = tokenizer.get_vocab(), theirs.get_vocab()
    different = [token for token, index in ours.items() if vocabulary.get(token) != index]
    if different or len(ours) != len(vocabulary):
        first = f", such as {different[0]!r}" if different else ""
        raise ModelError(
            f"distillation.teacher = {teacher!r}: has another tokenizer than the student "
            f"({len(vocabulary)} entries, {len(ours)}; {len(different)} differ{first})"
        )
    pairs = [dict(tokens(PROBE, PROBE, verbose=False)) for tokens in (theirs, tokenizer)]
    if set(pairs[0]) != set(pairs[1]):
        raise ModelError(
            f"distillation.teacher = {teacher!r}: its tokenizer gives {', '.join(pairs[0])}; the "
            f"student's gives {', '.join(pairs[1])}"
        )
    cuts = [pair["input_ids"] for pair in pairs]
    if cuts[0] != cuts[1]:
        raise ModelError(
            f"distillation.teacher = {teacher!r}: its tokenizer has the student's vocabulary and "
            f"cuts text in another way ({PROBE!r}: {cuts[0]}, student's {cuts[1]}); does one keep "
            "capitals?"
        )
