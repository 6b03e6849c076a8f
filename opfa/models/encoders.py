"""Encoders through plain transformers classes: loaded in fp32, with a task's head, and saved."""

import copy
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from opfa.errors import ModelError
from opfa.models.configs import checked_directory, load_config, loading, quiet_transformers
from opfa.models.skeleton import MOST_TENSORS, try_out, without_memory
from opfa.sparsity.anatomy import problem_of_storage
from opfa.weights.sources import open_source

FEW_TOKENS = 5  # that a model is tried out with
SPARE_WEIGHTS = 1 << 24  # beyond those in the files: a new head, and little memory in any case
SPARE_TENSORS = 1_000
HEADS: dict[str, Any] = {  # Any: Auto classes share no base
    "SequenceClassification": transformers.AutoModelForSequenceClassification,
    "QuestionAnswering": transformers.AutoModelForQuestionAnswering,
    "TokenClassification": transformers.AutoModelForTokenClassification,
    "MultipleChoice": transformers.AutoModelForMultipleChoice,
}

ENCODER: Any = AutoModel  # no head: hidden states


def has_head(config: PretrainedConfig) -> bool:
    """Whether a checkpoint was saved with one of `HEADS`."""
    return any(name.endswith(f"For{h}") for name in config.architectures or () for h in HEADS)


def head_of(config: PretrainedConfig, name: str = "") -> str:
    """Which of `HEADS` a checkpoint was saved with; raises `ModelError` when it is none, which
    begins with its `name`, if one is given.
    """
    made_for = ", ".join(config.architectures or ("nothing",))
    for head in HEADS:
        if made_for.endswith(f"For{head}"):
            return head
    what = f"has no head of a task; fine-tune it first (heads: {', '.join(HEADS)})"
    raise ModelError(f"{name and f'{name}: '}a model for {made_for} {what}")


def load_weights(
    cls: Any, name: str, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A model in one of transformers' classes, fp32, and the tensors that its files lack or have in
    another shape. Without memory it is checked first that it isn't much larger than its files.
    """
    directory = checked_directory("model", name, with_weights=True)
    with loading("model", name):
        stored = dict(open_source(str(directory)).tensors(lambda *_: False))  # shapes are enough
        size = sum(tensor.numel() for tensor in stored.values())
        with without_memory(SPARE_TENSORS + 4 * len(stored), SPARE_WEIGHTS + 2 * size):
            encoder = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
        for key, parameter in encoder.named_parameters():
            found = stored.get(key, stored.get(f"{encoder.base_model_prefix}.{key}"))
            if found is not None and found.shape != parameter.shape:
                said = f"its configuration says {list(parameter.shape)}"
                raise ValueError(f"{key} is {list(found.shape)}, {said}")
        options |= {"dtype": torch.float32, "trust_remote_code": False}
        model, info = cls.from_pretrained(directory, output_loading_info=True, **options)
    for problem in filter(None, map(problem_of_storage, sorted(info["unexpected_keys"]))):
        raise ModelError(f"model {name!r}: {problem}")
    changed = (key for key, *_ in info["mismatched_keys"])
    return model, sorted({*info["missing_keys"], *changed})


def load_finetuned_model(name: str, *, is_encoder: bool = False) -> PreTrainedModel:
    """A model with the head that it was saved with, or the encoder alone; fp32, for evaluation."""
    config = load_config(name)
    head = "" if is_encoder else head_of(config, name)
    cls = ENCODER if is_encoder else HEADS[head]
    model, missing = load_weights(cls, name, config, attn_implementation="eager")
    if missing := of_encoder(model, missing) if is_encoder else missing:
        raise ModelError(f"model {name!r}: {missing[0]} is missing")
    try_out(model, name, (1, 2, FEW_TOKENS) if head == "MultipleChoice" else (1, FEW_TOKENS))
    return model.eval()


def skeleton(
    config: PretrainedConfig, cls: Any = AutoModel, *, most_tensors: int = MOST_TENSORS
) -> PreTrainedModel:
    """A model, by default a bare encoder, that has shapes and no memory."""
    name = config.name_or_path or config.model_type
    with loading("model", name), without_memory(most_tensors):
        return cls.from_config(copy.deepcopy(config), trust_remote_code=False)


def of_encoder(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The tensors that belong to the encoder, not to a head or pooler; they are never made anew."""
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    return [n for n in names if n.startswith(encoder) and ".pooler." not in f".{n}"]


def choose_accelerator() -> str:
    """Where to compute, "cuda" or "cpu". Called before a model is saved, too: there transformers
    imports DeepSpeed, which would say on stdout that it had to guess.
    """
    if torch.cuda.is_available():
        # Hopper's default attention plans anew for each shape, and batches have many lengths.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return "cuda"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"


def checkpoint_layers(model: nn.Module) -> None:
    """Keep each layer's input alone for the backward pass, and compute the layer again there, with
    the same dropout (Chen et al., 2016, Training Deep Nets with Sublinear Memory Cost).

    Only layers are told so: transformers' own switch on the model also warns of caches, which
    encoders have none of. Raises `ModelError` for a family that can't.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError("training.gradient_checkpointing = true: this family of models has none")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Save in plain transformers form."""
    save_model(model, directory)
    tokenizer.save_pretrained(directory)


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """`write_model` without a tokenizer."""
    choose_accelerator()
    with quiet_transformers():
        model.save_pretrained(directory)
