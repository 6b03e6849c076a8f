"""Losses and retrieval scores of sentence-transformers, on vectors that are there already.

An optional extra: this file is imported when a recipe asks for one of them. It has the functions;
which one a task means is in `embeddings.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opfa.extras import importing

with importing("training embeddings, and scores of retrieval", "opfa[embeddings]"):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.losses import (
        CoSENTLoss,
        CosineSimilarityLoss,
        MultipleNegativesRankingLoss,
    )
    from sentence_transformers.util import cos_sim

MOST_SCORES = 1 << 26  # of queries with texts, at once: 256 MiB
NO_MODEL: Any = None  # Any: their classes ask for a model, which embeds texts; ours has done so


def loss(kind: str, vectors: Tensor, grades: Tensor, scale: float) -> Tensor:
    """The loss of a batch of pairs [B, 2, H], a scalar; `grades` [B] where its kind has any.

    cosent: log(1 + sum of exp(scale * (cos of a pair - cos of a pair with a higher grade)))
    (Huang et al., 2024); cosine: mean squared error of cosines; ranking: cross-entropy of
    scale * cos(first, all seconds of the batch) (Henderson et al., 2017, section 4.4).
    """
    pair = list(vectors.unbind(1))
    if kind == "cosine":
        return CosineSimilarityLoss(NO_MODEL).compute_loss_from_embeddings(pair, grades)
    losses = {"cosent": CoSENTLoss, "ranking": MultipleNegativesRankingLoss}
    return losses[kind](NO_MODEL, scale=scale).compute_loss_from_embeddings(pair, grades)


class _Embedded(InformationRetrievalEvaluator):
    """Its "texts" are rows of vectors."""

    vectors: Tensor  # [N, H]

    def embed_inputs(self, model: Any, sentences: Sequence[int], **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - theirs are texts
        return self.vectors[list(sentences)]


def retrieval(
    vectors: Tensor, texts: Sequence[str], pairs: Sequence[str], metrics: Sequence[str]
) -> dict[str, float]:
    """How well texts find what they are paired with, among the second texts of all pairs.

    `vectors` are [N, 2, H]. A text that stands in several pairs is one query with several answers.
    """
    queries, corpus = _first_rows(texts), _first_rows(pairs)
    relevant: dict[str, set[str]] = {str(row): set() for row in queries.values()}
    for text, pair in zip(texts, pairs, strict=True):
        relevant[str(queries[text])].add(str(corpus[pair]))
    asked = [metric.split("@") for metric in metrics]
    num_rows = len(vectors)
    evaluator = _Embedded(
        queries={str(row): row for row in queries.values()},  # pyright: ignore[reportArgumentType] - rows, for `embed_inputs`
        corpus={str(row): num_rows + row for row in corpus.values()},  # pyright: ignore[reportArgumentType]
        relevant_docs=relevant,
        corpus_chunk_size=max(1, MOST_SCORES // len(queries)),
        precision_recall_at_k=[int(k) for name, k in asked if name == "recall"] or [1],
        mrr_at_k=[int(k) for name, k in asked if name == "mrr"] or [1],
        ndcg_at_k=[1],
        accuracy_at_k=[1],
        map_at_k=[1],
        score_functions={"cosine": cos_sim},
    )
    evaluator.vectors = vectors.transpose(0, 1).flatten(0, 1)
    scores: Mapping[str, Any] = evaluator.compute_all_metrics(NO_MODEL)["cosine"]  # pyright: ignore[reportAssignmentType, reportArgumentType]
    return {f"{name}@{k}": float(scores[f"{name}@k"][int(k)]) for name, k in asked}


def _first_rows(texts: Sequence[str]) -> dict[str, int]:
    """Each text, and the row in which it stands first."""
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, row)
    return rows
