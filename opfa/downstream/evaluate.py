"""What a model predicts on a split, and what that is worth."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.data.order import generator
from opfa.downstream.recipe import FinetuneRecipe
from opfa.downstream.results import EvaluateResult
from opfa.errors import ModelError
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.encoders import choose_accelerator
from opfa.models.trained import as_trained, ranges_of
from opfa.sparsity.chosen import Chosen
from opfa.storage import seal
from opfa.storage.files import write_text
from opfa.storage.runs import RECIPE
from opfa.tasks import kinds as tasks
from opfa.tasks.embeddings import settled
from opfa.tasks.features import Batch, Split, num_tokens
from opfa.tasks.kinds import KINDS, logits_of
from opfa.tasks.recipe import Task
from opfa.training.checkpoint import fill_finished
from opfa.training.finished import changed_model
from opfa.weights.inspection import check_stated
from opfa.weights.sources import directory_of

Watch = Callable[[DataLoader], Iterable[Batch]]  # takes all batches and hands them on
log = logging.getLogger(__name__)


def evaluate(
    model: nn.Module, task: Task, split: Split, *, batch: int, device: torch.device | str
) -> dict[str, float]:
    """The task's metrics, in the order of the recipe. The model's mode stays as it was."""
    return score(task, predict(model, task, split, batch=batch, device=device), split)


def evaluate_splits(
    metrics_of: Callable[[Split], Mapping[str, float]], validation: Split, more: Mapping[str, Split]
) -> dict[str, float]:
    """The metrics of the validation split, and those of more splits as split_metric."""
    metrics = dict(metrics_of(validation))
    for name, split in more.items():
        metrics |= {f"{name}_{metric}": value for metric, value in metrics_of(split).items()}
    return metrics


def score(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """The task's metrics of logits, in the order of the recipe."""
    return KINDS[task.kind].score(task, logits, split)


def predictions(task: Task, logits: tuple[Tensor, ...], split: Split) -> list[dict[str, Any]]:
    """Each example's label and answer: a class, a number, a choice's index, tags, or a text."""
    labels = split.examples.labels
    if task.kind == "classification":
        labels = [split.classes[index] for index in split.features["labels"]]
    answers = KINDS[task.kind].answers(task, logits, split)
    rows = zip(answers, labels, strict=True)
    return [{"prediction": answer.prediction, "label": label} for answer, label in rows]


