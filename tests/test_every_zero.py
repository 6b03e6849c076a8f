"""Every zero of a foreign sparse model is held: random models of four families whose rows, columns,
heads and matrices are empty, through training, 8 bits, every form of a release, and export.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
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
from opfa import quant
from opfa.downstream.recipe import Quantization
from opfa.downstream.student import prepare_8_bits
from opfa.models import quiet_transformers
from opfa.sparsity.pattern import Pattern
from opfa.weights import write_weights

HIDDEN, WIDE, HEADS, TOKENS = 8, 12, 2, 20
EMPTY = ("nothing", "anywhere", "rows", "columns", "head", "matrix", "all but one", "-0.0")
HEAD_CLASSES: dict[str, Any] = {  # Any: Auto classes share no base
    "bare": AutoModel,
    "masked-lm": AutoModelForMaskedLM,  # its projection is the embedding, with a padding row
    "classification": AutoModelForSequenceClassification,
}
SHAPE = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "num_attention_heads": HEADS,
}
LAYERS = {"hidden_size": HIDDEN, "intermediate_size": WIDE}
SPECIAL = {"cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
NARROW = {"dim": HIDDEN, "hidden_dim": WIDE, "n_heads": HEADS, "pad_token_id": 0}


def config_of(family: str, num_layers: int) -> Any:
    if family == "distilbert":
        sizes = {"vocab_size": TOKENS, "max_position_embeddings": 16}
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
        output[0].float().square().mean().backward()
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
    model = sparse_model(family, head, emptiness, seed).to(dtype)
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
