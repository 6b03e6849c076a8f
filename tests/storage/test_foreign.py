"""Models of others: damaged, incomplete, or asking for what nobody should give them."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
import torch
from conftest import TINY_BERT, finetune_recipe
from safetensors.torch import load_file, save_file
from servers import release
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from opfa.compression import quant
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.downstream.student import hold_zeros
from opfa.errors import ModelError, OpfaError
from opfa.hub.download import download
from opfa.models.configs import load_config, load_tokenizer, new_config, wordpiece_tokenizer
from opfa.models.encoders import skeleton, write_model
from opfa.models.fit import fit_tokenizer
from opfa.models.skeleton import num_positions
from opfa.sparsity.layers import zero_masks
from opfa.sparsity.masks import report
from opfa.tasks.kinds import check_head, load_model
from opfa.tasks.recipe import Task
from opfa.weights.inspection import inspect

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,'", "cat"]
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TASK = Task(train="t.jsonl", validation="v.jsonl", text="text", sequence_tokens=16)


def tiny(directory: Path, **values: Any) -> Path:
    """A tiny sparse classifier in a directory."""
    torch.manual_seed(0)
    config = new_config({**TINY_BERT, "vocab_size": len(WORDS), **values})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if "layer" in name and parameter.ndim == 2:
            parameter.data[:, ::2] = 0
    tokenizer = wordpiece_tokenizer(VOCABULARY, lowercase=True, tokens=32)
    write_model(model, tokenizer, directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (directory / "sparsity.json").write_text(json.dumps(report(zero_masks(model))))
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def use(directory: Path) -> None:
    """All that evaluating and fine-tuning do with a directory before they compute."""
    config, tokenizer = load_config(str(directory)), load_tokenizer(str(directory))
    check_head(TASK, config)
    fit_tokenizer(config, tokenizer, TASK.sequence_tokens)
    model = load_model(TASK, str(directory), ("a", "b"), is_trained=True)
    hold_zeros(model, str(directory))
    if (directory / quant.FILE).exists():
        quant.load(model, directory / quant.FILE)


# Mutations: what is done to a whole model.

Mutation = Callable[[Path], object]
DEEP = "[" * 10_000 + "]" * 10_000
TEXTS = ("null", "[]", "7", '"x"', "{", "", "{}", DEEP, '{"a":' * 999 + "1" + "}" * 999)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "sparsity.json")
WRONG = (None, -1, 0, 10**12, 10**30, "abc", [], True, float("nan"))
FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
    "num_labels",
)


def content(file: str, data: bytes) -> Mutation:
    return lambda d: (d / file).write_bytes(data)


def value(file: str, *path: str, to: Any) -> Mutation:
    def change(directory: Path) -> None:
        values = json.loads((directory / file).read_text())
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        (directory / file).write_text(json.dumps(values))

    return change


def instead(file: str, make: Callable[[Path], Any]) -> Mutation:
    def change(directory: Path) -> None:
        (directory / file).unlink()
        make(directory / file)

    return change


def mutations() -> dict[str, Mutation]:
    found: dict[str, Mutation] = {}
    for file in FILES:
        for text in (
            "null",
            "[]",
            "7",
            '"x"',
            "{",
            "",
            "{}",
            DEEP,
            '{"a":' * 999 + "1" + "}" * 999,
        ):
            found[f"{file} = {text[:9]} ({len(text)})"] = content(file, text.encode())
        found[f"{file} not UTF-8"] = content(file, b'{"a": "\xff\xfe"}')
        found[f"{file} a pointer"] = content(file, POINTER)
        found[f"{file} a directory"] = instead(file, os.mkdir)
        found[f"{file} a link to nothing"] = instead(file, lambda p: p.symlink_to("nowhere"))
    for field in FIELDS:
        for wrong in WRONG:
            found[f"{field} = {wrong}"] = value("config.json", field, to=wrong)
    others = {"dtype": "nonsense", "hidden_act": "zzz", "architectures": 7, "id2label": 7}
    others |= {"model_type": "zzz", "layer_norm_eps": "x", "return_dict": False, "is_decoder": 1}
    others |= {"quantization_config": {"quant_method": "gptq"}, "attn_implementation": "a/b"}
    others |= {"label2id": [1], "hidden_dropout_prob": 7, "chunk_size_feed_forward": 3}
    for field, wrong in others.items():
        found[f"{field} = {wrong}"] = value("config.json", field, to=wrong)
    for wrong in (None, 7, [], "x", {"a": None}, {"a": {"shape": None, "zeros": 0, "sparsity": 0}}):
        found[f"tensors = {wrong}"] = value("sparsity.json", "tensors", to=wrong)
    for wrong in ("9.0", 7, None):
        found[f"tokenizer version {wrong}"] = value("tokenizer.json", "version", to=wrong)
    for key in ("model", "pre_tokenizer", "post_processor", "added_tokens", "normalizer"):
        for wrong in (7, None, {"type": "Nonsense"}, []):
            found[f"tokenizer {key} = {wrong}"] = value("tokenizer.json", key, to=wrong)
    found["a token's id is 4 * 10^9"] = value(
        "tokenizer.json", "model", "vocab", "cat", to=4_000_000_000
    )
    for key in ("tokenizer_class", "model_max_length", "pad_token", "unk_token", "backend"):
        for wrong in (7, None, [], {"a": 1}, "zzz", -1):
            found[f"tokenizer_config {key} = {wrong}"] = value(
                "tokenizer_config.json", key, to=wrong
            )
    header = len(json.dumps({"a": 1})).to_bytes(8, "little")
    for data in (
        b"",
        b"x",
        header + b'{"a": 1}',
        (1 << 62).to_bytes(8, "little"),
        POINTER,
        b"<html>",
    ):
        found[f"weights = {data[:9]!r}"] = content("model.safetensors", data)
        found[f"ranges = {data[:9]!r}"] = content("quantization.safetensors", data)
    return found


MUTATIONS = mutations()


def test_whatever_is_wrong_with_a_model_is_one_message(whole: Path, tmp_path: Path) -> None:
    """Success or `OpfaError`, for each of some two hundred."""
    failed = {}
    for name, mutate in MUTATIONS.items():
        directory = Path(shutil.copytree(whole, tmp_path / "model"))
        mutate(directory)
        for step in (use, inspect):
            try:
                with contextlib.suppress(OpfaError):
                    step(directory)
            except BaseException as error:  # noqa: BLE001 - a panic in Rust code is not an Exception
                failed[name, step.__name__] = repr(error)[:200]
        shutil.rmtree(directory)
    assert not failed


# What weights can be, and are not.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "git-lfs pointer, not the file itself; fetch it with: git lfs pull"),
        (b"version https://hawser.github.com/spec/v1\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML message"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_no_weights_is_named(
    model: Path, file: str, data: bytes, message: str
) -> None:
    (model / "model.safetensors").unlink()
    (model / file).write_bytes(data)
    for step in (use, inspect):
        with pytest.raises(ModelError, match=message) as error:
            step(model)
        assert file in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_the_place_of_a_tokenizer_is_named(model: Path, file: str) -> None:
    (model / file).write_bytes(POINTER)
    with pytest.raises(ModelError, match=f"{file}: is a git-lfs pointer"):
        load_tokenizer(str(model))


def sharded(model: Path, *, is_pickle: bool = False) -> Path:
    """The model in two files with an index; its directory."""
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    stem, suffix = ("pytorch_model", "bin") if is_pickle else ("model", "safetensors")
    weight_map = {}
    for number in (1, 2):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {k: state[k] for i, k in enumerate(sorted(state)) if i % 2 == number - 1}
        if is_pickle:
            torch.save(part, model / name)
        else:
            save_file(part, model / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (model / f"{stem}.{suffix}.index.json").write_text(index)
    return model


@pytest.mark.parametrize("is_pickle", [False, True])
def test_a_model_in_two_files_is_used(model: Path, is_pickle: bool) -> None:
    use(sharded(model, is_pickle=is_pickle))
    assert inspect(model)["stated"] == "matches"


@pytest.mark.parametrize("is_pickle", [False, True])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_shard_that_is_not_there_is_named(model: Path, is_pickle: bool, has_index: bool) -> None:
    sharded(model, is_pickle=is_pickle)
    next(model.glob("*-00002-of-00002.*")).unlink()
    if not has_index:
        next(model.glob("*.index.json")).unlink()
    for step in (use, inspect):
        with pytest.raises(ModelError, match=r"-00002-of-00002.\w+ is missing"):
            step(model)


def test_a_shard_without_a_tensor_of_the_index_is_named(model: Path) -> None:
    sharded(model)
    path = model / "model-00002-of-00002.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path, {"format": "pt"})
    for step in (use, inspect):
        with pytest.raises(ModelError, match=r"00002.safetensors: .* is missing, which the index"):
            step(model)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a\\b", 7, None, ""])
def test_an_index_names_files_beside_it_alone(model: Path, place: Any) -> None:
    sharded(model)
    path = model / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": place}}))
    for step in (use, inspect):
        with pytest.raises(ModelError, match="is no file beside it"):
            step(model)


@pytest.mark.parametrize("is_alone", [False, True])
def test_an_adapter_is_refused_by_name(model: Path, is_alone: bool) -> None:
    mapping = {"base_model_class": "Model", "parent_library": "evil"}
    values = {"base_model_name_or_path": "x", "auto_mapping": mapping}
    (model / "adapter_config.json").write_text(json.dumps(values))
    if is_alone:
        (model / "config.json").unlink()
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds an adapter .*; merge it into its model first"):
        use(model)


# Tokenizers.


def without_tokenizer(model: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (model / name).unlink()
    return model


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": "{}"},
        {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
        {"tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}'},
        {"tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizer"}'},
        {"tokenizer_config.json": '{"tokenizer_class": "DebertaV2Tokenizer"}'},
        {
            "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}',
            "vocab.json": json.dumps(VOCABULARY),
        },
        {"vocab.txt": ""},
        {"vocab.txt": "\n".join(WORDS[:5])},
        {"special_tokens_map.json": '{"pad_token": "[PAD]"}'},
    ],
)
def test_a_model_without_a_tokenizer_is_refused(model: Path, files: dict[str, str]) -> None:
    without_tokenizer(model)
    for name, text in files.items():
        (model / name).write_text(text)
    with pytest.raises(ModelError, match=r"no tokenizer files .*model.tokenizer=NAME"):
        load_tokenizer(str(model))


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("XLMRobertaTokenizer", "sentencepiece.bpe.model"),
        ("AlbertTokenizer", "spiece.model"),
        ("DebertaV2Tokenizer", "spm.model"),
        ("T5Tokenizer", "spiece.model"),
    ],
)
def test_a_sentencepiece_model_that_can_not_be_read_is_told_so(
    model: Path, kind: str, file: str
) -> None:
    """And not that tiktoken is missing, with which transformers tries it next."""
    without_tokenizer(model)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (model / file).write_bytes(b"\x0a\x08damaged")
    message = r"sentencepiece(: pip install| model is damaged)"
    with pytest.raises(ModelError, match=message):
        load_tokenizer(str(model))


def test_a_vocabulary_alone_is_a_tokenizer_of_bert(model: Path) -> None:
    without_tokenizer(model)
    (model / "vocab.txt").write_text("\n".join(WORDS))
    assert load_tokenizer(str(model))("a cat")["input_ids"] == [2, 5, 34, 3]


# Sizes, positions and token types that tokenizer and model don't have in common.


def pair(directory: Path, **values: Any) -> tuple[Any, Any]:
    """A model of a family in a directory, and BERT's tokenizer."""
    tiny(directory, **values)
    return load_config(str(directory)), load_tokenizer(str(directory))


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "camembert", "xlm-roberta", "data2vec-text"])
def test_positions_that_are_counted_from_the_padding_are_fewer(tmp_path: Path, kind: str) -> None:
    config, tokenizer = pair(tmp_path, model_type=kind, pad_token_id=1)
    task = TASK.model_copy(update={"sequence_tokens": 30})
    load_model(task, str(tmp_path), ("a", "b"))  # which computes with 30 tokens
    fit_tokenizer(config, tokenizer, 30)
    with pytest.raises(ModelError, match="sequence_tokens = 31: this model has only 30 positions"):
        fit_tokenizer(config, tokenizer, 31)