def predict(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    batch: int,
    device: torch.device | str,
    watch: Watch = iter,
) -> tuple[Tensor, ...]:
    """Logits of each feature, in order, fp32 on the CPU; -inf beyond the longest of its batch.

    `watch` sees each batch before the model does, as a progress bar wants to.
    """
    # The longest come first: little is padded, and memory runs out at once or never.
    lengths = [num_tokens(ids) for ids in split.features["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    loader = DataLoader(
        Subset(split.features, order),
        batch_size=batch,
        collate_fn=split.collate,
    )
    was_training = model.training
    model.eval()
    batches = []
    with torch.no_grad():
        for tensors in watch(loader):
            placed = {name: tensor.to(device) for name, tensor in tensors.items()}
            logits = logits_of(task, tasks.call(task, model, placed))
            batches.append([tensor.float().cpu() for tensor in logits])
    model.train(was_training)
    places = torch.tensor(order).argsort()
    return tuple(_stack(tensors)[places] for tensors in zip(*batches, strict=True))


def _stack(batches: tuple[Tensor, ...]) -> Tensor:
    """One tensor from batches [B, T, ...] that may differ in tokens."""
    width = max(tensor.shape[1] for tensor in batches)
    missing = [(0, 0) * (t.ndim - 2) + (0, width - t.shape[1]) for t in batches]
    return torch.cat([pad(*pair, value=-torch.inf) for pair in zip(batches, missing, strict=True)])


def evaluate_model(
    name: str, recipe: FinetuneRecipe, answers: Path | None = None
) -> EvaluateResult:
    """What `measure` finds, for a model that is what its sparsity.json says."""
    tasks.check_head(recipe.task, load_config(name))
    check_stated(name)
    if changed := changed_model(directory_of(name)):
        log.warning("%s: is not what its run wrote: %s", name, changed)
    found = measure(name, recipe, answers)
    return EvaluateResult(
        model=Path(name),
        predictions=answers,
        task=recipe.name,
        metrics=found.metrics,
        quantized=found.is_quantized,
        model_files_sha256=seal.one_digest(seal.model_files(directory_of(name))),
        examples_sha256=found.examples_sha256,
    )


def load_ready(
    task: Task, name: str, classes: Sequence[str]
) -> tuple[PreTrainedModel, torch.device]:
    """A finished model that computes as it was trained, also in 8 bits; and where it is."""
    model = tasks.load_model(task, name, classes, is_trained=True)
    as_trained(model, name)
    device = torch.device(choose_accelerator())
    nn.Module.to(model, device)
    return model, device


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A fine-tuned model in evaluation mode, and examples of its task."""

    recipe: FinetuneRecipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    device: torch.device
    training: Split  # the first of a shuffle with the recipe's seed
    validation: Split

    @classmethod
    def load(cls, name: str, recipe: FinetuneRecipe, num_examples: int) -> Self:
        """With at most so many training examples; raises `ModelError` for a model in 8 bits."""
        if ranges_of(name) is not None:
            raise ModelError(f"{name}: is in 8 bits already; give the model that it was made of")
        config, tokenizer = load_config(name), load_tokenizer(name)
        task = settled(recipe.task, name)
        tasks.check_head(task, config)
        validation = tasks.load_validation(task, tokenizer, config)
        shuffled = generator(recipe.seed).permutation
        training = tasks.load_validation(
            task,
            tokenizer,
            config,
            lambda num: shuffled(num)[:num_examples].tolist(),
            is_training=True,
        )
        model = tasks.load_model(task, name, validation.classes, is_trained=True)
        device = torch.device(choose_accelerator())
        nn.Module.to(model.eval(), device)
        return cls(
            recipe=recipe,
            task=task,
            tokenizer=tokenizer,
            model=model,
            device=device,
            training=training,
            validation=validation,
        )

    def evaluate(self, model: nn.Module | None = None) -> dict[str, float]:
        """The metrics of the model, or of another one, on the validation split."""
        measured = self.model if model is None else model
        return evaluate(measured, self.task, self.validation, batch=64, device=self.device)

    def write(
        self,
        model: PreTrainedModel,
        directory: Path,
        write_more: Callable[[Path], None] = lambda _: None,
        chosen_by: Iterable[Chosen] = (),
    ) -> dict[str, Any]:
        """Fill an empty directory with what was made of the model; returns its sparsity report."""
        tasks.write_more(self.task, model, directory)
        report = fill_finished(model.cpu(), self.tokenizer, directory, write_more, chosen_by)
        recipe = self.recipe.to_public_toml()  # how other commands read its inputs
        write_text(directory / RECIPE, recipe)
        return report


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a finished model is worth."""

    metrics: dict[str, float]
    is_quantized: bool
    examples_sha256: str  # of the first validation split


def measure(name: str, recipe: FinetuneRecipe, answers: Path | None = None) -> Measured:
    """A finished model's metrics on all splits; `answers` gets `predictions` on the first."""
    config, tokenizer = load_config(name), load_tokenizer(name)
    task = settled(recipe.task, name)
    validation = tasks.load_validation(task, tokenizer, config)
    more = {
        key: tasks.load_validation(task.model_copy(update={"validation": split}), tokenizer, config)
        for key, split in task.more_validation.items()
    }
    model, device = load_ready(task, name, validation.classes)

    def metrics_of(split: Split) -> dict[str, float]:
        logits = predict(model, task, split, batch=64, device=device)
        if answers is not None and split is validation:
            rows = predictions(task, logits, split)
            write_text(answers, "".join(f"{json.dumps(row)}\n" for row in rows))
        return score(task, logits, split)

    return Measured(
        metrics=evaluate_splits(metrics_of, validation, more),
        is_quantized=ranges_of(name) is not None,
        examples_sha256=validation.examples.sha256(),
    )
