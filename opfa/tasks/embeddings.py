"""Embeddings: texts -> vectors, and what pairs of vectors are worth.

Batches are [examples, texts, tokens], where an example has two texts, or one for a teacher alone.
The encoder sees each text by itself. Vectors are [examples, texts, H].
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from opfa.models.sentences import VECTOR, Pooling, read_pooling
from opfa.tasks.features import Batch, Split
from opfa.tasks.predictions import NumberPrediction, Prediction, VectorPrediction
from opfa.tasks.recipe import RETRIEVAL, Task
from opfa.tasks.scores import correlations

SCALE = 20.0  # sentence-transformers' own
log = logging.getLogger(__name__)


def settled(task: Task, name: str, *, is_own: bool = False) -> Task:
    """A task whose pooling is known: the recipe's, the model's own, or the default.

    With `is_own` what the recipe says doesn't count. Other kinds of tasks stay as they are.
    """
    if task.kind != "embedding":
        return task
    found = read_pooling(name)
    if found is None:
        found = Pooling()
        log.info("%s: has no sentence-transformers files; mean of tokens, length 1", name)
    own = {"pooling": found.mode, "normalize": found.is_normalized}
    said = {key: value for key in own if (value := getattr(task, key)) is not None}
    return task.model_copy(update=own if is_own else own | said)


def pooling_of(task: Task) -> Pooling:
    """The pooling of a settled task."""
    assert task.pooling is not None and task.normalize is not None, "`settled` knows them"
    return Pooling(task.pooling, task.normalize)


def call(task: Task, model: Callable[..., Any], inputs: Batch, **options: Any) -> Any:
    """A model's outputs, and vectors [examples, texts, H] among them; an ONNX file has them."""
    shape = inputs["input_ids"].shape[:-1]
    flat = {name: tensor.flatten(0, -2) for name, tensor in inputs.items()}
    outputs = model(**flat, **options)
    if VECTOR not in outputs:
        mask = flat["attention_mask"]
        outputs[VECTOR] = pooling_of(task)(outputs["last_hidden_state"], mask)
    outputs[VECTOR] = outputs[VECTOR].unflatten(0, shape)
    return outputs


def check_library(task: Task, *, is_training: bool) -> None:
    """Raise `RunError` where sentence-transformers is needed and missing."""
    needs_loss = is_training and task.loss != "teacher"
    if task.kind == "embedding" and (needs_loss or set(task.metrics) & set(RETRIEVAL)):
        import_module("opfa.tasks.sentences")


def loss(task: Task, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The loss of pairs; 0 where there is nothing but a teacher to learn from."""
    vectors = outputs[VECTOR]
    if task.loss == "teacher":
        return vectors.new_zeros(())
    from opfa.tasks import sentences  # an optional extra

    grades = batch["labels"].to(vectors.dtype) / (task.highest_grade or 1.0)
    return sentences.loss(task.loss or "cosent", vectors, grades, task.scale or SCALE)


def answers(_: Task, logits: tuple[Tensor, ...], split: Split) -> Sequence[Prediction]:
    """The vector of each text, or how similar the two texts of a pair are: their cosine."""
    vectors = logits[0]
    if split.examples.pairs is None:
        return [VectorPrediction(prediction=vector) for vector in vectors[:, 0].tolist()]
    return [NumberPrediction(prediction=cosine) for cosine in _cosines(vectors).tolist()]


def _cosines(vectors: Tensor) -> Tensor:
    return cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)


def score(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """Correlations of cosines with grades, or how well a text finds the other of its pair."""
    if set(task.metrics) & set(RETRIEVAL):
        from opfa.tasks import sentences  # an optional extra

        examples = split.examples
        assert examples.pairs is not None, "the recipe asks for text_pair"
        return sentences.retrieval(logits[0], examples.texts, examples.pairs, task.metrics)
    return correlations(task, _cosines(logits[0]).numpy(), split)