@pytest.mark.parametrize(
    ("kind", "values", "positions"),
    [
        ("bert", {}, 32),
        ("nystromformer", {}, 32),
        ("yoso", {}, 32),
        ("bart", {"d_model": 16}, 32),
        ("deberta-v2", {"position_biased_input": False, "relative_attention": True}, 32),
        ("modernbert", {}, 32),
        ("xlnet", {"d_model": 16, "d_inner": 32, "d_head": 8}, None),
        ("t5", {"d_model": 16, "d_ff": 32}, None),
    ],
)
def test_positions_are_those_of_the_model(
    kind: str, values: dict[str, Any], positions: int | None
) -> None:
    shape = {k: v for k, v in TINY_BERT.items() if not ("d_model" in values and "size" in k)}
    if kind in ("xlnet", "t5"):
        del shape["max_position_embeddings"]
    config = new_config(
        {**shape, "model_type": kind, "vocab_size": 40, "pad_token_id": 0, **values}
    )
    assert num_positions(skeleton(config), config) == positions


def test_a_model_without_a_padding_token_is_one_message(tmp_path: Path) -> None:
    pair(tmp_path, model_type="roberta", pad_token_id=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None}))
    with pytest.raises(ModelError, match="pad_token_id = null"):
        use(tmp_path)


