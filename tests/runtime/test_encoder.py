"""Whole encoders in the kernels against torch: families, heads, lengths, dtypes, refusals."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CONFIGS, ENTRIES, LENGTHS, batch, in_8_bits, sparse
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedModel,
    pipeline,
)
from words import WORDS, tiny

from opfa import runtime
from opfa.errors import ModelError, RunError
from opfa.models.configs import wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.runtime import encoder
from opfa.runtime.encoder import with_kernels
from opfa.runtime.library import levels, library
from opfa.runtime.threads import num_threads

CLASSES = [
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
]


def directory(path: Path) -> Path:
    """A tiny classifier with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny(num_labels=3))
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    write_model(model, wordpiece_tokenizer(vocabulary, lowercase=True, tokens=32), path)
    return path


def difference(model: PreTrainedModel, other: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """The largest difference of the first output on real tokens."""
    with torch.no_grad():
        a, b = model(**inputs)[0], other(**inputs)[0]
    if a.shape[:2] == inputs["input_ids"].shape:
        a, b = (each[inputs["attention_mask"].bool()] for each in (a, b))
    return float((a - b).abs().max())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", CONFIGS)
def test_fp32_is_torchs_to_1e_4(family: str, cls: Any) -> None:
    model = sparse(cls, CONFIGS[family])
    found = with_kernels(copy.deepcopy(model), 2)
    for lengths in LENGTHS:
        assert difference(model, found, batch(lengths, model.config.pad_token_id)) < 1e-4


@pytest.mark.parametrize("family", CONFIGS)
def test_int8_is_torchs_but_for_roundings_that_fall_to_the_other_side(family: str) -> None:
    model = in_8_bits(sparse(AutoModel, CONFIGS[family]))
    found = with_kernels(copy.deepcopy(model), 2, "int8")
    plain = with_kernels(copy.deepcopy(model), 2)
    for lengths in LENGTHS:
        inputs = batch(lengths, model.config.pad_token_id)
        assert difference(model, found, inputs) < difference(model, plain, inputs) / 4


@pytest.mark.parametrize("options", [{"only": "1.output.dense"}, {"embeddings": True}])
def test_a_part_in_8_bits_computes_so(options: dict[str, Any]) -> None:
    model = in_8_bits(sparse(AutoModel, CONFIGS["bert"]), **options)
    found = with_kernels(copy.deepcopy(model), 2, "int8")
    plain = with_kernels(copy.deepcopy(model), 2)
    for lengths in LENGTHS:
        inputs = batch(lengths, 0)
        assert difference(model, found, inputs) < difference(model, plain, inputs) / 4


@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_has_the_precision_of_bf16(family: str) -> None:
    model = sparse(AutoModel, CONFIGS[family])
    found = with_kernels(copy.deepcopy(model), 2, "bf16")
    rounded = copy.deepcopy(model).bfloat16()
    for lengths in LENGTHS:
        inputs = batch(lengths, model.config.pad_token_id)
        assert 0 < difference(model, found, inputs) < difference(model, rounded, inputs)


@pytest.mark.parametrize("sparsity", [0.0, 0.45, 0.55, 1.0])
def test_any_density_is_right(sparsity: float) -> None:
    model = sparse(AutoModel, CONFIGS["bert"], sparsity)
    for dtype, most in [("fp32", 1e-4), ("bf16", 0.2)]:
        found = with_kernels(copy.deepcopy(model), 1, dtype)
        assert difference(model, found, batch([70, 3], 0)) < most


def test_torch_has_one_thread_in_a_call_and_its_own_number_after_it() -> None:
    found = with_kernels(sparse(AutoModelForSequenceClassification, CONFIGS["bert"]), 1)
    many = BertConfig(**{**CONFIGS["bert"].to_dict(), "vocab_size": 1 << 16})
    large = with_kernels(sparse(AutoModelForMaskedLM, many), 1)
    inputs, seen = batch([5], 0), list[int]()
    torch.set_num_threads(2)
    try:
        for model in (found, large):
            last = next(m for m in reversed([*model.modules()]) if type(m) is torch.nn.Linear)
            last.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
            with torch.no_grad():
                model(**inputs)
            with pytest.raises(RunError, match="output_attentions"):
                model(**inputs, output_attentions=True)
            seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 2, 2, 2]


