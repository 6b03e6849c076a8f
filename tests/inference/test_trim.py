"""A vocabulary cut to what texts use: the same ids, renumbered, and the same outputs."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import finetune_recipe, sentences, write_records
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
)

import opfa
from opfa.commands import app as cli
from opfa.errors import DataError, ModelError, OpfaError, RunError
from opfa.models.configs import load_tokenizer, wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.models.sentences import FILES, Pooling, read_pooling, write_pooling
from opfa.models.vocabulary import backend_of, ids_of_config

LINES = list(sentences())
TEXTS, OTHERS = LINES[:6], [*LINES[150:160], "sex qua zebras", "a-b 3."]
SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 20, "max_position_embeddings": 64}
FAMILIES = ("bert", "roberta", "distilbert", "modernbert")
HEADS = {
    "encoder": transformers.AutoModel,
    "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
    "tags": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "choices": AutoModelForMultipleChoice,
    "pairs": AutoModelForPreTraining,
}
CASES = [*((family, head) for family in FAMILIES for head in ("masked", "classes"))]
CASES += [("bert", head) for head in HEADS if head not in ("masked", "classes")]


@cache
def bytes_merged() -> tuple[dict[str, int], Any]:
    """A byte-level BPE, as RoBERTa has it."""
    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made.train_from_iterator(LINES, 400, show_progress=False, special_tokens=special)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """Of the kind that the family has; never to be changed."""
    if family in ("bert", "distilbert"):
        letters = {c for line in [*LINES, *OTHERS] for c in line if c != " "}
        words = {word.strip(".") for line in LINES for word in line.split()}
        pieces = [f"##{c}" for c in letters] + ["##e", "##ea", "##ouse", "never"]
        unused = [f"[unused{i}]" for i in range(9)]
        special = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokens = dict.fromkeys([*special, *sorted({*letters, *words, *pieces})])
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return wordpiece_tokenizer(vocabulary, lowercase=True, tokens=64)
    vocabulary, merges = bytes_merged()
    if family == "roberta":
        return RobertaTokenizer(vocab={**vocabulary, "<mask>": len(vocabulary)}, merges=merges)
    words = {token: i for i, token in enumerate(t for t in vocabulary if t[0] != "<")}
    made = Tokenizer(models.BPE(words, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_tokens([AddedToken("  ", normalized=True), AddedToken("zebra", normalized=False)])
    special = {f"{n}_token": f"[{n.upper()}]" for n in ("unk", "cls", "sep", "pad", "mask")}
    made.add_special_tokens([*special.values()])
    ids = [("[CLS]", made.token_to_id("[CLS]")), ("[SEP]", made.token_to_id("[SEP]"))]
    made.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **special)


def config_of(family: str, rows: int) -> Any:
    """With the ids of the tokenizer, and some rows that no token has."""
    tokenizer = tokenizer_of(family)
    ids: Any = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "cls", "sep")}
    if family == "roberta":
        return RobertaConfig(**SIZES, vocab_size=rows, type_vocab_size=1)  # pad_token_id = 1
    if family == "distilbert":
        sizes: dict[str, Any] = {"dim": 24, "n_layers": 1, "n_heads": 4, "hidden_dim": 20}
        return DistilBertConfig(**sizes, vocab_size=rows, max_position_embeddings=64)
    if family == "bert":
        masked: Any = {"mask_token_id": tokenizer.mask_token_id}
        return BertConfig(**SIZES, vocab_size=rows, **masked)
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    return ModernBertConfig(**SIZES, vocab_size=rows, local_attention=8, **ids)


def model_of(family: str, head: str = "classes") -> PreTrainedModel:
    """Random weights and biases, also of what is padding."""
    torch.manual_seed(0)
    model = HEADS[head].from_config(config_of(family, len(tokenizer_of(family)) + 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def written(family: str, path: Path, head: str = "classes") -> PreTrainedModel:
    model = model_of(family, head)
    write_model(model, tokenizer_of(family), path)
    return model


def outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[str, Any]:
    """Of a padded batch."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if "MultipleChoice" in type(model).__name__:
        inputs = {key: value.unsqueeze(0) for key, value in inputs.items()}
    with torch.no_grad():
        return dict(model(**inputs, output_hidden_states=True))


def mapped(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, int]:
    """New ids by old ones, by the tokens."""
    ids = new.get_vocab()
    return {index: ids[token] for token, index in old.get_vocab().items() if token in ids}


