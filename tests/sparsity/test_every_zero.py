"""Every zero of a foreign sparse model is held: random models of four families whose rows, columns,
heads and matrices are empty, through training, 8 bits, every form of a release, and export.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OBJECTS, SUBJECTS, VERBS, finetune_recipe
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

import opfa
from opfa.compression import quant
from opfa.compression.pattern import Pattern
from opfa.downstream.calibrate import calibrate
from opfa.downstream.evaluate import evaluate_model
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import Quantization
from opfa.downstream.student import prepare_8_bits
from opfa.errors import ModelError
from opfa.inference.export import export
from opfa.models.configs import quiet_transformers, wordpiece_tokenizer
from opfa.releases.release import release, unpack
from opfa.releases.rounding import write_weights

WORDS = sorted({word for line in (*SUBJECTS, *VERBS, *OBJECTS) for word in line.split()})
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", ".", *WORDS]
HIDDEN, WIDE, HEADS, TOKENS = 8, 12, 2, len(VOCABULARY)
EMPTY = ("nothing", "anywhere", "rows", "columns", "head", "matrix", "all but one", "-0.0")
HEAD_CLASSES: dict[str, Any] = {  # Any: Auto classes share no base
    "bare": AutoModel,
    "masked-lm": AutoModelForMaskedLM,  # its projection is the embedding, with a padding row
    "classification": AutoModelForSequenceClassification,
}
SHAPE: dict[str, Any] = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_attention_heads": HEADS,
}
LAYERS: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": WIDE}
SPECIAL: dict[str, Any] = {
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
NARROW: dict[str, Any] = {"dim": HIDDEN, "hidden_dim": WIDE, "n_heads": HEADS, "pad_token_id": 0}


def config_of(family: str, num_layers: int) -> Any:
    if family == "distilbert":
        sizes: dict[str, Any] = {"vocab_size": TOKENS, "max_position_embeddings": 32}
        return DistilBertConfig(**NARROW, **sizes, n_layers=num_layers)
    if family == "modernbert":
        return ModernBertConfig(**SHAPE, **LAYERS, **SPECIAL, num_hidden_layers=num_layers)
    kind = BertConfig if family == "bert" else RobertaConfig
    return kind(**SHAPE, **LAYERS, num_hidden_layers=num_layers)


def empty(weight: Tensor, what: str, random: torch.Generator) -> None:
    """Put zeros into a matrix."""
    if what == "anywhere":
        weight[torch.rand(weight.shape, generator=random) < 0.7] = 0
    elif what == "rows":
        weight[::3] = 0
    elif what == "columns":
        weight[:, 1::2] = 0
    elif what == "head":
        weight[: weight.shape[0] // HEADS] = 0
    elif what == "matrix":
        weight.zero_()
    elif what == "all but one":
        weight.view(-1)[1:] = 0
    elif what == "-0.0":
        weight[:, 0] = -0.0


def sparse_model(family: str, head: str, emptiness: list[str], seed: int) -> PreTrainedModel:
    """A model of as many layers as the emptiness of their matrices in turn, at least 5 %."""
    torch.manual_seed(seed)
    config = config_of(family, 1 + seed % 2)
    config._attn_implementation = "eager"
    model = HEAD_CLASSES[head].from_config(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, layer in enumerate(Pattern().layers(model).values()):
            empty(layer.weight, emptiness[i % len(emptiness)], random)
    return model.eval()


def zeros_of(tensors: Any) -> dict[str, Tensor]:
    """Where the matrices of the numbered layers are zero."""
    return {n: t == 0 for n, t in tensors if "layer" in n and t.ndim == 2}


def assert_same_zeros(tensors: Any, expected: dict[str, Tensor]) -> None:
    found = zeros_of(tensors)
    assert found.keys() == expected.keys()
    for name, zeros in expected.items():
        assert torch.equal(found[name], zeros), name


def train(model: PreTrainedModel, optimizer: Any, steps: int = 2) -> None:
    model.train()
    ids = torch.arange(12).view(2, 6) % (TOKENS - 3) + 3
    for _ in range(steps):
        output = model(input_ids=ids)
        (output[0].float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


FOREIGN = {
    "family": st.sampled_from(["bert", "distilbert", "roberta", "modernbert"]),
    "head": st.sampled_from(list(HEAD_CLASSES)),
    "emptiness": st.lists(st.sampled_from(EMPTY), min_size=1, max_size=6).filter(
        lambda kinds: kinds[0] != "nothing"
    ),
    "seed": st.integers(0, 99),
}


@settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    **FOREIGN,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    scheme=st.sampled_from(["channel", "tensor"]),
    form=st.sampled_from(["dense", "compact", "compact-int8"]),
    written=st.sampled_from(["fp32", "fp16", "bf16"]),
)
def test_every_zero_is_held_by_a_lock_by_8_bits_and_by_every_form_of_a_release(
    family: str,
    head: str,
    emptiness: list[str],
    seed: int,
    dtype: torch.dtype,
    scheme: Any,
    form: Any,
    written: Any,
) -> None:
    model = sparse_model(family, head, emptiness, seed)
    nn.Module.to(model, dtype)
    zeros = zeros_of(model.state_dict().items())
    num_zeros = sum(int(mask.sum()) for mask in zeros.values())
    locked = opfa.lock(model)
    assert locked["total"]["zeros"] == num_zeros == opfa.inspect(model)["total"]["zeros"]
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
    assert opfa.fuse(model) == locked
    assert_same_zeros(model.state_dict().items(), zeros)
    assert opfa.lock(model) == locked
    layers = prepare_8_bits(model, Quantization(weights=scheme))
    assert layers.keys() == Pattern().layers(model).keys()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps=1)
    quant.start(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps=1)
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        run, output = Path(place) / "run", Path(place) / "output"
        run.mkdir()
        output.mkdir()
        quant.save(model, run / quant.FILE)
        assert opfa.fuse(model) == locked
        assert_same_zeros(model.state_dict().items(), zeros)
        model.save_pretrained(run)
        found = opfa.inspect(run)
        assert (found["fingerprint"], found["total"]) == (locked["fingerprint"], locked["total"])
        write_weights(run, output, set(locked["tensors"]), form=form, dtype=written)
        again = opfa.inspect(output)
        assert (again["fingerprint"], again["total"]) == (locked["fingerprint"], locked["total"])


def foreign(
    directory: Path,
    family: str,
    head: str,
    emptiness: list[str],
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Write a sparse model as others do, without sparsity.json, and tell where its zeros are."""
    model = sparse_model(family, head, emptiness, seed)
    nn.Module.to(model, dtype)
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    with quiet_transformers():
        model.save_pretrained(directory)
        wordpiece_tokenizer(ids, lowercase=True, tokens=32).save_pretrained(directory)
    return zeros_of(model.state_dict().items())