def test_types_of_tokens_and_positions_are_heard() -> None:
    model = sparse(AutoModel, CONFIGS["bert"])
    found = with_kernels(copy.deepcopy(model), 1)
    inputs = batch([40, 12], 0)
    types = torch.randint(0, 2, (2, 40))
    positions = torch.randint(0, 500, (2, 40))
    assert difference(model, found, {**inputs, "token_type_ids": types}) < 1e-4
    assert difference(model, found, {**inputs, "position_ids": positions}) < 1e-4
    left = {name: value.flip(1) for name, value in inputs.items()}  # padded to the left
    assert difference(model, found, left) < 1e-4


def test_threads_and_callers_give_the_same_bits() -> None:
    model = sparse(AutoModel, CONFIGS["modernbert"])
    inputs = batch([200, 1, 70, 130], 0)
    cores = num_threads(None)
    several = [with_kernels(copy.deepcopy(model), n) for n in (1, min(2, cores), 4)]
    with torch.no_grad():
        expected, *others = (each(**inputs)[0] for each in several)
        assert all(torch.equal(expected, other) for other in others)
        found: list[bool] = []

        def call() -> None:
            with torch.no_grad():
                found.extend(torch.equal(several[1](**inputs)[0], expected) for _ in range(10))

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert found == [True] * 40


class Raced(list[Any]):
    """Says that it has items after another thread took the last one."""

    def __bool__(self) -> bool:
        return True


def test_a_workspace_that_another_caller_took_is_made_anew() -> None:
    found = with_kernels(sparse(AutoModel, CONFIGS["bert"]), 1)
    inputs = batch([40, 12], 0)
    expected = found(**inputs)[0]
    vars(found)["runner"].workspaces = Raced()
    assert torch.equal(found(**inputs)[0], expected)


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (AlbertConfig(vocab_size=ENTRIES, hidden_size=32, num_attention_heads=2), "model_type"),
        (BertConfig(vocab_size=ENTRIES, num_hidden_layers=1, hidden_act="mish"), "activation 'mi"),
        (BertConfig(vocab_size=ENTRIES, num_hidden_layers=1, is_decoder=True), "is_decoder = true"),
        (BertConfig(vocab_size=ENTRIES, num_hidden_layers=1, num_attention_heads=2), "768 chann"),
    ],
)
def test_what_the_kernels_do_not_know_stays_in_torch(config: Any, where: str) -> None:
    model = sparse(AutoModel, config)
    inputs = batch([9, 4], 0)
    expected = model(**inputs)[0]
    assert runtime.speed_up(model).startswith(f"torch ({where}")
    assert torch.equal(model(**inputs)[0], expected)


def test_encoders_are_sped_up_but_dense_ones_only_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder, "SLOW_WHEN_DENSE", ())
    for zeros in (0.9, 0.0):
        model = sparse(AutoModel, CONFIGS["bert"], zeros)
        assert runtime.speed_up(model).startswith("opfa's kernels (fp32, ")
    quantized = in_8_bits(sparse(AutoModel, CONFIGS["bert"]))
    assert runtime.speed_up(quantized).startswith("opfa's kernels (int8, ")
    now = encoder.level()
    monkeypatch.setattr(encoder, "SLOW_WHEN_DENSE", (now,))
    model = sparse(AutoModel, CONFIGS["bert"])
    assert runtime.speed_up(model).startswith("opfa's kernels (fp32, ")
    quantized = in_8_bits(sparse(AutoModel, CONFIGS["bert"], 0.0))
    assert runtime.speed_up(quantized).startswith("opfa's kernels (int8, ")
    dense = sparse(AutoModel, CONFIGS["bert"], 0.0)
    told = f"torch (100% of the weights live; at most 50% gain with {now} kernels)"
    assert runtime.speed_up(dense) == told
    monkeypatch.setattr(encoder, "why_not", lambda: "no compiler")
    assert runtime.speed_up(sparse(AutoModel, CONFIGS["bert"])) == "torch (no compiler)"


