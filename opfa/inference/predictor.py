"""A finished model made ready to answer: which task it is for, its classes, and how it computes.

The task comes from the recipe of its run, else from its head. Whatever form the model has (a run, a
directory, compact, 8 bits, packed, ONNX, a Hub name), the answers are the same.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from opfa import runtime
from opfa.downstream.evaluate import load_ready, predict
from opfa.downstream.recipe import FinetuneRecipe, recipe_of
from opfa.errors import ModelError, RunError, opening
from opfa.hub.cache import downloaded
from opfa.hub.place import place_of
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.encoders import has_head, skeleton
from opfa.models.fit import fit_padding
from opfa.models.sentences import is_sentence_encoder, read_tokens
from opfa.models.skeleton import num_positions
from opfa.storage.foreign import CONFIG, PACKED, check_weights
from opfa.storage.runs import RECIPE
from opfa.tasks import classes as classing
from opfa.tasks import kinds as tasks
from opfa.tasks.embeddings import settled
from opfa.tasks.features import Batch, check_language
from opfa.tasks.kinds import KINDS
from opfa.tasks.predictions import Prediction
from opfa.tasks.recipe import METRICS, Task
from opfa.tasks.unlabelled import Chunk, Numbered, chunks, kind_of
from opfa.weights.sources import directory_of

ONNX = ".onnx"
MOST_TOKENS = 512  # without a recipe, where a model could take more
WINDOW_TOKENS, STRIDE_TOKENS = 384, 128  # of questions without a recipe, as for SQuAD
EMBEDDING = "embedding"
COLUMNS: dict[str, dict[str, Any]] = {  # without a recipe, as public data sets call them
    "question-answering": {"text": "question", "text_pair": "context"},
    "token-classification": {"text": "tokens"},
    "multiple-choice": {"choices": ["choices"]},
    EMBEDDING: {"text_pair": "other"},  # a task has one, to measure on; nothing else asks for it
}
NO_NAME = re.compile(r"LABEL_\d+")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user says of the task; None and () leave it to the recipe and the model."""

    kind: str | None = None
    text: str | None = None
    text_pair: str | None = None
    choices: Sequence[str] = ()
    recipe: Path | None = None
    tokenizer: str | None = None
    sequence_tokens: int | None = None
    batch: int = 64

    def of_task(self) -> dict[str, Any]:
        """What is said of the task's own keys."""
        names = ("kind", "text", "text_pair", "choices", "sequence_tokens")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value}


class Predictor:
    """A model with its tokenizer and task; `answers` may be called any number of times."""

    def __init__(self, name: str, options: Options) -> None:
        """Load a model by a path, a run or a Hub name; what doesn't fit raises `OpfaError`."""
        if options.batch < 1:
            raise RunError(f"batch = {options.batch}: must be 1 or more")
        name = place_of(name)
        is_onnx = Path(name).suffix == ONNX and not Path(name).is_dir()
        beside = _beside(Path(name), options.tokenizer) if is_onnx else name
        config = load_config(beside)
        self.tokenizer = load_tokenizer(options.tokenizer or beside)
        self.task = _task(beside, config, self.tokenizer, options)
        tasks.check_head(self.task, config)
        key = "task.sequence_tokens" if options.sequence_tokens is None else "--sequence-tokens"
        fit_padding(config, self.tokenizer, self.task.sequence_tokens, key)
        self.classes = _classes(self.task, config, beside)
        self._batch, self._device = options.batch, torch.device("cpu")
        self._model: nn.Module
        if is_onnx:
            self._model = _onnx(Path(name), self.task, self.tokenizer, self.classes)
            self.runs_in = "ONNX Runtime"
        elif (directory_of(name) / PACKED).is_file():
            packed = runtime.load(name)
            self.runs_in = runtime.runs_in(packed)
            self._model = packed.base_model if self.task.kind == EMBEDDING else packed
        else:
            self._model, self._device = load_ready(self.task, name, self.classes)
            is_cpu = self._device.type == "cpu"
            self.runs_in = runtime.speed_up(self._model) if is_cpu else str(self._device)

    def answers(
        self,
        source: str,
        rows: Numbered,
        advance: Callable[[float], object],
        *,
        is_language_checked: bool = True,
    ) -> Iterator[tuple[Chunk, Sequence[Prediction]]]:
        """Chunks of rows with their predictions, in order; `advance` hears of examples done. Where
        the language is checked, texts that the tokenizer doesn't know get a warning.
        """
        for index, chunk in enumerate(
            chunks(self.task, self.tokenizer, self.classes, source, rows)
        ):
            if index == 0 and is_language_checked:
                check_language(self.task, self.tokenizer, chunk.split.examples)

            def watch(batches: DataLoader, num_rows: int = len(chunk.rows)) -> Iterator[Batch]:
                for batch in batches:
                    yield batch
                    advance(num_rows / len(batches))

            options: dict[str, Any] = {"batch": self._batch, "device": self._device}
            logits = predict(self._model, self.task, chunk.split, watch=watch, **options)
            yield chunk, KINDS[self.task.kind].answers(self.task, logits, chunk.split)