@pytest.mark.parametrize("kind", ["roberta", "bert", "electra"])
def test_a_single_token_type_is_left_out(tmp_path: Path, kind: str) -> None:
    """And stays so when the tokenizer is saved, for whoever loads it with plain transformers."""
    config, tokenizer = pair(tmp_path / "1", model_type=kind, type_vocab_size=1, pad_token_id=1)
    assert "token_type_ids" in tokenizer("a cat", "a cat")
    fit_tokenizer(config, tokenizer, 16)
    tokenizer.save_pretrained(tmp_path / "2")
    for each in (tokenizer, load_tokenizer(str(tmp_path / "2"))):
        assert "token_type_ids" not in each("a cat", "a cat")


def test_more_token_types_than_the_model_has_are_refused(tmp_path: Path) -> None:
    config, tokenizer = pair(tmp_path, type_vocab_size=2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$0", pair="$A:0 $B:4", special_tokens=[]
    )
    with pytest.raises(ModelError, match="token types up to 4, and this model has only 2"):
        fit_tokenizer(config, tokenizer, 16)


def test_ids_that_the_model_has_no_row_for_are_refused(tmp_path: Path) -> None:
    """Not the number of entries counts, but the largest."""
    config, tokenizer = pair(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["cat"] = 99
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="the tokenizer has 100 entries .* only 35"):
        fit_tokenizer(config, load_tokenizer(str(tmp_path)), 16)


