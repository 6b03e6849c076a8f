"""Masked layers: what a lock holds, through which training, and what fusing leaves."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
)

from opfa.compression.pattern import Pattern
from opfa.errors import ModelError
from opfa.sparsity import layers as module
from opfa.sparsity.layers import (
    MaskedLinear,
    _product,
    fuse,
    hold_weights,
    lock,
    mask_layers,
    masked_layers,
    masks_of,
    set_masks,
    zero_masks,
)

TINY = BertConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)))


def sparse_net() -> Net:
    """A chessboard of zeros in each weight, some of them negative zeros."""
    random = torch.Generator().manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 2:
            parameter.data[::2, ::2] *= 0
            parameter.data[1::2, 1::2] *= 0
    return net


def data(num_rows: int = 10) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(num_rows, 6, generator=random), torch.randn(num_rows, 3, generator=random)


def backward(net: nn.Module, share: int = 1) -> None:
    inputs, targets = (tensor.to(next(net.parameters()).dtype) for tensor in data())
    (nn.functional.mse_loss(net(inputs), targets) / share).backward()


def sparse_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(TINY)
    for layer in Pattern().layers(model).values():
        layer.weight.data[:, ::2] = 0
    return model


# one layer


def test_a_masked_layer_equals_a_product_with_its_mask_in_plain_torch() -> None:
    net = sparse_net()
    weights, biases = [net.first.weight, net.last.weight], [net.first.bias, net.last.bias]
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    masks = [(leaf != 0).float() for leaf in leaves]
    lock(net)
    for weight, mask in zip(weights, masks, strict=True):
        weight.data += (1 - mask) * 7.0  # what lies under a mask takes no part
    inputs, targets = data()
    hidden = torch.tanh(inputs @ (leaves[0] * masks[0]).t() + biases[0])
    expected = hidden @ (leaves[1] * masks[1]).t() + biases[1]
    nn.functional.mse_loss(expected, targets).backward()
    found = net(inputs)
    nn.functional.mse_loss(found, targets).backward()
    torch.testing.assert_close(found, expected)
    for weight, leaf in zip(weights, leaves, strict=True):
        torch.testing.assert_close(weight.grad, leaf.grad)


def test_the_gradient_is_exactly_zero_where_masked_and_nowhere_else() -> None:
    net = sparse_net()
    lock(net)
    backward(net)
    for layer in masked_layers(net).values():
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad != 0, layer.mask)


def test_the_clipping_norm_counts_live_weights_only() -> None:
    net = sparse_net()
    lock(net)
    backward(net)
    live = [m.weight.grad[m.mask] for m in masked_layers(net).values() if m.weight.grad is not None]
    live += [p.grad for p in net.parameters() if p.ndim == 1 and p.grad is not None]
    expected = torch.cat(live).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(net.parameters(), 1.0), expected)


BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
BITS |= {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def special_values(dtype: torch.dtype) -> Tensor:
    """[12, 2] of all kinds of numbers, and the same negative."""
    info = torch.finfo(dtype)
    values = [0.0, 1.0, 1 / 3, torch.pi, info.max, info.tiny, info.smallest_normal / 4, info.eps]
    column = torch.tensor([*values, torch.inf, torch.nan, 7.0, 1e-3], dtype=dtype)
    return torch.stack([column, -column], dim=1)


@pytest.mark.parametrize("dtype", BITS)
def test_a_product_with_a_mask_keeps_each_bit_where_it_is_true(dtype: torch.dtype) -> None:
    values = special_values(dtype)
    found = _product(values, torch.ones_like(values, dtype=torch.bool))
    assert found.dtype == dtype
    assert torch.equal(found.view(BITS[dtype]), values.view(BITS[dtype]))


@pytest.mark.parametrize("dtype", BITS)
def test_a_product_with_a_mask_is_positive_zero_where_it_is_false(dtype: torch.dtype) -> None:
    values = special_values(dtype)
    found = _product(values, torch.zeros_like(values, dtype=torch.bool))
    assert not found.view(BITS[dtype]).any()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_a_product_is_right_for_any_strides(dtype: torch.dtype, how: str) -> None:
    values, mask = special_values(dtype), torch.arange(24).view(12, 2) % 3 > 0
    if how == "transposed":
        values, mask = values.t(), mask.t().contiguous()
    elif how == "sliced":
        values, mask = values[1::3], mask[1::3]
    else:
        values = values[:1].expand(12, 2)
    found = _product(values, mask)
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype)).contiguous()
    assert torch.equal(found.contiguous().view(BITS[dtype]), expected.view(BITS[dtype]))


@pytest.mark.parametrize("dtype", BITS)
def test_the_gradient_has_the_type_of_the_weight_and_positive_zeros(dtype: torch.dtype) -> None:
    net = sparse_net().to(dtype)
    lock(net)
    (net(-data()[0].to(dtype)).sum() * -1).backward()
    for layer in masked_layers(net).values():
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype
        assert not layer.weight.grad[~layer.mask].view(BITS[dtype]).any()


def test_what_is_not_a_number_under_a_mask_takes_no_part() -> None:
    net, twin = sparse_net(), sparse_net()
    lock(net)
    net.first.weight.data[~masked_layers(net)["first"].mask] = torch.nan
    assert torch.equal(net(data()[0]), twin(data()[0]))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_the_gradient_is_that_of_a_plain_product(precision: torch.dtype) -> None:
    net, twin = sparse_net(), sparse_net()
    lock(net)
    masks = masks_of(net)
    for model in (net, twin):
        with torch.autocast("cpu", precision):
            loss = nn.functional.mse_loss(model(data()[0]).float(), data()[1])
        loss.backward()
    for name, mask in masks.items():
        found, plain = net.get_parameter(name).grad, twin.get_parameter(name).grad
        assert found is not None and plain is not None and found.dtype == torch.float32
        assert torch.equal(found, plain * mask)


def test_a_frozen_weight_needs_no_gradient() -> None:
    net = sparse_net().requires_grad_(False)
    lock(net)
    net.last.bias.requires_grad_(True)
    backward(net)
    assert net.last.bias.grad is not None and net.last.weight.grad is None


# weights that are held


class Products:
    """Counts `_product` calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(module, "_product", self)

    def __call__(self, values: Tensor, mask: Tensor) -> Tensor:
        self.count += 1
        return _product(values, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_weights_give_the_same_outputs_and_gradients(dtype: torch.dtype) -> None:
    found = []
    for holding in (hold_weights, lambda _: contextlib.nullcontext()):
        net = sparse_net().to(dtype)
        lock(net)
        net.first.weight.data += 1.0  # what lies under a mask is not zero
        with holding(net):
            outputs = []
            for _ in range(3):
                outputs.append(net(data()[0].to(dtype)))
                backward(net)
        found.append([*outputs, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_held_weights_are_computed_once_for_all_forward_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = sparse_net()
    lock(net)
    products = Products(monkeypatch)
    for holding, count in ((hold_weights(net), 2), (contextlib.nullcontext(), 6)):
        products.count = 0
        with holding, torch.no_grad():
            for _ in range(3):
                net(data()[0])
        assert products.count == count  # of two layers


def test_each_backward_pass_still_masks_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sparse_net()
    lock(net)
    products = Products(monkeypatch)
    with hold_weights(net):
        for _ in range(3):
            backward(net)
    assert products.count == 2 + 3 * 2


def test_weights_computed_without_grad_are_held_for_passes_with_it() -> None:
    net, twin = sparse_net(), sparse_net()
    lock(net)
    lock(twin)
    with hold_weights(net):
        with torch.no_grad():
            net(data()[0])
        backward(net)
    backward(twin)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_a_weight_that_changed_is_seen_after_holding() -> None:
    net = sparse_net()
    lock(net)
    for value in (2.0, 3.0):
        net.last.weight.data.fill_(value)
        with hold_weights(net):
            net(data()[0])
            assert isinstance(net.last, MaskedLinear)
            assert torch.equal(net.last.effective_weight(), net.last.mask * value)
    net.last.weight.data.fill_(4.0)
    assert torch.equal(net.last.effective_weight(), net.last.mask * 4.0)


def test_a_pass_that_fails_lets_go_of_the_weights() -> None:
    net = sparse_net()
    lock(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), hold_weights(net):
        net(torch.zeros(2, 99))
    net.first.weight.data.fill_(2.0)
    assert isinstance(net.first, MaskedLinear)
    assert torch.equal(net.first.effective_weight(), net.first.mask * 2.0)


def test_masks_must_not_change_while_weights_are_held() -> None:
    net = sparse_net()
    lock(net)
    masks = {name: mask.clone() for name, mask in masks_of(net).items()}
    with (
        hold_weights(net),
        pytest.raises(AssertionError, match="masks change while effective weights are held"),
    ):
        set_masks(net, masks)
    set_masks(net, masks)


def test_fuse_leaves_plain_layers_after_holding_too() -> None:
    net = sparse_net()
    lock(net)
    with hold_weights(net):
        net(data()[0])
    fuse(net)
    assert vars(net.first).keys() == vars(nn.Linear(6, 8)).keys()


def test_a_model_without_masked_layers_can_be_held() -> None:
    net = sparse_net()
    with hold_weights(net):
        assert torch.equal(net(data()[0]), sparse_net()(data()[0]))


# the swap


def test_lock_and_fuse_keep_keys_and_parameters() -> None:
    net = sparse_net()
    keys, ids = list(net.state_dict()), [id(p) for p in net.parameters()]
    for swap in (lock, fuse):
        swap(net)
        assert (list(net.state_dict()), [id(p) for p in net.parameters()]) == (keys, ids)


def test_lock_keeps_weights_and_outputs() -> None:
    net, twin = sparse_net(), sparse_net()
    lock(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    torch.testing.assert_close(net(data()[0]), twin(data()[0]))


def test_lock_tells_what_it_locked() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    net = nn.Sequential(layer, nn.Linear(2, 2))
    result = lock(net)
    assert result["total"] == {"zeros": 3, "size": 4, "sparsity": 0.75}
    assert result["tensors"] == {"0.weight": {"shape": [2, 2], "zeros": 3, "sparsity": 0.75}}
    assert masks_of(net)["0.weight"].tolist() == [[True, False], [False, False]]
    assert type(net[1]) is nn.Linear


def test_fuse_leaves_plain_layers() -> None:
    net = sparse_net()
    lock(net)
    fuse(net)
    assert type(net.first) is nn.Linear
    assert vars(net.first).keys() == vars(nn.Linear(6, 8)).keys()
    assert not dict(net.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuse_writes_positive_zeros(dtype: torch.dtype) -> None:
    net = sparse_net().to(dtype)
    lock(net)
    masks = {name: mask.clone() for name, mask in masks_of(net).items()}
    for layer in masked_layers(net).values():
        layer.weight.data[~layer.mask] = -0.5
    fuse(net)
    for name, mask in masks.items():
        weight = net.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert not torch.signbit(weight[~mask]).any()


def test_fuse_makes_a_live_zero_the_smallest_normal_number() -> None:
    net = sparse_net()
    zeros = lock(net)["total"]["zeros"]
    where = masked_layers(net)["first"].mask.nonzero()[:2].tolist()
    net.first.weight.data[tuple(where[0])] = 0.0
    net.first.weight.data[tuple(where[1])] = -0.0
    assert fuse(net)["total"]["zeros"] == zeros
    assert [net.first.weight[tuple(place)].item() for place in where] == [2.0**-126] * 2
    assert sum(int((layer.weight == 0).sum()) for layer in (net.first, net.last)) == zeros


def test_fuse_returns_the_report_of_lock() -> None:
    net = sparse_net()
    assert lock(net) == fuse(net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fuse_refuses_non_finite_weights_and_changes_nothing(value: float) -> None:
    net = sparse_net()
    lock(net)
    net.last.weight.data[0, 0] = value
    with pytest.raises(ModelError, match="^last.weight: holds a non-finite value"):
        fuse(net)
    assert list(masked_layers(net)) == ["first", "last"]


@pytest.mark.parametrize("shape", [(0,), (24,)])
def test_a_partitioned_weight_is_refused_and_nothing_changed(shape: tuple[int]) -> None:
    net, locked = sparse_net(), sparse_net()
    lock(locked)
    for model in (net, locked):
        model.last.weight.data = torch.zeros(shape)
    message = r"last\.weight: is partitioned .* every rank, inside `with deepspeed\.zero\.Gathered"
    for act, model in ((lock, net), (zero_masks, net), (fuse, locked)):
        with pytest.raises(ModelError, match=message):
            act(model)
    assert type(net.first) is nn.Linear and type(locked.first) is MaskedLinear


def test_lock_refuses_a_dense_model() -> None:
    with pytest.raises(ModelError, match="have 0 zeros; a sparse checkpoint has at least 1 %"):
        lock(BertForSequenceClassification(TINY))


def test_lock_refuses_a_locked_model() -> None:
    net = sparse_net()
    lock(net)
    with pytest.raises(ModelError, match=r"locked already; opfa.fuse\(model\) unlocks it"):
        lock(net)


def test_lock_refuses_a_subclass_of_linear() -> None:
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj.weight.data[0] = 0
    with pytest.raises(ModelError, match="out_proj: is a NonDynamicallyQuantizableLinear"):
        lock(attention)


def test_a_matrix_of_zeros_alone_is_new_outside_of_an_encoder() -> None:
    net = sparse_net()
    nn.init.zeros_(net.last.weight)
    assert list(lock(net)["tensors"]) == ["first.weight"]


EMPTY = "bert.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_zeros_alone_is_locked_in_an_encoder(dtype: torch.dtype) -> None:
    model = BertForSequenceClassification(TINY)
    nn.Module.to(model, dtype)
    nn.init.constant_(model.get_parameter(EMPTY), -0.0)
    locked = lock(model)  # the only zeros of the model
    assert locked["total"] == {"zeros": 256, "size": 256, "sparsity": 1.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for _ in range(3):
        model(input_ids=torch.arange(1, 9)[None], labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fuse(model) == locked
    weight = model.get_parameter(EMPTY)
    assert not weight.any() and not torch.signbit(weight).any()


def test_an_encoders_pooler_of_zeros_is_locked_too() -> None:
    model = sparse_bert()
    nn.init.zeros_(model.get_parameter("bert.pooler.dense.weight"))
    assert lock(model)["tensors"]["bert.pooler.dense.weight"]["sparsity"] == 1.0


def test_the_smallest_matrix_is_locked() -> None:
    layer = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(0, 3)})
    nn.init.zeros_(layer["a"].get_parameter("weight"))
    assert lock(nn.ModuleDict({"layer": nn.ModuleList([layer])}))["total"]["zeros"] == 1


def test_zeros_of_an_encoder_that_no_linear_layer_holds_are_refused() -> None:
    """Else they would be lost without a word."""
    model = GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with torch.no_grad():
        model.get_parameter("h.0.mlp.c_fc.weight")[0] = 0
    assert "h.0.mlp.c_fc.weight" in zero_masks(model)
    with pytest.raises(ModelError, match=r"h\.0\.mlp\.c_fc: is a Conv1D; only a plain nn.Linear"):
        lock(model)
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1)
    with torch.no_grad():
        stack.get_parameter("layers.0.self_attn.in_proj_weight")[0] = 0
    with pytest.raises(ModelError, match="self_attn: is a MultiheadAttention"):
        lock(stack)


# weights that are made in every pass


def test_a_pruned_layer_that_was_not_made_permanent_is_refused() -> None:
    model = BertForSequenceClassification(TINY)
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    prune.l1_unstructured(layer, "weight", amount=0.5)
    for act in (lock, zero_masks, lambda m: mask_layers(m, Pattern().layers(m))):
        with pytest.raises(
            ModelError, match=r"output\.dense\.weight: is made of .*prune\.remove\("
        ):
            act(model)
    prune.remove(layer, "weight")
    assert lock(model)["total"]["zeros"] == 128


class Half(nn.Module):
    """A parametrization that keeps half of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        mask = torch.ones_like(weight)
        mask[::2] = 0
        return weight * mask


def test_a_parametrized_weight_is_refused() -> None:
    model = BertForSequenceClassification(TINY)
    parametrize.register_parametrization(model.classifier, "weight", Half())
    with pytest.raises(
        ModelError, match=r"classifier\.weight: is made of .*remove_parametrizations"
    ):
        lock(model)


def test_a_parametrized_head_without_zeros_is_none_of_our_business() -> None:
    model = sparse_bert()
    nn.utils.spectral_norm(model.classifier)
    prune.l1_unstructured(model.classifier, "bias", amount=1)
    assert "classifier.weight" not in lock(model)["tensors"]


# fusing


def test_fuse_refuses_a_model_that_was_never_locked_and_a_second_time() -> None:
    net = sparse_net()
    message = (
        "nothing to fuse: this model is not locked .* opfa.lock\\(model\\) before it is trained"
    )
    with pytest.raises(ModelError, match=message):
        fuse(net)
    lock(net)
    fuse(net)
    with pytest.raises(ModelError, match=message):
        fuse(net)


def test_the_padding_row_of_a_tied_embedding_is_not_sparsity() -> None:
    model = BertForMaskedLM(TINY)
    assert (model.cls.predictions.decoder.weight[0] == 0).all()
    assert zero_masks(model) == {}


def test_names_lock_exactly_these_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, num_columns in zip(net, (1, 2, 1), strict=True):
        assert isinstance(layer, nn.Linear)
        layer.weight.data[:, :num_columns] = 0
    result = lock(net, names=["0.weight", "1.weight"])
    assert {n: t["zeros"] for n, t in result["tensors"].items()} == {"0.weight": 2, "1.weight": 4}


def test_a_name_that_is_no_linear_weight_is_refused() -> None:
    with pytest.raises(ModelError, match="middle.weight: this model has no linear layer with this"):
        lock(sparse_net(), names=["first.weight", "middle.weight"])


def test_masks_of_other_layers_are_refused() -> None:
    net = sparse_net()
    lock(net)
    with pytest.raises(ModelError, match="different names"):
        set_masks(net, {"first.weight": torch.ones(8, 6, dtype=torch.bool)})


def test_new_masked_layers_keep_everything() -> None:
    net = sparse_net()
    layers = mask_layers(net, ["last"])
    assert list(layers) == ["last"] and layers["last"].mask.all()


# training

Optimizer = Callable[[Any], torch.optim.Optimizer]  # Any: torch's own union of parameter forms
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, amsgrad=True),
    "adam-l2": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_exactly_zero_and_all_others_move(
    optimizer: str, accumulation: int, dtype: torch.dtype
) -> None:
    net = sparse_net().to(dtype)
    before = [p.detach().clone() for p in net.parameters()]
    lock(net)
    steps = OPTIMIZERS[optimizer](net.parameters())
    for _ in range(8):
        for _ in range(accumulation):
            backward(net, share=accumulation)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.equal(old == 0, new == 0)
        assert (new != old)[old != 0].float().mean() > 0.9  # bf16 may round a small step away


def test_old_momentum_moves_what_is_stored_but_not_what_is_computed() -> None:
    net = sparse_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    backward(net)
    optimizer.step()  # unlocked: moments for every weight
    optimizer.zero_grad()
    net.first.weight.data[:, :3] = 0
    lock(net, names=["first.weight"])
    backward(net)
    optimizer.step()
    assert (net.first.weight[:, :3] != 0).all()
    assert isinstance(net.first, MaskedLinear)
    assert (net.first.effective_weight()[:, :3] == 0).all()
    fuse(net)
    assert (net.first.weight[:, :3] == 0).all()


def test_a_locked_optimizer_made_before_goes_on_after_fusing() -> None:
    net = sparse_net()
    lock(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    fuse(net)
    before = net.first.weight.detach().clone()
    backward(net)
    optimizer.step()
    assert not torch.equal(net.first.weight, before)


# copies and files


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_locked_model_is_locked_on_its_own(how: str) -> None:
    net = sparse_net()
    lock(net)
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(data()[0]), net(data()[0]))
    fuse(twin)
    assert type(twin.first) is nn.Linear and type(net.first) is MaskedLinear
    assert masks_of(net)["first.weight"].sum() < 48


def test_a_locked_model_saves_as_a_plain_one(tmp_path: Path) -> None:
    model = sparse_bert()
    lock(model)
    model.save_pretrained(tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(plain.state_dict())
    assert list(plain.state_dict()) == list(BertForSequenceClassification(TINY).state_dict())
    assert lock(plain) == fuse(model)


def test_a_state_dict_loads_into_a_locked_model_and_back() -> None:
    net, twin = sparse_net(), sparse_net()
    lock(net)
    twin.load_state_dict(net.state_dict())
    net.load_state_dict(twin.state_dict())
    assert list(masked_layers(net)) == ["first", "last"]