def _beside(file: Path, tokenizer: str | None) -> str:
    """Where the configuration of an ONNX file is."""
    check_weights(file)
    if (file.parent / CONFIG).is_file():
        return str(file.parent)
    if tokenizer is None:
        what = f"has no {CONFIG} beside it; --tokenizer names a model that has it"
        raise ModelError(f"{file}: {what}")
    return tokenizer


def _task(
    name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, options: Options
) -> Task:
    """The task of the recipe, or of the model's head, with what a user says of it."""
    found, given = _task_of_recipe(name, options.recipe), options.of_task()
    kind = options.kind or (_kind(name, config) if found is None else found.kind)
    if kind not in KINDS:
        raise RunError(f"--kind {kind}: known are {', '.join(KINDS)}")
    if found is None or found.kind != kind:
        values = _defaults(name, kind, config, tokenizer)
    else:
        values = found.model_dump(mode="json")
    try:
        task = Task.model_validate_json(json.dumps(values | given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise RunError(f"{name}: {where and f'{where}: '}{said}") from None
    if task.kind == EMBEDDING:  # of single texts, unless two columns are asked for
        task = task.model_copy(update={"text_pair": options.text_pair})
    return settled(task, name)


def _kind(name: str, config: PretrainedConfig) -> str:
    """The kind of task that a model without a recipe is for."""
    if is_sentence_encoder(name, config):
        return EMBEDDING
    try:
        return kind_of(config)
    except ModelError as error:
        way = "" if has_head(config) else "; or --kind embedding: a vector for each text"
        raise ModelError(f"{name}: {error}{way}") from None


def _task_of_recipe(name: str, given: Path | None) -> Task | None:
    """The task of a given recipe, or of the one that a run or release has; None without any."""
    if given is not None:
        return FinetuneRecipe.read(given).task
    place = name if Path(name).is_dir() else str(downloaded(name, [RECIPE]))
    found = recipe_of(place)
    return None if found is None else found.task


def _defaults(
    name: str, kind: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The task of a model without a recipe."""
    positions = num_positions(skeleton(config), config)
    most = min(tokenizer.model_max_length, MOST_TOKENS)
    if kind == EMBEDDING:  # as sentence-transformers cuts, so that the vectors are the same
        most = read_tokens(name) or min(tokenizer.model_max_length, positions or MOST_TOKENS)
    tokens = min(most, positions or most)
    values = {"kind": kind, "text": "text", "metrics": METRICS[kind][:1], "sequence_tokens": tokens}
    if kind == "question-answering":
        tokens = min(tokens, WINDOW_TOKENS)
        values |= {"sequence_tokens": tokens, "stride_tokens": min(tokens // 3, STRIDE_TOKENS)}
    return values | COLUMNS.get(kind, {})


def _classes(task: Task, config: PretrainedConfig, name: str) -> tuple[str, ...]:
    """Names of classes in the order of the model; a warning where it has none."""
    if not KINDS[task.kind].has_classes:
        return ()
    found = classing.of_model(config, task.classes)
    if all(map(NO_NAME.fullmatch, found)):
        what = "its config.json names no classes (id2label), so they are called"
        log.warning("%s: %s %s; task.classes of a --recipe names them", name, what, found)
    return found


def _onnx(
    file: Path, task: Task, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str]
) -> nn.Module:
    """An ONNX file in ONNX Runtime, tried out on one word."""
    from opfa.inference.parity import OnnxModel  # an optional extra

    with opening(file, ModelError, "can't be read by ONNX Runtime"):
        model = OnnxModel(file)
    inputs: dict[str, Tensor] = dict(tokenizer("word", return_tensors="pt"))
    if task.kind == "multiple-choice":
        inputs = {name: tensor[None].expand(1, 2, -1) for name, tensor in inputs.items()}
    if missing := [name for name in model.names if name not in inputs]:
        what = f"asks for {missing[0]}, which its tokenizer doesn't give"
        raise ModelError(f"{file}: {what} ({', '.join(inputs)})")
    with opening(file, ModelError, "can't compute"):
        outputs = model(**inputs)
    wanted = KINDS[task.kind].outputs
    if missing := [name for name in wanted if name not in outputs]:
        there = ", ".join(outputs)
        raise ModelError(f"{file}: has no output {missing[0]} for {task.kind}; there are {there}")
    num = outputs[wanted[0]].shape[-1]
    if classes and num != len(classes):
        what = f"has {num} classes, and the {CONFIG} beside it names {len(classes)}"
        raise ModelError(f"{file}: {what}")
    return model
