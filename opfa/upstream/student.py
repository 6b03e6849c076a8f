"""The student of an upstream run and its frozen teacher, checked against the recipe."""

import torch
from torch import nn
from transformers import PreTrainedModel

from opfa.errors import ModelError, RecipeError, blaming
from opfa.models.encoders import checkpoint_layers
from opfa.models.fit import check_fit
from opfa.models.pretraining import load_pretraining_model, new_pretraining_model
from opfa.sparsity import masks
from opfa.sparsity.layers import SPARSE_FROM, zero_masks
from opfa.training.sections import Pruning
from opfa.upstream.objective import Teacher
from opfa.upstream.prepared import Prepared
from opfa.upstream.recipe import PretrainRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_student(recipe: PretrainRecipe, prepared: Prepared) -> PreTrainedModel:
    """The student that a recipe names or describes, checked."""
    objective, dropout = recipe.corpus.objective, recipe.training.dropout
    torch.manual_seed(recipe.seed)  # new heads and models from scratch
    if recipe.model.init is not None:
        with blaming("model.init", recipe.model.init):
            student = load_pretraining_model(recipe.model.init, objective, dropout)
    else:
        assert (config := recipe.model.config) is not None
        student = new_pretraining_model(config, objective, prepared.tokenizer, dropout)
    tokens = recipe.corpus.sequence_tokens
    check_fit(student.config, prepared.tokenizer, tokens, "corpus.sequence_tokens")
    if recipe.pruning is None:
        _refuse_sparse(student, recipe.model.init)
    else:
        _refuse_heads(student, recipe.pruning)
    if recipe.training.gradient_checkpointing:
        checkpoint_layers(student)
    return student


def load_teacher(
    recipe: PretrainRecipe, student: PreTrainedModel, device: torch.device
) -> Teacher | None:
    """The teacher, in the precision of training; None without [distillation]."""
    settings = recipe.distillation
    if settings is None:
        return None
    objective, needs_head = recipe.corpus.objective, settings.soft_weight > 0
    with blaming("distillation.teacher", settings.teacher):
        model = load_pretraining_model(settings.teacher, objective, needs_head=needs_head)
    teacher = Teacher(model, student, settings)
    nn.Module.to(model, device)
    for parameter in model.parameters():  # and no buffer: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(DTYPES[recipe.training.precision])
    return teacher


def _refuse_heads(model: PreTrainedModel, pruning: Pruning) -> None:
    """Fine-tuning drops them, and the loss knows the vocabulary projection without its mask."""
    encoder = f"{model.base_model_prefix}."
    heads = [name for name in pruning.layers(model) if not name.startswith(encoder)]
    if heads:
        what = "which belongs to the head of pre-training; only the encoder can be pruned"
        key = "pruning.parts" if pruning.parts else "pruning.pattern"
        raise RecipeError(f"{key}: matches {heads[0]}, {what}")


def _refuse_sparse(model: PreTrainedModel, init: str | None) -> None:
    sparsity = masks.report(zero_masks(model))["total"]["sparsity"]
    if sparsity >= SPARSE_FROM:
        raise ModelError(
            f"model.init = {init!r}: {sparsity:.1%} of its pruned weights are zero, and a run "
            "without [pruning] would fill them; start from a dense model, or prune"
        )