@pytest.mark.parametrize("is_pair", [True, False])
def test_roberta_with_a_tokenizer_of_bert_trains_on_pairs(tmp_path: Path, is_pair: bool) -> None:
    tiny(tmp_path / "model", model_type="roberta", type_vocab_size=1, pad_token_id=0)
    rows = [{"text": "a cat", "pair": "a, b", "label": str(i % 2)} for i in range(8)]
    for name in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    task = {"text_pair": "pair"} if is_pair else {}
    recipe = finetune_recipe(tmp_path / "model", tmp_path, task=task)
    finetune(recipe, tmp_path / "run")
    found = evaluate_model(str(tmp_path / "run/model"), recipe)
    assert set(found.metrics) == {"accuracy"}


# The Hub.


def test_a_shard_that_the_hub_does_not_list_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with hub.serving(model, tmp_path / "cache", monkeypatch):
        for step in (inspect, load_weights_of):
            with pytest.raises(ModelError, match="00002-of-00002.safetensors is missing"):
                step(hub.NAME)


def load_weights_of(name: str) -> None:
    load_model(TASK, name, ("a", "b"))


def test_a_shard_that_the_cache_lacks_is_named_without_a_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(model)
    with hub.serving(model, tmp_path / "cache", monkeypatch):
        load_weights_of(hub.NAME)
        shard = next((tmp_path / "cache").rglob("model-00002-of-00002.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match="the cache lacks model-00002-of-00002.safetensors"):
        inspect(hub.NAME)


def test_a_model_of_the_hub_that_asks_for_code_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(values))
    (model / "evil.py").write_text("raise SystemExit")
    with hub.serving(model, tmp_path / "cache", monkeypatch) as served:
        for load in (load_config, load_tokenizer, load_weights_of):
            with pytest.raises(ModelError, match="remote code is never run"):
                load(hub.NAME)
        assert "evil.py" not in served.paths and "model.safetensors" not in served.paths


def test_a_download_without_a_shard_is_not_complete(model: Path, tmp_path: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    for name, content in release(files).items():
        (model / name).write_bytes(content)
    with pytest.raises(ModelError, match="00002-of-00002.safetensors is missing"):
        download(str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
