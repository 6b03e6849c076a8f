"""Training in the sparse kernels, against torch's own autograd on dense masked weights."""

import copy
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import opfa
from opfa.compression import quant
from opfa.errors import ModelError, RunError
from opfa.runtime import products, training
from opfa.runtime.library import library
from opfa.runtime.patterns import Pattern, struct_of
from opfa.runtime.products import live_of, sparse_linear
from opfa.sparsity.layers import MaskedLinear, mask_layers, masked_layers, set_masks
from opfa.sparsity.masks import Masks

FP32, BF16 = 1e-6, 1e-2  # of the largest value


def random_mask(rows: int, columns: int, density: float) -> Tensor:
    """With an empty row and an empty column, if there are two."""
    mask = torch.rand(rows, columns) < density
    if rows > 1 and columns > 1:
        mask[torch.randint(rows, ())] = False
        mask[:, torch.randint(columns, ())] = False
    return mask


def dense_and_sparse(
    mask: Tensor, tokens: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of input, weight and bias: in fp64 by torch, and by the kernels."""
    weight, bias = torch.randn(mask.shape), torch.randn(len(mask))
    seed = torch.randn(*tokens.shape[:-1], len(mask)).to(dtype)
    found = []
    for exact in (True, False):
        kind = torch.float64 if exact else torch.float32
        x = tokens.to(dtype).to(torch.float64 if exact else dtype).detach().requires_grad_()
        w, b = (each.to(kind).requires_grad_() for each in (weight, bias))
        if exact:
            y = functional.linear(x, w * mask, b)
        else:
            pattern = Pattern.of(mask)
            y = sparse_linear(x, live_of(w, pattern), b, pattern)
        y.backward(seed.to(y.dtype))
        found.append([y.detach(), x.grad, w.grad, b.grad])
    return found[0], found[1]


def distance(wanted: Tensor, found: Tensor, summands: float = 0) -> float:
    """The largest difference, relative to the largest value, or to what
    a sum of so many products usually is: one that happens to cancel has its parts' rounding.
    """
    if not wanted.numel():
        return 0.0
    largest = wanted.abs().max().clamp(min=max(1e-30, summands**0.5))
    return float((wanted - found.double()).abs().max() / largest)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 280),
    columns=st.integers(1, 280),
    tokens=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.15, 0.3, 1.0]),
    is_strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_output_and_gradients_are_those_of_the_dense_path(
    seed: int,
    rows: int,
    columns: int,
    tokens: int,
    density: float,
    is_strided: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(columns, tokens).T if is_strided else torch.randn(tokens, columns)
    wanted, found = dense_and_sparse(random_mask(rows, columns, density), x, dtype)
    limit = FP32 if dtype == torch.float32 else BF16
    summed = (columns * density, rows * density, tokens, tokens)
    assert max(map(distance, wanted, found, summed)) < limit
    assert found[0].dtype == found[1].dtype == dtype
    assert found[2].dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 9), (3, 40, 9), (2, 0, 9)])
def test_any_number_of_dimensions_and_no_tokens_at_all(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    wanted, found = dense_and_sparse(random_mask(7, 9, 0.4), torch.randn(shape), torch.float32)
    assert found[0].shape == (*shape[:-1], 7)
    assert max(map(distance, wanted, found)) < FP32


def test_gradients_in_fp64_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    mask = random_mask(7, 5, 0.5)
    pattern = Pattern.of(mask)
    sizes = ((2, 3, 5), (pattern.num_live,), (7,))
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda x, w, b: sparse_linear(x, w, b, pattern), inputs)


def test_only_what_is_wanted_has_a_gradient() -> None:
    pattern = Pattern.of(random_mask(6, 8, 0.5))
    for wanted in range(1, 8):
        inputs = [torch.randn(20, 8), torch.randn(pattern.num_live), torch.randn(6)]
        for place, each in enumerate(inputs):
            each.requires_grad_(bool(wanted >> place & 1))
        x, values, bias = inputs
        sparse_linear(x, values, bias, pattern).sum().backward()
        assert [each.grad is not None for each in inputs] == [
            bool(wanted >> p & 1) for p in range(3)
        ]


def set_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """How many the kernels have, also where there are fewer cores."""
    monkeypatch.setattr(products, "_cores", lambda: threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


def test_one_and_two_threads_and_another_run_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    mask, tokens = random_mask(300, 200, 0.1), torch.randn(1000, 200)
    found = []
    for threads in (1, 2, 3, 1):
        set_threads(monkeypatch, threads)
        torch.manual_seed(1)
        found.append(dense_and_sparse(mask, tokens, torch.float32)[1])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_threads_don_t_share_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tiles and many calls, so that threads that share it meet there."""
    torch.manual_seed(0)
    pattern = Pattern.of(random_mask(768, 768, 0.1))
    values = torch.randn(pattern.num_live, requires_grad=True)
    x, seed = torch.randn(1024, 768, requires_grad=True), torch.randn(1024, 768)

    def step() -> tuple[Tensor, ...]:
        output = sparse_linear(x, values, None, pattern)
        return output.detach(), *torch.autograd.grad(output, (x, values), seed)

    set_threads(monkeypatch, 1)
    wanted = step()
    set_threads(monkeypatch, 4)
    for _ in range(5):
        assert all(map(torch.equal, step(), wanted))


def test_both_orders_of_a_pattern_pass_the_kernels_check() -> None:
    mask = random_mask(270, 500, 0.1)
    pattern = Pattern.of(mask)
    for matrix in (pattern.matrix, pattern.transposed):
        struct = struct_of(matrix, torch.zeros(pattern.num_live))
        visits = len(matrix.arrays["visits"])
        assert library().opfa_check(ctypes.byref(struct), visits, pattern.num_live) == 0
    assert torch.equal(pattern.places.sort().values.long(), mask.view(-1).nonzero().view(-1))


def test_a_second_derivative_is_refused() -> None:
    pattern = Pattern.of(random_mask(6, 8, 0.5))
    x, values = torch.randn(4, 8, requires_grad=True), torch.randn(pattern.num_live)
    output = sparse_linear(x, values.requires_grad_(), None, pattern)
    (first,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RunError, match=r"no second derivative.*kernels=False"):
        first.sum().backward()


# layers and models


def small_model() -> nn.Sequential:
    """Two sparse layers, and a dense head."""
    torch.manual_seed(0)
    layers = [nn.Linear(40, 70), nn.GELU(), nn.Linear(70, 40), nn.Tanh(), nn.Linear(40, 3)]
    model = nn.Sequential(*layers)
    masks = {"0.weight": random_mask(70, 40, 0.2), "2.weight": random_mask(40, 70, 0.2)}
    mask_layers(model, ["0", "2"])
    set_masks(model, masks)
    for layer in masked_layers(model).values():
        layer.weight.data.mul_(layer.mask)
    return model


def first(model: nn.Module) -> MaskedLinear:
    """Its first masked layer."""
    return next(iter(masked_layers(model).values()))


def trained(model: nn.Module, *, precision: torch.dtype = torch.float32) -> list[float]:
    """Losses of some steps, of two accumulated passes each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    numbers, losses = torch.Generator().manual_seed(3), []
    for _ in range(8):
        for _ in range(2):
            x = torch.randn(33, 40, generator=numbers)
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = (model(x).float() - x[:, :3]).pow(2).mean()
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("precision", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_a_model_trains_as_without_the_kernels_and_keeps_its_zeros(
    precision: torch.dtype, limit: float
) -> None:
    plain = small_model()
    model = copy.deepcopy(plain)
    assert training.use_kernels(model, True) == ["0", "2"]
    masks: Masks = {name: layer.mask.clone() for name, layer in masked_layers(model).items()}
    losses = trained(model, precision=precision)
    assert losses == pytest.approx(trained(plain, precision=precision), rel=limit)
    opfa.fuse(model)
    weights = model.state_dict()
    assert all(torch.equal(weights[f"{name}.weight"] != 0, mask) for name, mask in masks.items())
    assert type(model[0]) is nn.Linear
    assert not {"product", "mask"} & set(vars(model[0]))


def test_the_output_under_autocast_has_the_type_of_a_linear_layer() -> None:
    model = small_model()
    plain, x = copy.deepcopy(model), torch.randn(5, 40)
    training.use_kernels(model, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))


def test_a_mask_that_changes_has_a_new_pattern_at_the_next_pass() -> None:
    model, x = small_model(), torch.randn(5, 40)
    plain = copy.deepcopy(model)
    training.use_kernels(model, True)
    model(x)
    for each in (model, plain):
        first(each).mask.fill_(True)
        first(each).weight.data.fill_(0.1)
    torch.testing.assert_close(model(x), plain(x))


def test_a_mask_changed_behind_torch_is_found() -> None:
    model = small_model()
    training.use_kernels(model, True)
    model(torch.randn(5, 40))
    row, column = first(model).mask.nonzero()[0].tolist()
    first(model).mask.data[row, column] = False
    with pytest.raises(ModelError, match=r"0\.mask: was changed behind torch's back"):
        opfa.fuse(model)
    assert isinstance(model[0], MaskedLinear)  # nothing was changed


def test_another_device_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    training._said.clear()
    model = small_model()
    training.use_kernels(model, True)
    model.to("meta")
    for _ in range(2):
        assert model(torch.randn(5, 40, device="meta")).shape == (5, 3)
    assert [r.getMessage() for r in caplog.records] == [
        "on meta models compute without the sparse kernels"
    ]


def test_live_weights_are_never_left_untrained_by_a_pass_without_the_kernels() -> None:
    training._said.clear()
    model = small_model()
    training.use_kernels(model, True, train_live=True)
    model.to("meta")
    with pytest.raises(ModelError, match=r"on meta models compute .* only the live weights"):
        model(torch.randn(5, 40, device="meta"))
    with torch.no_grad():
        assert model(torch.randn(5, 40, device="meta")).shape == (5, 3)


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_8_bits_round_live_weights_as_whole_ones(scheme: quant.Scheme) -> None:
    torch.manual_seed(0)
    mask = random_mask(50, 60, 0.2)
    weight = torch.randn(50, 60) * mask
    pattern = Pattern.of(mask)
    wanted = quant.rounded(weight, quant.weight_scale(weight, scheme))
    places = pattern.places.long()
    values = quant.rounded_live(weight.view(-1)[places], places // 60, 50, scheme)
    assert torch.equal(values, wanted.view(-1)[places])


def test_8_bits_train_as_without_the_kernels() -> None:
    plain = small_model()
    quant.prepare(plain, 0.05)
    plain(torch.randn(200, 40))  # ranges
    quant.start(plain)
    model = copy.deepcopy(plain)
    training.use_kernels(model, True)
    assert trained(model) == pytest.approx(trained(plain), rel=1e-3)


def test_a_layer_whose_whole_gradient_is_kept_computes_it() -> None:
    model = small_model()
    training.use_kernels(model, True)
    first(model).keep_gradient(True)
    model(torch.randn(5, 40)).sum().backward()
    assert bool((first(model).take_gradient() != 0).any())


def test_auto_leaves_alone_what_would_not_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_model(), torch.randn(5, 40)
    wanted = model(x)
    training.use_kernels(model, "auto")
    monkeypatch.setattr(Pattern, "of", None)  # which takes longer than a pass
    assert torch.equal(model(x), wanted)


def test_auto_computes_in_the_kernels_what_gains_by_the_mask_of_now() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 256))
    (layer,) = mask_layers(model, ["0"]).values()
    training.use_kernels(model, "auto")
    product, x = layer.product, torch.randn(256, 1024)  # 2 ** 26 weights times tokens
    assert product is not None
    for density, computes in ((0.9, False), (0.2, True), (0.4, False), (0.1, True)):
        layer.mask.copy_(torch.rand(layer.mask.shape) < density)
        assert (product(layer, x) is not None) == computes
        assert product(layer, x[:64]) is None  # too few tokens


def test_locking_with_kernels_says_what_is_wrong() -> None:
    with pytest.raises(ModelError, match=r"kernels = 'fast': must be 'auto', True or False"):
        training.use_kernels(small_model(), "fast")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has no masked layers"):
        training.use_kernels(nn.Sequential(nn.Linear(3, 3)))
    linear = nn.Linear(30, 30)
    linear.weight.data.mul_(random_mask(30, 30, 0.3))
    model = nn.Sequential(linear)
    assert opfa.lock(model, ["0.weight"], kernels=True)["total"]["sparsity"] > 0.5
    assert first(model).product is not None


def test_without_kernels_true_is_refused_and_auto_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "why_not", lambda: "there is no compiler")
    with pytest.raises(RunError, match="kernels = True: there is no compiler"):
        training.use_kernels(small_model(), True)
    assert training.use_kernels(small_model(), "auto") == []
