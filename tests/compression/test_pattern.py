"""Which linear layers are pruned, family by family."""

from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from opfa.compression.pattern import Pattern
from opfa.errors import RecipeError

SIZES: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 32}  # Any: by keyword
TINY: dict[str, Any] = {
    **SIZES,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def bert() -> BertForPreTraining:
    return BertForPreTraining(BertConfig(**TINY))


def names_below(prefix: str, names: list[str]) -> list[str]:
    return [f"{prefix}.{layer}.{name}" for layer in range(2) for name in names]


BERT = ["attention.self.query", "attention.self.key", "attention.self.value"]
BERT += ["attention.output.dense", "intermediate.dense", "output.dense"]


def test_bert_has_6_layers_in_each_of_its_2_and_neither_pooler_nor_heads(
    bert: BertForPreTraining,
) -> None:
    assert list(Pattern().layers(bert)) == names_below("bert.encoder.layer", BERT)


def test_a_classifier_has_the_same_layers_as_its_pre_training_model(
    bert: BertForPreTraining,
) -> None:
    classifier = BertForSequenceClassification(BertConfig(**TINY))
    assert list(Pattern().layers(classifier)) == list(Pattern().layers(bert))


@pytest.mark.parametrize(
    ("config", "prefix", "names"),
    [
        (
            DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **SIZES),
            "distilbert.transformer.layer",
            ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"]
            + ["ffn.lin1", "ffn.lin2"],
        ),
        (RobertaConfig(**TINY), "roberta.encoder.layer", BERT),
        (
            ModernBertConfig(**TINY, pad_token_id=0),
            "model.layers",
            ["attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"],
        ),
    ],
    ids=["distilbert", "roberta", "modernbert"],
)
def test_every_family_has_all_linear_layers_of_its_encoder(
    config: Any, prefix: str, names: list[str]
) -> None:
    model = AutoModelForMaskedLM.from_config(config)
    assert sorted(Pattern().layers(model)) == sorted(names_below(prefix, names))


def test_a_bare_encoder_has_the_same_layers(bert: BertForPreTraining) -> None:
    layers = list(Pattern().layers(bert.base_model).values())
    assert all(a is b for a, b in zip(layers, Pattern().layers(bert).values(), strict=True))


def test_include_and_exclude_choose_by_regular_expression(bert: BertForPreTraining) -> None:
    pattern = Pattern(include=("query", "key"), exclude=(r"layer\.1",))
    assert list(pattern.layers(bert)) == [QUERY, QUERY.replace("query", "key")]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_rule_that_matches_nothing_is_refused(bert: BertForPreTraining, key: str) -> None:
    rules: Any = {key: ("attention", "word_embeddings")}
    pattern = Pattern(**rules)
    message = rf"pruning\.{key} = 'word_embeddings': matches no linear layer \(there are {QUERY}"
    with pytest.raises(RecipeError, match=message):
        pattern.layers(bert)


def test_rules_that_leave_nothing_are_refused(bert: BertForPreTraining) -> None:
    with pytest.raises(RecipeError, match="no linear layer is left to prune"):
        Pattern(include=("query",), exclude=("attention",)).layers(bert)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_bad_regular_expression_fails_at_construction(key: str) -> None:
    rules: Any = {key: ("(layer",)}
    with pytest.raises(ValidationError, match=r"'\(layer': not a regular expression: missing \)"):
        Pattern(**rules)


def test_only_linear_layers_are_found() -> None:
    model = nn.ModuleDict({"layer": nn.ModuleList([nn.LayerNorm(4), nn.Embedding(4, 4)])})
    with pytest.raises(RecipeError, match="matches no linear layer"):
        Pattern(include=("layer",)).layers(model)