@pytest.mark.parametrize(("family", "head"), CASES)
def test_ids_are_renumbered_and_hidden_states_equal_bit_for_bit(
    family: str, head: str, tmp_path: Path
) -> None:
    old, model = tokenizer_of(family), written(family, tmp_path / "whole", head)
    found = opfa.trim(tmp_path / "whole", TEXTS, tmp_path / "small")
    new = AutoTokenizer.from_pretrained(tmp_path / "small")
    small = HEADS[head].from_pretrained(tmp_path / "small").eval()
    ids = mapped(old, new)
    assert found.tokens == len(new) < len(old) == found.of_tokens
    assert found.parameters == small.num_parameters() < found.of_parameters
    assert found.bytes == (tmp_path / "small/model.safetensors").stat().st_size < found.of_bytes
    assert (found.texts, found.texts_changed, found.covered) == (6, 0, 1.0)
    for first, second in ((TEXTS, None), (TEXTS, TEXTS[::-1])):
        before, after = (each(first, second)["input_ids"] for each in (old, new))
        assert after == [[ids[i] for i in each] for each in before]
    assert {new.unk_token_id} & {i for text in new(OTHERS)["input_ids"] for i in text} == set()
    assert sorted(new.get_vocab().values()) == list(range(len(new)))
    for each in json.loads((tmp_path / "small/tokenizer.json").read_text())["added_tokens"]:
        assert new.convert_tokens_to_ids(each["content"]) == each["id"]
    for name in ("pad", "cls", "sep", "mask", "unk"):
        assert getattr(new, f"{name}_token") == getattr(old, f"{name}_token")
        was: Any = getattr(model.config, f"{name}_token_id", None)
        assert getattr(small.config, f"{name}_token_id", None) == ids.get(was, was)
    before, after = outputs(model, old, TEXTS), outputs(small, new, TEXTS)
    rows = torch.tensor(sorted(ids, key=ids.__getitem__))
    for key, value in before.items():
        if key == "hidden_states":
            assert all(map(torch.equal, value, after[key]))
        elif value.shape[-1] == model.config.vocab_size:  # a product of another size
            assert (value[..., rows] - after[key][..., : len(rows)]).abs().max() < 1e-5
        else:  # a head's product may be rounded otherwise at another place in memory
            assert (value - after[key]).abs().max() < 1e-6


def test_added_tokens_stay_and_are_found(tmp_path: Path) -> None:
    written("modernbert", tmp_path / "whole")
    opfa.trim(tmp_path / "whole", TEXTS, tmp_path / "small")
    new = load_tokenizer(str(tmp_path / "small"))
    assert new.tokenize("sex zebras") == ["se", "x", "Ġ", "zebra", "s"]
    assert "  " in new.tokenize("a  b")
    new.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(TEXTS + OTHERS)["input_ids"] == new(TEXTS + OTHERS)["input_ids"]
    with pytest.raises(ModelError, match="nothing to cut; .* tokens must stay"):
        opfa.trim(tmp_path / "small", TEXTS, tmp_path / "smaller")


def test_positions_are_counted_from_a_padding_that_keeps_its_number(tmp_path: Path) -> None:
    model: Any = model_of("roberta")
    assert ids_of_config(model, 500) == {0, 1, 2}
    model.roberta.embeddings.position_embeddings.padding_idx = 5
    assert ids_of_config(model, 500) == {0, 1, 2, 3, 4, 5}


def test_tokens_that_are_rare_can_be_cut_too(tmp_path: Path) -> None:
    written("bert", tmp_path / "whole")
    texts = ["the cat", "the cat", "the cat sees", "the cat sees the house"]
    found = opfa.trim(tmp_path / "whole", texts, tmp_path / "small", min_count=2)
    assert (found.texts, found.texts_changed, found.texts_tokens) == (4, 1, 12)
    assert found.covered == 11 / 12
    new = load_tokenizer(str(tmp_path / "small"))
    assert new.tokenize("the house sees") == ["the", *("h", "##o", "##u", "##s", "##e"), "sees"]
    assert "3 of 4 texts are split as before; 91.67% of their 12 tokens are kept" in str(found)


