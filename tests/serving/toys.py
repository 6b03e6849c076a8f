"""Small models for endpoints, without training or tracing: an ONNX file by hand for each kind of
task, whose outputs depend on every token, its place, its type and its padding.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import finetune_recipe
from onnx import TensorProto, helper, numpy_helper
from tokenizers import pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerBase, RobertaConfig, RobertaTokenizer
from words import WORDS, tiny

from opfa.downstream.recipe import FinetuneRecipe
from opfa.models.encoders import HEADS
from opfa.serving.archive import complete

HIDDEN = 8
QA = {"text": "question", "text_pair": "context", "metrics": ["squad_f1"], "stride_tokens": 4}
PAIR = {"text": "one", "text_pair": "other"}
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # head, configuration, task
    "classes": ("SequenceClassification", {"id2label": {0: "bad", 1: "good", 2: "so"}}, {}),
    "pairs": ("SequenceClassification", {"id2label": {0: "bad", 1: "good"}}, PAIR),
    "numbers": ("SequenceClassification", {"num_labels": 1}, {"kind": "regression", **PAIR}),
    "answers": ("QuestionAnswering", {}, {"kind": "question-answering", **QA}),
    "perhaps no answers": (
        "QuestionAnswering",
        {},
        {"kind": "question-answering", **QA, "has_unanswerable": True, "no_answer_threshold": -1.0},
    ),
    "tags": (
        "TokenClassification",
        {"id2label": {0: "O", 1: "B-X"}},
        {"kind": "token-classification", "text": "words", "metrics": ["accuracy"]},
    ),
    "choices": (
        "MultipleChoice",
        {},
        {"kind": "multiple-choice", "text": "question", "choices": ["choices"]},
    ),
    "columns of choices": (
        "MultipleChoice",
        {},
        {"kind": "multiple-choice", "text": "q", "text_pair": "begin", "choices": ["a", "b"]},
    ),
    "vectors": ("", {}, {"kind": "embedding", "text": "text", "text_pair": "other"}),
}


def toy(directory: Path, name: str, family: str = "bert") -> Path:
    """A directory as `opfa pack` fills it before it becomes an archive."""
    head, values, _ = TASKS[name]
    tokenizer, config = _tokenizer(directory), tiny(**values)
    if family == "roberta":
        tokenizer = _byte_tokenizer()
        config = RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
            max_position_embeddings=34, type_vocab_size=1, **values,
        )  # fmt: skip
    model = HEADS[head].from_config(config) if head else None
    config.architectures = [type(model).__name__ if model else "BertModel"]
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    num = 1 if head in ("MultipleChoice", "") else len(config.id2label or ())
    has_types = "token_type_ids" in tokenizer.model_input_names
    onnx.save(_graph(head, len(tokenizer), num, has_types=has_types), directory / "model.onnx")
    (directory / "recipe.toml").write_text(recipe_of(directory, name).to_toml())
    complete(directory)
    return directory


def recipe_of(directory: Path, name: str) -> FinetuneRecipe:
    """The recipe of a model in a directory, for a task of this name."""
    task = TASKS[name][2]
    values = {"train": "train.jsonl", "validation": "validation.jsonl", "sequence_tokens": 24}
    values |= {"metrics": ["pearson"]} if task.get("kind") in ("regression", "embedding") else {}
    return finetune_recipe(directory, directory, task={**values, **task})


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    directory.mkdir(parents=True)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer.from_pretrained(directory)


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """One that knows a word by the blank before it, and every byte."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    entries = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġg", "Ġgo", "oo", "od"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    merges: Any = [("Ġ", "g"), ("Ġg", "o"), ("o", "o"), ("o", "d")]  # transformers says: texts
    return RobertaTokenizer(vocab=vocabulary, merges=merges)


def _graph(head: str, entries: int, num: int, *, has_types: bool) -> onnx.ModelProto:
    """sin(place * (entry of token + entry of type)), and what the head makes of it."""
    random = np.random.default_rng(0)
    axes = ["batch", "choices", "tokens"] if head == "MultipleChoice" else ["batch", "tokens"]
    constants = {
        "table": random.normal(size=(entries, HIDDEN)),
        "types": random.normal(size=(2, HIDDEN)),
        "weight": random.normal(size=(HIDDEN, 2 if head == "QuestionAnswering" else num)) * 2,
    }
    numbers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    for key, value in {"last": -1, "hidden": -2}.items():
        numbers.append(numpy_helper.from_array(np.array([value], np.int64), key))
    numbers.append(numpy_helper.from_array(np.array(len(axes) - 1, np.int64), "axis"))
    nodes = [
        ("Gather", ["table", "input_ids"], ["tokens"], {}),
        ("Gather", ["types", "token_type_ids"], ["typed"], {}),
        ("Add", ["tokens", "typed"], ["both"], {}),
        ("Cast", ["attention_mask"], ["mask"], {"to": TensorProto.FLOAT}),
        ("CumSum", ["mask", "axis"], ["places"], {}),
        ("Unsqueeze", ["places", "last"], ["place"], {}),
        ("Mul", ["both", "place"], ["angles"], {}),
        ("Sin", ["angles"], ["last_hidden_state"], {}),
        ("Unsqueeze", ["mask", "last"], ["kept"], {}),
        ("Mul", ["last_hidden_state", "kept"], ["masked"], {}),
        ("ReduceSum", ["masked", "hidden"], ["sum"], {"keepdims": 0}),
        ("LpNormalization", ["sum"], ["vector"], {"axis": -1, "p": 2}),
    ]
    if not has_types:
        nodes[1:3] = [("Identity", ["tokens"], ["both"], {})]
    many = ["batch", "tokens"]
    outputs: dict[str, list[Any]] = {"logits": ["batch", num]}
    if head == "":
        outputs = {"last_hidden_state": [*many, HIDDEN], "sentence_embedding": ["batch", HIDDEN]}
        nodes.append(("Identity", ["vector"], ["sentence_embedding"], {}))
    elif head == "QuestionAnswering":
        outputs = {"start_logits": many, "end_logits": many}
        nodes.append(("MatMul", ["last_hidden_state", "weight"], ["pair"], {}))
        nodes.append(("Split", ["pair"], ["a", "b"], {"axis": -1, "num_outputs": 2}))
        nodes += [
            ("Squeeze", [name, "last"], [output], {})
            for name, output in zip("ab", outputs, strict=True)
        ]
    elif head == "TokenClassification":
        outputs = {"logits": [*many, num]}
        nodes.append(("MatMul", ["last_hidden_state", "weight"], ["logits"], {}))
    elif head == "MultipleChoice":
        outputs = {"logits": ["batch", "choices"]}
        nodes.append(("MatMul", ["vector", "weight"], ["scores"], {}))
        nodes.append(("Squeeze", ["scores", "last"], ["logits"], {}))
    else:
        nodes.append(("MatMul", ["vector", "weight"], ["logits"], {}))
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if has_types else [])]
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **more) for kind, ins, outs, more in nodes],
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in names],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
        numbers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def lines(rows: list[Any]) -> str:
    """JSON Lines."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)
