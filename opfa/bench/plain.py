"""A pre-training step as one would write it with transformers, to compare with: fp32 weights that
autocast casts at every step, all logits at once, a hook that masks weights, and a fused AdamW.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opfa.compression.distill import hidden_loss, soft_loss
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Magnitude
from opfa.models.encoders import choose_accelerator
from opfa.models.pretraining import decay_groups, load_pretraining_model
from opfa.upstream.batches import Batch, masker, training_steps
from opfa.upstream.prepared import Prepared
from opfa.upstream.pretrain import order_of
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.student import DTYPES

IGNORED = -100  # the label of a token that is not predicted, torch's default


class Plain:
    """A recipe's step, without what the recipe's own trainer does to be fast."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        """Load what the recipe names."""
        self._device = torch.device(choose_accelerator())
        self._recipe, objective = recipe, recipe.corpus.objective
        assert recipe.model.init is not None, "the plain step starts from a model"
        student = load_pretraining_model(recipe.model.init, objective, recipe.training.dropout)
        self.student: Any = nn.Module.to(student, self._device).train()
        self._teacher: Any = None  # Any: transformers' outputs are of the head's own class
        if recipe.distillation is not None:
            teacher = load_pretraining_model(recipe.distillation.teacher, objective)
            self._teacher = nn.Module.to(teacher, self._device).eval().requires_grad_(False)
        for model in (self.student, self._teacher):
            if model is not None:
                model.set_attn_implementation("sdpa")  # transformers' default
        if recipe.pruning is not None:
            schedule = Gradual(end=0, target=recipe.pruning.schedule.target)
            pruner = Pruner(self.student, schedule, recipe.pruning.patterns, score=Magnitude())
            pruner.after_step(0)
            for name, mask in pruner.masks().items():
                layer = pruner.layers[name]
                layer.unmask()
                layer.register_forward_pre_hook(partial(_mask_weight, mask.to(layer.weight.dtype)))
        groups = decay_groups(self.student, recipe.training.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.training.learning_rate, fused=True)
        prepared = Prepared.open(Path(recipe.data), recipe.corpus)
        order = order_of(recipe, prepared.lengths(), rank=0, world_size=1)
        mask = masker(prepared.tokenizer, recipe.masking, recipe.seed)
        endless, workers = range(10**6), recipe.launch.workers  # more than will be asked for
        self._batches = training_steps(prepared, mask, order, steps=endless, workers=workers)

    def step(self) -> int:
        """One optimizer step; its real tokens."""
        batches = next(self._batches)
        for batch in batches:
            loss = self._loss(batch.to(self._device)) / len(batches)
            loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self._recipe.training.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sum(batch.counts()[1] for batch in batches)

    def _loss(self, batch: Batch) -> Tensor:
        settings = self._recipe.distillation
        labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
        labels.view(-1)[batch.predicted] = batch.labels
        targets = {"labels": labels}
        if self._recipe.corpus.objective == "mlm+nsp":
            targets["next_sentence_label"] = batch.next_sentence
        wants = {"output_hidden_states": bool(settings and settings.hidden_weight)}
        precision = self._recipe.training.precision
        is_cast = precision != "fp32"
        with torch.autocast(self._device.type, DTYPES[precision], enabled=is_cast):
            teacher = None
            if self._teacher is not None:
                with torch.no_grad():
                    teacher = self._teacher(**batch.inputs, **wants)
            student = self.student(**batch.inputs, **targets, **wants)
        if settings is None or teacher is None:
            return student.loss
        key = "logits" if "logits" in student else "prediction_logits"
        is_taught = labels != IGNORED
        if settings.tokens == "all":
            is_taught = batch.inputs.get("attention_mask", torch.ones_like(labels)).bool()
        ours, theirs = (
            functional.log_softmax(output[key].float() / settings.temperature, dim=-1)
            for output in (student, teacher)
        )
        distances = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        soft = distances[is_taught].mean() * settings.temperature**2
        if "seq_relationship_logits" in student:
            pair = student.seq_relationship_logits, teacher.seq_relationship_logits
            soft = soft + soft_loss(*pair, settings.temperature) / len(labels)
        loss = settings.hard_weight * student.loss + settings.soft_weight * soft
        if settings.hidden_weight:
            states = student.hidden_states, teacher.hidden_states
            distance = hidden_loss(*states, is_taught.flatten()) / is_taught.sum()
            loss = loss + settings.hidden_weight * distance
        return loss


def _mask_weight(mask: Tensor, layer: Any, _: Any) -> None:  # Any: a linear layer, and its inputs
    """Multiply a weight by its mask before each forward pass."""
    layer.weight.data.mul_(mask)