def named_alike(zeros: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By the names of a model with a head; a bare encoder has no prefix."""
    return {prefix + name.removeprefix(prefix): mask for name, mask in zeros.items()}


IS_LONG = settings.get_current_profile_name() == "many"
IN_8_BITS = {"seed": 1, "dtype": torch.float32, "bits": 8, "form": "compact-int8"}


# Three models; with 200 random ones, which take some 20 minutes of one free core:
# python -m pytest tests/test_every_zero.py -k from_fine_tuning --hypothesis-profile=many
@settings(
    max_examples=200,
    phases=[Phase.explicit, Phase.generate] if IS_LONG else [Phase.explicit],
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    **FOREIGN,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bits=st.sampled_from([None, 8]),
    form=st.sampled_from(["dense", "compact", "compact-int8"]),
)
@example(
    family="bert",
    head="masked-lm",
    emptiness=["matrix", "anywhere", "nothing", "rows"],
    **IN_8_BITS,
)
@example(family="distilbert", head="bare", emptiness=["columns", "matrix"], **IN_8_BITS)
@example(family="modernbert", head="classification", emptiness=["matrix"], **IN_8_BITS)
def test_every_zero_is_held_from_fine_tuning_in_8_bits_to_release_and_export(
    examples: Path,
    family: str,
    head: str,
    emptiness: list[str],
    seed: int,
    dtype: torch.dtype,
    bits: int | None,
    form: Any,
) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place)
        zeros = foreign(path / "foreign", family, head, emptiness, seed, dtype)
        zeros = named_alike(zeros, "model." if family == "modernbert" else f"{family}.")
        options = {"training": {"epochs": 0.3, "batch": 8, "learning_rate": 0.1, "dropout": 0.0}}
        quantization = {"quantization": {"bits": bits}} if bits else {}
        recipe = finetune_recipe(path / "foreign", examples, **options, **quantization)
        results = finetune(recipe, path / "run")
        model = load_file(path / "run/model/model.safetensors")
        assert_same_zeros(model.items(), zeros)
        assert results.quantized == bool(bits)
        num_zeros = sum(int(mask.sum()) for mask in zeros.values())
        stated = opfa.inspect(path / "run/model")
        assert (stated["stated"], stated["total"]["zeros"]) == ("matches", num_zeros)
        form = form if bits else form.removesuffix("-int8")
        release(path / "run", path / "small", form=form)
        released = ["small"]
        if form != "dense":
            unpack(path / "small", path / "plain")
            released.append("plain")
        for directory in released:
            found = opfa.inspect(path / directory)
            assert (found["stated"], found["fingerprint"]) == ("matches", stated["fingerprint"])
        if family == "bert" or IS_LONG:  # about 5 seconds each; two of these matrices are equal
            exported = export(str(path / "run/model"), path / "model.onnx")
            assert exported.fingerprint.onnx == stated["fingerprint"]
            assert exported.precision == ("int8" if bits else "fp32")


def test_a_zero_matrix_is_locked_counted_and_held_in_fine_tuning_and_calibration(
    examples: Path, tmp_path: Path
) -> None:
    """Its layers' other matrices may be dense, and the file in 16 bits."""
    directory = tmp_path / "foreign"
    model = sparse_model("bert", "masked-lm", ["nothing"], seed=1)
    nn.Module.to(model, torch.bfloat16)
    zeros = foreign(directory, "bert", "masked-lm", ["nothing"])
    empties = ["layer.0.attention.self.query", "layer.1.intermediate.dense"]
    for name in (f"bert.encoder.{path}.weight" for path in empties):
        model.get_parameter(name).data.zero_()
        zeros[name] = torch.ones_like(zeros[name])
    with quiet_transformers():
        model.save_pretrained(directory)
    counted = opfa.inspect(directory)
    assert counted["total"] == {"zeros": 64 + 96, "size": 64 + 96, "sparsity": 1.0}
    assert [row["pattern"] for row in counted["patterns"].values()] == ["empty"] * 2
    assert counted["layers"][0]["kinds"]["attention.self.query"] == 1.0
    training = {"epochs": 0.5, "batch": 8, "learning_rate": 0.1}
    recipe = finetune_recipe(directory, examples, training=training)
    assert finetune(recipe, tmp_path / "run").sparsity == 1.0
    assert_same_zeros(load_file(tmp_path / "run/model/model.safetensors").items(), zeros)
    calibrate(str(tmp_path / "run/model"), recipe, tmp_path / "eight", num_examples=8)
    assert_same_zeros(load_file(tmp_path / "eight/model.safetensors").items(), zeros)
    assert opfa.inspect(tmp_path / "eight")["fingerprint"] == counted["fingerprint"]


def test_a_new_head_of_zeros_is_neither_locked_nor_counted_and_learns() -> None:
    model = sparse_model("distilbert", "classification", ["matrix", "rows"], seed=0)
    head = model.get_submodule("classifier")
    nn.init.zeros_(head.get_parameter("weight"))
    assert "classifier.weight" not in opfa.lock(model)["tensors"]
    assert "classifier.weight" not in opfa.inspect(model)["tensors"]
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    opfa.fuse(model)
    assert (head.get_parameter("weight") != 0).all()


# stored apart from masks


@pytest.mark.parametrize("how", ["prune", "mask beside"])
def test_a_model_whose_masks_are_not_applied_is_not_fine_tuned(
    examples: Path, tmp_path: Path, how: str
) -> None:
    directory = tmp_path / "foreign"
    foreign(directory, "bert", "classification", ["rows"])
    model = sparse_model("bert", "classification", ["rows"], seed=1)
    layers = list(Pattern().layers(model).values())
    if how == "prune":
        for layer in layers:
            prune.random_unstructured(layer, "weight", amount=0.5)
        message = r"weight_orig: this weight is stored apart .* call torch.nn.utils.prune.remove\("
    else:
        layers[-1].register_buffer("mask", torch.zeros_like(layers[-1].weight))
        message = "a mask that is not applied: .* multiply the two"
    with quiet_transformers():
        model.save_pretrained(directory)
    with pytest.raises(ModelError, match=message):
        finetune(finetune_recipe(directory, examples), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# 8 bits of dense matrices


def only_feed_forward(directory: Path) -> dict[str, Tensor]:
    return foreign(directory, "bert", "masked-lm", [*["nothing"] * 4, "rows", "columns"])


SHORT = {"epochs": 0.3, "batch": 8, "learning_rate": 0.01}


@pytest.mark.parametrize("zeros", ["held", "free", "pruned"])
def test_all_matrices_of_the_layers_are_in_8_bits_whichever_are_sparse(
    zeros: str, examples: Path, tmp_path: Path
) -> None:
    expected = only_feed_forward(tmp_path / "foreign")
    sections: dict[str, Any] = {"training": SHORT, "quantization": {"bits": 8}}
    if zeros != "held":
        sections["model"] = {"zeros": "free"}
    if zeros == "pruned":
        schedule = {"start": 0, "end": 1, "every": 1, "target": 0.75}
        sections["pruning"] = {"schedule": schedule, "pattern": {"include": ["intermediate"]}}
    recipe = finetune_recipe(tmp_path / "foreign", examples, **sections)
    results = finetune(recipe, tmp_path / "run")
    assert results.quantized
    ranges = load_file(tmp_path / "run/model" / quant.FILE)
    scales = [name for name in ranges if name.endswith("weight_scale")]
    assert sorted(scales) == sorted(f"{name}_scale" for name in expected)
    found = opfa.inspect(tmp_path / "run/model")
    assert found["stated"] == "matches"  # it says nothing of matrices that are only in 8 bits
    sparse = {name for name in found["tensors"] if found["tensors"][name]["zeros"]}
    if zeros == "held":
        assert sparse == set(found["tensors"]) == {n for n in expected if expected[n].any()}
        release(tmp_path / "run", tmp_path / "small", form="compact-int8")
        assert opfa.inspect(tmp_path / "small")["fingerprint"] == found["fingerprint"]
        again = evaluate_model(str(tmp_path / "small"), recipe)
        assert again.quantized
    elif zeros == "pruned":
        pruned = [name for name in expected if "intermediate" in name]
        assert [found["tensors"][name]["sparsity"] for name in pruned] == [0.75, 0.75]


def test_calibration_puts_dense_matrices_in_8_bits_too(examples: Path, tmp_path: Path) -> None:
    expected = only_feed_forward(tmp_path / "foreign")
    recipe = finetune_recipe(tmp_path / "foreign", examples, training=SHORT)
    finetune(recipe, tmp_path / "run")
    calibrate(str(tmp_path / "run/model"), recipe, tmp_path / "eight", num_examples=8)
    ranges = load_file(tmp_path / "eight" / quant.FILE)
    assert {f"{name}_scale" for name in expected} <= set(ranges)
    fingerprints = [opfa.inspect(tmp_path / d)["fingerprint"] for d in ("run/model", "eight")]
    assert fingerprints[0] == fingerprints[1]
