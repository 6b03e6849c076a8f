"""Embeddings: losses and scores against formulas and those of sentence-transformers; bad input."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import BertConfig, BertModel, BertTokenizer

from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import DataError, ModelError, RecipeError, RunError
from opfa.models import sentences as files
from opfa.models.sentences import Pooling, read_pooling, write_pooling
from opfa.tasks import embeddings, sentences
from opfa.tasks import kinds as tasks
from opfa.tasks.recipe import Task

CONFIG: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
CONFIG |= {"intermediate_size": 8, "max_position_embeddings": 16, "vocab_size": 100}
ROWS = [
    {"a": "the cat sees", "b": "a dog", "grade": 1.0},
    {"a": "the cat", "b": "the cat sees", "grade": 4.0},
    {"a": "a dog", "b": "the sea", "grade": 2.5},
]


def task_of(**values: Any) -> Task:
    columns = {"text": "a", "text_pair": "b", "label": "grade", "metrics": ["spearman"]}
    values = {"kind": "embedding", "sequence_tokens": 16, **columns, **values}
    return Task.model_validate_json(json.dumps(values))


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vectors_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def loss(vectors: Tensor, grades: Tensor, **values: Any) -> float:
    batch = {"labels": grades}
    outputs = {files.VECTOR: vectors}
    return tasks.task_loss(task_of(**values), outputs, batch).item()


def test_the_losses_are_what_they_say() -> None:
    vectors, grades = vectors_of((4, 2, 8)), torch.tensor([1.0, 4.0, 4.0, 2.0])
    cosines = cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
    terms = [
        torch.exp(20 * (cosines[k] - cosines[i]))
        for i in range(4)
        for k in range(4)
        if grades[i] > grades[k]
    ]
    assert loss(vectors, grades) == pytest.approx(torch.log1p(torch.stack(terms).sum()).item())
    squares = (cosines - grades / 5).square().mean().item()
    assert loss(vectors, grades, loss="cosine", highest_grade=5) == pytest.approx(squares)
    unit = normalize(vectors, dim=-1)
    scores = 7 * unit[:, 0] @ unit[:, 1].T
    expected = cross_entropy(scores, torch.arange(4)).item()
    assert loss(vectors, torch.ones(4), loss="ranking", scale=7) == pytest.approx(expected)
    assert loss(vectors, torch.ones(4), loss="teacher") == 0.0


def test_correlations_are_those_of_sentence_transformers(
    tmp_path: Path, tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(validation=written(tmp_path / "a.jsonl", ROWS), metrics=["spearman", "pearson"])
    split = tasks.load_validation(task, tokenizer, BertConfig(**CONFIG))
    vectors = vectors_of((3, 2, 8))

    class Known(EmbeddingSimilarityEvaluator):
        def embed_inputs(self, model: Any, sentences: Any, **_: Any) -> np.ndarray:
            return np.stack([vectors[i, j].numpy() for i, j in sentences])

    first, second = ([(i, j) for i in range(3)] for j in range(2))
    texts: Any = {"sentences1": first, "sentences2": second}
    grades = [row["grade"] for row in ROWS]
    evaluator = Known(**texts, scores=grades, similarity_fn_names=["cosine"])
    monkeypatch.setattr(evaluator, "store_metrics_in_model_card_data", lambda *_: None)
    theirs = evaluator(sentences.NO_MODEL)
    ours = embeddings.score(task, (vectors,), split)
    for name in ("spearman", "pearson"):
        assert ours[name] == pytest.approx(theirs[f"{name}_cosine"])
    cosines = cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
    answers = embeddings.answers(task, (vectors,), split)
    assert [each.prediction for each in answers] == pytest.approx(cosines.tolist())


def test_retrieval_counts_what_is_found_among_all_second_texts() -> None:
    texts, pairs = ["q", "q", "r", "s"], ["x", "y", "x", "z"]
    angles = torch.tensor([[0.0, 10.0], [0.0, 20.0], [30.0, 10.0], [90.0, 60.0]]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=-1)
    # q: x, y, z in this order, both are right; r: y, x, z; s: z, y, x
    metrics = ["recall@1", "recall@5", "mrr@10"]
    found = sentences.retrieval(vectors, texts, pairs, metrics)
    assert found["recall@1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["recall@5"] == 1.0
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2 + 1) / 3)


@pytest.mark.parametrize("pooling", [Pooling(), Pooling("first"), Pooling("mean", False)])
def test_padding_is_no_part_of_a_vector(pooling: Pooling) -> None:
    states = vectors_of((1, 5, 8))
    padded, mask = states.clone(), torch.tensor([[1, 1, 1, 0, 0]])
    padded[:, 3:] = 100.0
    short = pooling(states[:, :3], mask[:, :3])
    torch.testing.assert_close(pooling(padded, mask), short)
    expected = states[:, 0] if pooling.mode == "first" else states[:, :3].mean(1)
    expected = normalize(expected, dim=-1) if pooling.is_normalized else expected
    torch.testing.assert_close(short, expected)


def test_each_text_is_cut_by_itself(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    path = written(tmp_path / "a.jsonl", [*ROWS, {"a": "cat " * 40, "b": "cat", "grade": 0}])
    split = tasks.load_validation(task_of(validation=path), tokenizer, BertConfig(**CONFIG))
    assert [len(ids) for ids in split.features[3]["input_ids"]] == [16, 3]
    batch = split.collate([split.features[i] for i in range(4)])
    assert batch["input_ids"].shape == (4, 2, 16) and batch["labels"].tolist() == [1, 4, 2.5, 0]


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: BertTokenizer) -> Path:
    directory = tmp_path / "encoder"
    BertModel(BertConfig(**CONFIG)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("pooling", [Pooling(), Pooling("first", False)])
def test_what_is_written_is_read(encoder: Path, pooling: Pooling) -> None:
    assert read_pooling(str(encoder)) is None
    write_pooling(pooling, encoder, hidden=8, tokens=16)
    assert read_pooling(str(encoder)) == pooling
    task = embeddings.settled(task_of(), str(encoder))
    assert embeddings.pooling_of(task) == pooling
    other = embeddings.settled(task_of(pooling="mean", normalize=True), str(encoder))
    assert embeddings.pooling_of(other) == Pooling()


def test_files_of_the_newest_version_are_read(encoder: Path) -> None:
    write_pooling(Pooling("first"), encoder, hidden=8, tokens=16)
    values = {"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": True}
    (encoder / "1_Pooling/config.json").write_text(json.dumps(values))
    assert read_pooling(str(encoder)) == Pooling("first")


def module(*kinds: str) -> list[dict[str, str]]:
    places = ["", "1_Pooling", "2_Normalize"]
    return [{"type": f"x.{k}", "path": p} for k, p in zip(kinds, places, strict=False)]


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("modules.json", module("Transformer"), "has no pooling"),
        ("modules.json", module("Transformer", "Pooling", "Dense"), "only an encoder, its pooling"),
        ("modules.json", {"a": 1}, "not a list of modules"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by .'max_tokens'."),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pools by"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case = True: texts are"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "'query': texts"),
    ],
)
def test_what_is_not_done_here_is_refused(
    encoder: Path, file: str, values: Any, message: str
) -> None:
    write_pooling(Pooling(), encoder, hidden=8, tokens=16)
    (encoder / file).write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        embeddings.settled(task_of(), str(encoder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_pair": None}, "text_pair: embeddings are measured on pairs"),
        ({"metrics": ["accuracy"]}, "for embedding these are known: pearson, spearman, recall@1"),
        ({"metrics": ["spearman", "mrr@10"]}, "need graded pairs, the others pairs"),
        ({"scale": 5.0, "loss": "cosine"}, "scale = 5.0: is for loss = 'cosent' or 'ranking'"),
        ({"highest_grade": 5.0}, "highest_grade = 5.0: is for loss = 'cosine', and this is"),
        ({"train_text": "a"}, "train_text = 'a': is for loss = 'teacher'"),
        ({"validation": 0.5, "loss": "ranking"}, "validation = 0.5: training examples are pairs"),
        ({"kind": "regression", "pooling": "mean"}, "pooling = 'mean': is for kind = 'embedding'"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(values: dict[str, Any], message: str) -> None:
    columns = {"text": "a", "text_pair": "b", "metrics": ["spearman"]}
    task = {"kind": "embedding", **columns, **values}
    rest = {"name": "x", "model": {"init": "x"}, "training": {"learning_rate": 1.0}}
    with pytest.raises(RecipeError, match=message):
        FinetuneRecipe.check({**rest, "task": task})


@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        ({"a": "x", "b": "y"}, {}, "line 1: no column 'grade' .task.label.; there are 'a', 'b'"),
        ({"a": "x", "b": "y", "grade": "high"}, {}, "'grade' is not a finite number"),
        ({"a": "x", "grade": 1}, {}, "no column 'b'"),
        ({"a": "x", "b": "", "grade": 1}, {}, "'b' is empty"),
        ({"a": "x", "b": "y", "grade": 3}, {"loss": "cosine"}, "must be within -1 and 1"),
    ],
)
def test_a_mistake_in_the_data_is_named(
    tmp_path: Path, tokenizer: BertTokenizer, row: dict[str, Any], values: Any, message: str
) -> None:
    file = written(tmp_path / "a.jsonl", [row])
    task = task_of(train=file, validation=file, **values)
    with pytest.raises(DataError, match=message):
        tasks.load(task, tokenizer, BertConfig(**CONFIG))


def test_without_sentence_transformers_one_message_says_what_to_install(
    tmp_path: Path, tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sentence_transformers", "sentence_transformers.sentence_transformer.evaluation"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "opfa.tasks.sentences")
    task = task_of(validation=written(tmp_path / "a.jsonl", ROWS))
    tasks.load_validation(task, tokenizer, BertConfig(**CONFIG))  # correlations need nothing more
    for missing in (task_of(), task_of(loss="teacher", metrics=["mrr@10"])):
        with pytest.raises(
            RunError, match=r'needs sentence_transformers: pip install "opfa\[embeddings\]"'
        ):
            tasks.load(missing, tokenizer, BertConfig(**CONFIG))