def test_a_word_that_was_unknown_stays_unknown(tmp_path: Path) -> None:
    """ "abc" took "ab" and found no "##c". Without "ab" it would be "a" and "##bc"."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ab", "x", "##bc", "other", "y"]
    tokenizer = wordpiece_tokenizer({t: i for i, t in enumerate(tokens)}, lowercase=True, tokens=64)
    model = HEADS["classes"].from_config(BertConfig(**SIZES, vocab_size=len(tokens)))
    write_model(model, tokenizer, tmp_path / "whole")
    found = opfa.trim(tmp_path / "whole", ["xbc", "abc"], tmp_path / "small")
    new = load_tokenizer(str(tmp_path / "small"))
    assert new.tokenize("xbc abc") == ["x", "##bc", "[UNK]"]
    assert set(new.get_vocab()) == {*tokens} - {"other"} and found.texts_changed == 0


def test_files_of_all_kinds_are_read_by_column(tmp_path: Path) -> None:
    written("bert", tmp_path / "whole")
    rows = [{"question": "the cat", "context": ["a dog", "sees"]}]
    write_records(tmp_path / "rows.jsonl.gz", rows)
    (tmp_path / "rows.csv").write_text("question,context,n\nthe moon,a song,1\n")
    files = [tmp_path / "rows.*"]
    columns = ("question", "context")
    found = opfa.trim(tmp_path / "whole", files, tmp_path / "small", columns=columns)
    assert (found.texts, found.texts_tokens) == (5, 9)
    kept = set(load_tokenizer(str(tmp_path / "small")).get_vocab())
    assert {"cat", "dog", "sees", "moon", "song"} <= kept and "captain" not in kept


def test_a_hub_data_set_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    written("bert", tmp_path / "whole")
    write_records(tmp_path / "data/train.jsonl.gz", [{"text": "the cat"}])
    words = f"trim {tmp_path}/whole --hub {tmp_path}/data --output {tmp_path}/small --json"
    assert cli.run(words.split()) == 0
    assert {"the", "cat"} <= set(load_tokenizer(str(tmp_path / "small")).get_vocab())


def test_a_sentence_encoder_stays_one_and_older_files_are_cut_too(tmp_path: Path) -> None:
    written("bert", tmp_path / "whole", "encoder")
    write_pooling(Pooling("mean", True), tmp_path / "whole", hidden=24, tokens=32)
    backend_of(tokenizer_of("bert")).model.save(str(tmp_path / "whole"))
    opfa.trim(tmp_path / "whole", TEXTS, tmp_path / "small")
    assert read_pooling(str(tmp_path / "small")) == Pooling("mean", True)
    for each in FILES:
        assert (tmp_path / "small" / each).read_bytes() == (tmp_path / "whole" / each).read_bytes()
    new = load_tokenizer(str(tmp_path / "small")).get_vocab()
    assert (tmp_path / "small/vocab.txt").read_text().split("\n")[:-1] == sorted(
        new, key=new.__getitem__
    )


def test_a_run_keeps_its_zeros_and_its_recipe(
    sparse: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(sparse)
    recipe = finetune_recipe(sparse, examples)
    (run / "recipe.toml").write_text(recipe.to_toml())
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    words = ["trim", str(run), "--text", str(file), "--output", str(tmp_path / "small")]
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["covered"] == 1.0
    stated = [(each / "sparsity.json").read_bytes() for each in (sparse, tmp_path / "small")]
    assert stated[0] == stated[1]
    before, after = (opfa.inspect(str(each)) for each in (sparse, tmp_path / "small"))
    assert after["fingerprint"] == before["fingerprint"] and after["total"] == before["total"]
    assert (tmp_path / "small/recipe.toml").read_text() == recipe.to_public_toml()


def test_numbers_stay_as_short_as_the_file_had_them(tmp_path: Path) -> None:
    model = model_of("bert").half()
    write_model(model, tokenizer_of("bert"), tmp_path / "whole")
    found = opfa.trim(tmp_path / "whole", TEXTS, tmp_path / "small")
    assert found.bytes < found.of_bytes
    assert {
        p.dtype for p in transformers.AutoModel.from_pretrained(tmp_path / "small").parameters()
    } == {torch.half}


def test_a_vocabulary_that_cant_be_cut_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = written("bert", tmp_path / "whole")
    write_model(model, ByT5Tokenizer(), tmp_path / "slow")
    few = HEADS["classes"].from_config(BertConfig(**SIZES, vocab_size=20))
    write_model(few, tokenizer_of("bert"), tmp_path / "few")
    write_model(model, tokenizer_of("bert"), tmp_path / "8bit")
    (tmp_path / "8bit/quantization.safetensors").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "texts.jsonl").write_text('{"body": "the cat", "n": 3}\n')
    file = tmp_path / "texts.jsonl"
    cases: list[tuple[str, Any, dict[str, Any], type[OpfaError], str]] = [
        ("whole", "the cat", {}, RunError, "could be a text or a file; give"),
        ("whole", [], {}, RunError, "no texts: give files"),
        ("whole", ["", " "], {}, DataError, "the texts have no tokens"),
        ("whole", ["a"], {"min_count": 0}, RunError, "min_count = 0: must be 1 or more"),
        ("whole", tmp_path / "empty.jsonl", {}, DataError, "empty.jsonl: is empty"),
        ("whole", tmp_path / "none.txt", {}, DataError, "none.txt: no such file"),
        ("whole", file, {}, DataError, r"line 1: no column 'text' \(column\); there are 'body'"),
        ("whole", file, {"columns": "n"}, DataError, "line 1: 'n' is 3, not a text"),
        ("slow", ["a"], {}, ModelError, r"\(ByT5Tokenizer\) is not in the fast"),
        ("few", ["a"], {}, ModelError, "entries and the model's embedding only 20"),
        ("8bit", ["a"], {}, ModelError, "is in 8 bits; trim the model that it was made from"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for name, texts, options, kind, said in cases:
        with pytest.raises(kind, match=said):
            opfa.trim(tmp_path / name, texts, tmp_path / "small", **options)
    assert cli.run(["trim", str(tmp_path / "whole"), "--output", str(tmp_path / "small")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
