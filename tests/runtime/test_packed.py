"""Packed models: the same numbers as the checkpoint's, mapped, and refused when damaged."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CONFIGS, batch, in_8_bits, sparse
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    PreTrainedModel,
)
from words import WORDS

import opfa
from opfa.compression import quant
from opfa.errors import ModelError, OpfaError, RunError
from opfa.models.configs import wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.models.sentences import FILES, Pooling, write_pooling
from opfa.runtime import load, packing
from opfa.runtime.packing import BLOCK, COLUMNS, check, pack
from opfa.storage.foreign import PACKED
from opfa.weights import sealed

HEADS = {
    "sequences": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "choices": AutoModelForMultipleChoice,
    "words": AutoModelForMaskedLM,
    "none": AutoModel,
}
ENCODER = re.compile(r"encoder\.layer\..*(?<!LayerNorm)\.weight$")
Change = Callable[[dict[str, Any], bytearray], object]


def saved(model: PreTrainedModel, path: Path) -> Path:
    """A model with a tokenizer in a directory."""
    words = [*WORDS, *(f"word{i}" for i in range(model.config.vocab_size - len(WORDS)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    write_model(model, wordpiece_tokenizer(vocabulary, lowercase=True, tokens=300), path)
    return path


def answers(model: PreTrainedModel, lengths: list[int] | None = None) -> list[torch.Tensor]:
    """What a model says to tokens of some lengths."""
    torch.manual_seed(1)
    inputs = batch(lengths or [7, 40, 90], model.config.pad_token_id)
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: value[:2].unsqueeze(0) for name, value in inputs.items()}
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Both answer the same, bit for bit."""
    for one, two in zip(answers(model), answers(other), strict=True):
        assert torch.equal(one, two)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = sparse(AutoModelForSequenceClassification, CONFIGS["bert"])
    return saved(model, tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "bert"
    opfa.pack(checkpoint, output)
    return output


@pytest.mark.parametrize(
    ("family", "dtype"), [*((name, "fp32") for name in CONFIGS), ("roberta", "bf16")]
)
def test_a_packed_model_computes_as_its_checkpoint(family: str, dtype: Any, tmp_path: Path) -> None:
    model = sparse(AutoModelForSequenceClassification, CONFIGS[family])
    path = saved(model, tmp_path / "model")
    found = opfa.pack(path, tmp_path / "packed", dtype=dtype)
    assert (found.family, found.dtype) == (family, dtype)
    assert_same(load(tmp_path / "packed"), load(path, dtype=dtype))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_packed(head: str, tmp_path: Path) -> None:
    path = saved(sparse(HEADS[head], CONFIGS["bert"]), tmp_path / "model")
    opfa.pack(path, tmp_path / "packed")
    assert_same(load(tmp_path / "packed"), load(path))


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    path = saved(sparse(HEADS["words"], CONFIGS["bert"]), tmp_path / "model")
    opfa.pack(path, tmp_path / "packed")
    model: Any = load(tmp_path / "packed")
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_models_in_8_bits_are_packed_so(family: str, tmp_path: Path) -> None:
    model = sparse(AutoModelForSequenceClassification, CONFIGS[family])
    path = saved(model, tmp_path / "model")
    quant.save(in_8_bits(model), path / quant.FILE)
    assert opfa.pack(path, tmp_path / "packed").dtype == "int8"
    assert_same(load(tmp_path / "packed"), load(path))


def test_a_sentence_encoder_keeps_its_files(tmp_path: Path) -> None:
    path = saved(sparse(AutoModel, CONFIGS["bert"]), tmp_path / "model")
    write_pooling(Pooling(), path, hidden=96, tokens=50)
    opfa.pack(path, tmp_path / "packed")
    for name in FILES:
        assert (tmp_path / "packed" / name).read_bytes() == (path / name).read_bytes()
    model = load(tmp_path / "packed")
    assert isinstance(model, BertModel)
    assert_same(model, load(path))


def test_the_result_counts(packed: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = opfa.pack(checkpoint, tmp_path / "again")
    weights = load_file(checkpoint / "model.safetensors")
    live = sum(np.count_nonzero(w) for n, w in weights.items() if ENCODER.search(n))
    assert (found.live, found.sparse, found.dense) == (live, 8, 0)
    assert found.bytes == (tmp_path / "again" / PACKED).stat().st_size
    assert found.matrix_bytes / live == found.bytes_a_weight < 7  # of small matrices
    assert "bytes a live weight" in str(found) and "opfa.runtime.load" in str(found)
    same = [(path / PACKED).read_bytes() for path in (packed, tmp_path / "again")]
    assert same[0] == same[1]


def test_a_reader_by_the_page_of_the_format_finds_every_weight(
    packed: Path, checkpoint: Path
) -> None:
    """As FORMAT.md says it, without code of ours."""
    stored, found = load_file(packed / PACKED), {}
    with safe_open(packed / PACKED, "np") as file:
        metadata = file.metadata()
    for number, entry in enumerate(json.loads(metadata["matrices"])):
        names = ("values", "indices", "visits", "starts", "entries")
        values, indices, visits, starts, entries = (stored[f"matrix.{number}.{n}"] for n in names)
        visits = visits.astype(int)
        rows, columns, block, tile = (entry[key] for key in ("rows", "columns", "block", "tile"))
        weight, first, num_tiles = np.zeros((rows, columns), np.float32), 0, -(-columns // tile)
        for place in range(len(starts) - 1):
            b, t = divmod(place, num_tiles)
            assert t or first == entries[b]
            for row, count in visits[starts[place] : starts[place + 1]]:
                places = t * tile + indices[first : first + count].astype(int)
                weight[b * block + row, places] = values[first : first + count]
                first += count
        layers = np.split(weight, len(entry["layers"]))
        found |= {
            f"{name}.weight": part for name, part in zip(entry["layers"], layers, strict=True)
        }
    expected = load_file(checkpoint / "model.safetensors")
    assert set(found) == {name for name in expected if ENCODER.search(name)}
    for name, weight in found.items():
        assert np.array_equal(weight, expected[name])
    others = {n: a for n, a in stored.items() if not n.startswith(("matrix.", "padding."))}
    for name in set(others) & set(expected):
        assert np.array_equal(others[name], expected[name])


def test_visits_are_those_of_a_plain_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_DENSITY", 1.0)
    generator = np.random.default_rng(0)
    for rows, columns, density in ((300, 401, 0.1), (1, 1, 1.0), (129, 191, 0.5), (5, 7, 0.0)):
        is_live = generator.random((rows, columns)) < density
        weight = np.where(is_live, generator.normal(size=is_live.shape), 0).astype(np.float32)
        found = pack(weight)
        row, column = np.nonzero(weight)
        block, tile = row // BLOCK, column // COLUMNS
        visit = row * columns + tile
        order = np.lexsort((column, row, -np.bincount(visit, minlength=1)[visit], tile, block))
        assert np.array_equal(found.arrays["values"], weight[row, column][order])
        assert np.array_equal(found.arrays["indices"], (column % COLUMNS)[order])
        check(found)


def test_the_file_is_mapped_and_arrays_begin_at_lines_of_the_cache(packed: Path) -> None:
    model = load(packed)
    embeddings: Any = model.get_input_embeddings()
    table = embeddings.weight.data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str((packed / PACKED).resolve())]
    assert any(int(start, 16) <= table < int(end, 16) for start, end in ranges)
    with (packed / PACKED).open("rb") as file:
        header, offset = sealed.read_header(file)
    del header[sealed.METADATA]
    starts = {name: value["data_offsets"][0] for name, value in header.items()}
    assert offset % 64 == 0
    assert not [n for n, start in starts.items() if start % 64 and not n.startswith("padding.")]


def changed(packed: Path, change: Change, path: Path, *, is_sealed: bool = True) -> Path:
    """A copy of a packed directory whose file was changed, with a digest that is right again."""
    shutil.copytree(packed, path)
    with (packed / PACKED).open("rb") as file:
        header, offset = sealed.read_header(file)
        file.seek(offset)
        data = bytearray(file.read())
    change(header, data)
    if is_sealed:
        digest = sealed.begin(header)
        digest.update(data)
        header[sealed.METADATA][sealed.SHA256] = digest.hexdigest()
    text = sealed.to_json(header)
    text = text.ljust(len(text) - (len(text) + 8) % -64)
    (path / PACKED).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def place(header: dict[str, Any], name: str) -> int:
    return header[name]["data_offsets"][0]


def set_entry(key: str, value: Any) -> Change:
    def change(header: dict[str, Any], _: bytearray) -> None:
        entries = json.loads(header[sealed.METADATA]["matrices"])
        entries[0][key] = value
        header[sealed.METADATA]["matrices"] = json.dumps(entries)

    return change


def set_byte(name: str, offset: int, value: int) -> Change:
    def change(header: dict[str, Any], data: bytearray) -> None:
        data[place(header, name) + offset] = value

    return change


def swap(one: str, two: str) -> Change:
    def change(header: dict[str, Any], _: bytearray) -> None:
        header[one], header[two] = header[two], header[one]

    return change


def set_facts(**values: str) -> Change:
    return lambda header, _: header[sealed.METADATA].update(values)


HOSTILE: dict[str, tuple[Change, str]] = {
    "a column beyond the tile": (set_byte("matrix.0.indices", 5, 255), "columns: can't be right"),
    "a visit of a row beyond the block": (set_byte("matrix.0.visits", 0, 255), "visits: can't"),
    "more weights in a visit": (set_byte("matrix.0.visits", 1, 200), "visits: can't"),
    "fewer weights in a visit": (set_byte("matrix.0.visits", 1, 0), "can't be right"),
    "another first visit": (set_byte("matrix.0.starts", 7, 255), "first visits: can't"),
    "another first weight": (set_byte("matrix.0.entries", 6, 9), "first live weights of blocks"),
    "arrays that are swapped": (swap("matrix.0.indices", "matrix.1.indices"), "indices: is uint8"),
    "a matrix of another": (swap("matrix.0.starts", "matrix.0.entries"), "first visits"),
    "fewer rows": (set_entry("rows", 287), "visits: can't be right"),
    "fewer columns": (set_entry("columns", 90), "can't be right"),
    "another block": (set_entry("block", 64), "starts: is uint32"),
    "a block of 300": (set_entry("block", 300), "less than or equal to 256"),
    "dense": (set_entry("block", 0), "block = 0, tile = 192"),
    "negative rows": (set_entry("rows", -1), "greater than or equal to 1"),
    "more live weights": (
        set_entry("num_live", 1 << 40),
        "live weights of 27,648",
    ),
    "another type": (set_entry("dtype", "bf16"), "values: is float32"),
    "a type that nobody has": (set_entry("dtype", "fp7"), "dtype 'fp7'"),
    "an input without int8": (set_entry("input", {"scale": 1.0, "zero": 3}), "input: is "),
    "another layer": (set_entry("layers", ["bert.pooler.dense"]), "is missing"),
    "an unknown key": (set_entry("size", 3), "Extra inputs"),
    "another version": (set_facts(**{"opfa-packed": "2"}), "this opfa reads '1'; pack the model"),
    "another family": (set_facts(family="roberta"), "is of 'roberta'"),
    "no JSON": (set_facts(matrices="]"), "Invalid JSON"),
    "no matrices": (set_facts(matrices="[]"), "matrix.0.bias: of no matrix"),
    "a tensor of another model": (swap("classifier.bias", "classifier.weight"), "classifier."),
    "a tensor that is missing": (lambda h, _: h.pop("classifier.bias"), "not a packed file"),
    "a tensor too many": (lambda h, _: h.update(more=h.pop("classifier.bias")), "is missing"),
    "an array that ends elsewhere": (
        lambda h, _: h["matrix.0.visits"]["data_offsets"].__setitem__(1, 1 << 60),
        "not a packed file",
    ),
    "half of the data": (lambda _, data: data.__delitem__(slice(1000, None)), "not a packed file"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_file_is_refused(damage: str, packed: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[damage]
    path = changed(packed, change, tmp_path / "hostile")
    with pytest.raises(ModelError, match="packed.safetensors: ") as refused:
        load(path)
    assert message in str(refused.value)


def test_any_byte_that_changed_is_found(packed: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "damaged", (packed / PACKED).read_bytes()
    shutil.copytree(packed, path)
    generator = np.random.default_rng(0)
    for place in [9, 40, len(content) - 1, *generator.integers(len(content), size=40)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        (path / PACKED).write_bytes(damaged)
        with pytest.raises(ModelError):
            load(path)
    for size in [0, 5, 8, 100, len(content) // 2, len(content) - 1]:
        (path / PACKED).write_bytes(content[:size])
        with pytest.raises(ModelError):
            load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 192),
        ("intermediate_size", 300),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 90_000),
        ("num_attention_heads", 5),
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("vocab_size", 1 << 40),
        ("hidden_act", "gelv"),
        ("hidden_act", []),
        ("dtype", "float16"),
        ("architectures", ["BertForQuestionAnswering"]),
        ("model_type", "roberta"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    key: str, value: Any, packed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "packed"
    shutil.copytree(packed, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(OpfaError):
        load(path)


def test_it_says_how_it_was_packed_and_from_what(packed: Path) -> None:
    with pytest.raises(
        RunError, match=r"is packed in fp32; `opfa pack` its model \(.*bert\) again"
    ):
        load(packed, dtype="bf16")
    with safe_open(packed / PACKED, "pt") as file:
        assert file.metadata()["family"] == "bert"


def test_commands_that_need_weights_name_the_model_that_was_packed(
    packed: Path, tmp_path: Path
) -> None:
    message = r"is packed for the runtime.* give the model that it was made from \(.*/bert\)"
    for use in (opfa.inspect, opfa.load, lambda path: opfa.pack(path, tmp_path / "again")):
        with pytest.raises(ModelError, match=message):
            use(str(packed))


def test_bad_options_are_refused_before_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="dtype = 'fp8': must be one of fp32, bf16, int8"):
        opfa.pack(checkpoint, tmp_path / "new", dtype="fp8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="has no 8-bit ranges"):
        opfa.pack(checkpoint, tmp_path / "new", dtype="int8")
    with pytest.raises(RunError, match="exists already"):
        opfa.pack(checkpoint, tmp_path)
    assert not (tmp_path / "new").exists()
