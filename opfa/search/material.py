"""What a search works on: the fine-tuned model, and three parts of its examples.

Some say what units are worth; candidates are judged by others, which are held out; and the front by
fresh ones at the end, which nothing has looked at before.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from transformers import PreTrainedModel

from opfa.data.order import generator
from opfa.downstream.evaluate import Ready
from opfa.errors import ModelError, RecipeError, RunError, blaming
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.removal import family_of
from opfa.models.skeleton import check_positions
from opfa.models.trained import ranges_of
from opfa.search.recipe import SearchRecipe
from opfa.tasks import kinds as tasks
from opfa.tasks.embeddings import settled
from opfa.tasks.features import Split
from opfa.tasks.recipe import Task

CPU = torch.device("cpu")  # where times are measured, and slices judged


@dataclass(frozen=True)
class Parts:
    """Which examples of a shuffle with the recipe's seed a part of the search sees."""

    training: slice
    held_out: slice
    fresh: slice
    source: Task  # of the last two
    is_training: bool

    @classmethod
    def of(cls, recipe: SearchRecipe, task: Task) -> Self:
        """As the recipe says. With data of its own the search leaves all training examples in."""
        search = recipe.search
        ends = search.held_out, search.held_out + search.fresh
        start = ends[1] if search.data is None else 0
        source = task
        if search.data is not None:
            source = task.model_copy(update={"validation": search.data})
        elif task.kind == "embedding" and task.train_form != task.validation_form:
            what = f"training examples are {task.train_form}, and {task.metrics[0]} needs"
            raise RecipeError(f"search.data: is needed: {what} {task.validation_form}")
        return cls(
            training=slice(start, start + search.examples),
            held_out=slice(0, ends[0]),
            fresh=slice(*ends),
            source=source,
            is_training=search.data is None,
        )


class Material:
    """A task and its examples, of which each part is read when it is asked for."""

    def __init__(self, recipe: SearchRecipe, name: str) -> None:
        """Of the fine-tuned model in a directory; raises `ModelError` for one in 8 bits, of another
        task or of a family whose heads aren't known.
        """
        with blaming("model.init", name):
            if ranges_of(name) is not None:
                raise ModelError(f"{name}: is in 8 bits already; give the model it was made of")
            self.config, self.tokenizer = load_config(name), load_tokenizer(name)
            self.task = settled(recipe.task, name)
            tasks.check_head(self.task, self.config)
        self.recipe, self.name = recipe, name
        self._parts = Parts.of(recipe, self.task)

    def load(self, classes: tuple[str, ...]) -> PreTrainedModel:
        """The model, in evaluation mode, without gradients."""
        with blaming("model.init", self.name):
            model = tasks.load_model(self.task, self.name, classes, is_trained=True)
            family_of(model)
            if (tokens := self.recipe.search.tokens) is not None:
                check_positions(model, model.config, tokens, "search.tokens")
        return model.eval().requires_grad_(False)

    @cached_property
    def training(self) -> Split:
        """The examples that say what units are worth."""
        return self._split(self.task, self._parts.training, is_training=True, exact=False)

    def everything(self) -> Split:
        """All training examples but those of the other two parts."""
        part = slice(self._parts.training.start, None)
        return self._split(self.task, part, is_training=True, exact=False)

    @cached_property
    def held_out(self) -> Split:
        """The examples that candidates are judged by."""
        return self._split(self._parts.source, self._parts.held_out, self._parts.is_training)

    @cached_property
    def fresh(self) -> Split:
        """Those that only the front is judged by."""
        return self._split(self._parts.source, self._parts.fresh, self._parts.is_training)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the examples of each part."""
        parts = {"training": self.training, "held_out": self.held_out, "fresh": self.fresh}
        return {name: split.examples.sha256() for name, split in parts.items()}

    def _split(self, task: Task, part: slice, is_training: bool, exact: bool = True) -> Split:
        def choose(num: int) -> list[int]:
            search = self.recipe.search
            least = part.stop if exact else part.start + 1
            if num < least:
                asked = f"{search.held_out:,} held-out and {search.fresh:,} fresh examples"
                where = "task.train" if search.data is None else "search.data"
                what = f"{asked} don't fit into the {num:,} of {where}"
                raise RunError(f"search.held_out, search.fresh: {what}; ask for fewer")
            return generator(self.recipe.seed).permutation(num)[part].tolist()

        return tasks.load_validation(
            task, self.tokenizer, self.config, choose, is_training=is_training
        )

    def ready(self, model: PreTrainedModel, training: Split, judged_by: Split) -> Ready:
        """The model with examples, as other parts of fine-tuning take it."""
        return Ready(
            recipe=self.recipe,
            task=self.task,
            tokenizer=self.tokenizer,
            model=model,
            device=CPU,
            training=training,
            validation=judged_by,
        )