def test_hidden_states_of_padding_are_zero_and_rows_of_padding_alone_too() -> None:
    found = with_kernels(sparse(AutoModel, CONFIGS["bert"]), 1)
    inputs = batch([3, 9], 0)
    inputs["attention_mask"][0] = 0
    hidden = found(**inputs).last_hidden_state
    assert not hidden[0].any()
    assert hidden[1].any()


@pytest.fixture(params=["amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "plain", "neon"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of instructions that this CPU has."""
    if request.param not in levels():
        pytest.skip(f"this CPU has no {request.param}")
    library().opfa_choose(request.param.encode())
    yield request.param
    library().opfa_choose(levels()[0].encode())


def test_every_level_is_right(level: str) -> None:
    model = sparse(AutoModel, CONFIGS["distilbert"])
    quantized = in_8_bits(copy.deepcopy(model))
    inputs = batch([5, 33, 64], 0)
    for dtype, most in [("fp32", 1e-4), ("bf16", 0.05), ("int8", 0.02)]:
        expected = quantized if dtype == "int8" else model
        found = with_kernels(copy.deepcopy(expected), 1, dtype)
        assert difference(expected, found, inputs) < most, level


def test_pipelines_and_sentence_transformers_hold_it(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    path = directory(tmp_path / "model")
    texts = ["good film .", "who beat rome in paris ?"]
    classify = pipeline("text-classification", model=str(path))
    expected = classify(texts)
    classify.model = runtime.load(path)
    for one, other in zip(classify(texts), expected, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    sentences = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    before = sentences.encode(texts)
    with_kernels(sentences[0].auto_model, 1)
    assert sentences.encode(texts) == pytest.approx(before, abs=1e-5)


def refused(found: Any, error: type[Exception], match: str, **inputs: Any) -> None:
    with pytest.raises(error, match=match):
        found(**inputs)


def test_what_the_kernels_lack_is_refused() -> None:
    found = with_kernels(sparse(AutoModel, CONFIGS["roberta"]), 1)
    ids = torch.full((2, 8), 7)
    mask = torch.ones_like(ids)
    refused(found, RunError, "inputs_embeds", inputs_embeds=torch.zeros(1, 2, 96))
    refused(found, RunError, "output_attentions", input_ids=ids, output_attentions=True)
    refused(found, RunError, "input_ids", input_ids=None)
    refused(
        found, RunError, r"attention_mask: is \[2, 4\]", input_ids=ids, attention_mask=mask[:, 4:]
    )
    mask[0, 3] = 0
    refused(found, RunError, "stand together", input_ids=ids, attention_mask=mask)
    refused(
        found,
        RunError,
        f"input_ids: {ENTRIES} is not in the model's {ENTRIES}",
        input_ids=ids + ENTRIES - 7,
    )
    refused(
        found,
        RunError,
        "position_ids: 601 is not in the model's 512",
        input_ids=torch.full((1, 600), 7),
    )
    with pytest.raises(RunError, match="can't be saved"):
        found.save_pretrained("anywhere")
    rotating = with_kernels(sparse(AutoModel, CONFIGS["modernbert"]), 1)
    refused(rotating, RunError, "601 tokens", input_ids=torch.full((1, 601), 7))
    found.train()
    refused(found, RunError, "forward only", input_ids=ids)


def test_other_families_activations_dtypes_and_threads_are_refused(tmp_path: Path) -> None:
    albert = AutoModel.from_config(AlbertConfig(hidden_size=32, num_attention_heads=2))
    with pytest.raises(ModelError, match="model_type 'albert': the runtime runs bert, "):
        with_kernels(albert, 1)
    tanh = BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, hidden_act="mish")
    with pytest.raises(ModelError, match="activation 'mish'"):
        with_kernels(AutoModel.from_config(tanh), 1)
    with pytest.raises(RunError, match="threads = 999: must be from 1 to"):
        num_threads(999)
    path = directory(tmp_path / "model")
    with pytest.raises(ModelError, match="no 8-bit ranges"):
        runtime.load(path, dtype="int8")
    with pytest.raises(RunError, match="dtype = 'fp16': must be one of fp32, bf16, int8"):
        runtime.load(path, dtype="fp16")  # pyright: ignore[reportArgumentType]
