"""Scores that text is measured for: against their formulas, on a model written out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from opfa.compression import blocks, calibration
from opfa.compression.calibration import Batch, Calibration, Call, Text
from opfa.compression.measured import Activation, Curvature, Fisher
from opfa.compression.pattern import PartPattern, Pattern
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Part, Score
from opfa.errors import RunError
from opfa.sparsity.layers import fuse
from opfa.sparsity.masks import fingerprint

NAMES = [f"layer.{index}.weight" for index in (0, 1)]
SIZE, TOKENS = 6, 5


class Net(nn.Module):
    """Two layers over tokens; its outputs are those of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)])
        self.dropout = nn.Dropout(0.5)  # none while it is measured

    def forward(self, x: Tensor, attention_mask: Tensor) -> list[Tensor]:
        first = self.dropout(torch.tanh(self.layer[0](x)))
        return [first, torch.tanh(self.layer[1](first))]


def batches(sequences: int) -> Iterator[dict[str, Tensor]]:
    """One sequence each; every second one ends early, and its padding is not small."""
    for index in range(sequences):
        x = torch.randn(1, TOKENS, SIZE, generator=torch.Generator().manual_seed(index))
        mask = torch.ones(1, TOKENS, dtype=torch.long)
        mask[:, TOKENS - 2 * (index % 2) :] = 0
        yield {"x": x.masked_fill(mask[..., None] == 0, 100.0), "attention_mask": mask}


def outputs(call: Call, batch: Batch) -> list[Tensor]:
    return [state[batch["attention_mask"].bool()] for state in call(**batch)]


def made(score: Score, monotone: bool = False, **schedule: Any) -> tuple[Net, Pruner]:
    model = Net()
    found = Calibration(model, Text(batches, outputs))
    ramp = Gradual(**{"end": 0, "target": 0.5, **schedule})
    pattern = Pattern(include=("layer",), monotone=monotone)
    return model, Pruner(model, ramp, pattern, score=score, calibration=found)


def values_of(model: Net, pruner: Pruner) -> tuple[Tensor, ...]:
    """The weights that are computed with."""
    return tuple(pruner.layers[name].weight.detach() * pruner.masks()[name] for name in NAMES)


def jacobians(model: Net, weights: tuple[Tensor, ...], batch: Batch) -> list[Tensor]:
    """Of all outputs of real tokens, by each weight: [outputs, out, in]."""
    biases = [model.get_parameter(f"layer.{index}.bias").detach() for index in (0, 1)]

    def all_of_it(first: Tensor, second: Tensor) -> Tensor:
        real = batch["x"][batch["attention_mask"].bool()]
        one = torch.tanh(real @ first.T + biases[0])
        return torch.cat([one.flatten(), torch.tanh(one @ second.T + biases[1]).flatten()])

    return list(jacobian(all_of_it, weights))  # pyright: ignore[reportArgumentType]


def measured(pruner: Pruner) -> dict[str, Tensor]:
    return {name: state["text"].view(SIZE, SIZE) for name, state in pruner._states.items()}


def check_lowest(pruner: Pruner, name: str, worth: Tensor) -> None:
    """The half that is worth least is pruned."""
    lowest = worth.flatten().argsort(stable=True)[: SIZE * SIZE // 2]
    pruned = (~pruner.masks()[name]).flatten().nonzero().view(-1)
    assert sorted(lowest.tolist()) == pruned.tolist()


def test_curvature_is_the_squared_gradient_of_random_cotangents() -> None:
    model, pruner = made(Curvature(sequences=4))
    model.get_parameter(NAMES[0]).data[0, 0] = 0.0
    pruner.after_step(0)
    seed = torch.Generator().manual_seed(0)
    expected = [torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)]
    weights = tuple(model.get_parameter(name).detach() for name in NAMES)
    for batch in batches(4):
        rows = int(batch["attention_mask"].sum())
        v = torch.cat([torch.randn(rows, SIZE, generator=seed).flatten() for _ in range(2)])
        for total, found in zip(expected, jacobians(model, weights, batch), strict=True):
            total.add_(torch.einsum("k,koi->oi", v, found) ** 2)
    for name, total in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(measured(pruner)[name], total)
        check_lowest(pruner, name, pruner.layers[name].weight.abs() * total.sqrt())


def test_a_pattern_may_leave_out_the_first_layers_and_not_name_what_no_output_needs() -> None:
    def pruned(outputs_of: Any, *layers: int) -> Pruner:
        model = Net()
        text = Calibration(model, Text(batches, outputs_of))
        pattern = Pattern(include=tuple(rf"layer.{n}$" for n in layers), score=Curvature())
        pruner = Pruner(model, Gradual(end=0, target=0.5), pattern, calibration=text)
        pruner.after_step(0)
        return pruner

    both, last = pruned(outputs, 0, 1), pruned(outputs, 1)
    torch.testing.assert_close(measured(last)[NAMES[1]], measured(both)[NAMES[1]])
    for layers in ((1,), (0, 1)):
        with pytest.raises(RunError, match=r"layer.1.weight: no output .* depends on it; exclude"):
            pruned(lambda call, batch: outputs(call, batch)[:1], *layers)


def test_its_mean_is_the_diagonal_of_gauss_and_newton() -> None:
    model, pruner = made(Curvature(sequences=4000))
    pruner.after_step(0)
    weights = tuple(model.get_parameter(name).detach() for name in NAMES)
    exact = [torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)]
    for batch in batches(500):
        for total, found in zip(exact, jacobians(model, weights, batch), strict=True):
            total.add_(found.square().sum(0) * 8)
    for name, total in zip(NAMES, exact, strict=True):
        assert (measured(pruner)[name] / total - 1).abs().max() < 0.2


def test_it_is_measured_with_the_masks_of_the_moment_and_pruned_weights_have_some() -> None:
    model, pruner = made(Curvature(sequences=4, every=1), hold_until=1, every=1)
    pruner.after_step(0)
    before = measured(pruner)
    weights = values_of(model, pruner)
    pruner.after_step(1)
    seed, expected = torch.Generator().manual_seed(0), torch.zeros(SIZE, SIZE)
    for batch in batches(4):
        rows = int(batch["attention_mask"].sum())
        v = torch.cat([torch.randn(rows, SIZE, generator=seed).flatten() for _ in range(2)])
        expected += torch.einsum("k,koi->oi", v, jacobians(model, weights, batch)[0]) ** 2
    torch.testing.assert_close(measured(pruner)[NAMES[0]], expected)
    assert not torch.equal(before[NAMES[0]], expected) and bool((expected > 0).all())


def fisher_blocks(model: Net, weights: tuple[Tensor, ...], size: int, damping: float) -> Any:
    """Of each matrix, block by block: places, and the mean outer product of gradients, damped."""
    seed, samples = torch.Generator().manual_seed(0), [[], []]
    for batch in batches(40):
        rows = int(batch["attention_mask"].sum())
        v = torch.cat([torch.randn(rows, SIZE, generator=seed).flatten() for _ in range(2)])
        for found, jacobi in zip(samples, jacobians(model, weights, batch), strict=True):
            found.append(torch.einsum("k,koi->oi", v, jacobi).flatten())
    for found in samples:
        gradients = torch.stack(found).double()
        whole = gradients.T @ gradients / len(found)
        own = SIZE * SIZE + -(SIZE * SIZE) % size  # with what fills up the last block
        whole += damping * whole.diagonal().sum() / own * torch.eye(SIZE * SIZE)
        places = range(0, SIZE * SIZE, size)
        yield [(slice(p, p + size), whole[p : p + size, p : p + size]) for p in places]


@pytest.mark.parametrize("monotone", [False, True])
def test_fisher_is_the_inverse_in_blocks_and_what_is_kept_makes_up_for_what_goes(
    monotone: bool,
) -> None:
    score = Fisher(sequences=40, block=5, damping=0.1)
    model, pruner = made(score, monotone, hold_until=1, every=1, initial=0.2)
    for step, share in ((0, 0.5), (1, 0.5)):
        before = {name: mask.clone() for name, mask in pruner.masks().items()}
        stored = {name: model.get_parameter(name).detach().clone() for name in NAMES}
        weights = tuple(stored[name] * before[name] for name in NAMES)
        expected = list(fisher_blocks(model, weights, 5, 0.1))
        pruner.after_step(step)
        for name, weight, parts in zip(NAMES, weights, expected, strict=True):
            after, found = pruner.masks()[name].flatten(), model.get_parameter(name).detach()
            worth, flat = torch.empty(SIZE * SIZE), weight.flatten().double()
            for place, block in parts:
                own = stored[name].flatten()[place].double()
                worth[place] = (own**2 / 2 / block.inverse().diagonal()).float()
                kept, gone = after[place], ~after[place]
                gain = torch.linalg.solve(
                    block[kept][:, kept], block[kept][:, gone] @ flat[place][gone]
                )
                torch.testing.assert_close(
                    found.flatten()[place][kept].double(), own[kept] + gain, rtol=1e-3, atol=1e-5
                )
                assert torch.equal(found.flatten()[place][gone].double(), own[gone])
            if monotone:
                worth[~before[name].flatten()] = -1.0
            lowest = worth.argsort(stable=True)[: round(share * SIZE * SIZE)]
            assert sorted(lowest.tolist()) == (~after).nonzero().view(-1).tolist()


def test_each_part_is_made_up_for_by_blocks_of_its_own() -> None:
    def changed(*blocks: int) -> list[bool]:
        model = Net()
        before = [model.get_parameter(name).detach().clone() for name in NAMES]
        parts = [
            PartPattern(include=(rf"layer.{n}$",), score=Fisher(sequences=40, block=size))
            for n, size in enumerate(blocks)
        ]
        text = Calibration(model, Text(batches, outputs))
        Pruner(model, Gradual(end=0, target=0.5), parts, calibration=text).after_step(0)
        after = [model.get_parameter(name) for name in NAMES]
        return [not torch.equal(*pair) for pair in zip(before, after, strict=True)]

    assert changed(5, 5) == changed(5, 6) == changed(6, 5) == [True, True]


def test_a_singular_block_and_memory_that_is_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, pruner = made(Fisher(sequences=4))
    for parameter in model.layer[1].parameters():
        parameter.data.zero_()
    model.get_parameter("layer.1.bias").data += 100.0  # tanh is flat there
    with pytest.raises(RunError, match=r"layer.1.weight: a block .* is singular on this text"):
        pruner.after_step(0)
    monkeypatch.setattr(blocks, "_free_bytes", lambda _: 18_000)
    with pytest.raises(
        RunError, match=r"fisher: needs 0.0 GB, and 0.0 GB are free; smaller blocks"
    ):
        made(Fisher(sequences=4))[1].after_step(0)
    model, pruner = made(Fisher(sequences=4, block=2))  # fits
    pruner.after_step(0)
    assert blocks._free_bytes(torch.device("cpu")) == 18_000 and pruner.sparsity() == 0.5


@pytest.mark.parametrize("score", [Curvature(sequences=4), Activation(sequences=4)])
def test_memory_that_is_not_there_is_refused_for_every_score_that_measures(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * 2 * 2 * SIZE * SIZE  # two fp32 values for each weight of two matrices
    monkeypatch.setattr(blocks, "_free_bytes", lambda _: needed)
    made(score)[1].after_step(0)
    monkeypatch.setattr(blocks, "_free_bytes", lambda _: needed - 1)
    with pytest.raises(RunError, match=r"^(curvature|activation): needs 0.0 GB, and .* magnitude"):
        made(score)[1].after_step(0)


def test_gradients_that_are_not_finite_are_no_singular_block() -> None:
    model, pruner = made(Fisher(sequences=4))
    model.get_parameter("layer.1.bias").data[0] = float("inf")
    model.get_parameter("layer.1.weight").data[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"layer.\d.weight: its fisher on this text is not finite"):
        pruner.after_step(0)


def test_the_free_memory_of_this_machine_is_known() -> None:
    free = blocks._free_bytes(torch.device("cpu"))
    assert free is None or 1e8 < free < 1e14


def test_activation_is_the_norm_of_real_inputs() -> None:
    model, pruner = made(Activation(sequences=4))
    pruner.after_step(0)
    rows = [batch["x"][batch["attention_mask"].bool()] for batch in batches(4)]
    first = torch.cat(rows)
    weight, bias = (model.get_parameter(f"layer.0.{name}").detach() for name in ("weight", "bias"))
    second = torch.tanh(first @ weight.T + bias)
    for name, inputs in zip(NAMES, (first, second), strict=True):
        expected = inputs.square().sum(0).sqrt().expand(SIZE, SIZE)
        torch.testing.assert_close(measured(pruner)[name], expected)
        check_lowest(pruner, name, pruner.layers[name].weight.abs() * expected)
    assert not any(module._forward_pre_hooks for module in pruner._calibration._skeleton.modules())  # pyright: ignore


def test_when_it_is_measured_and_what_stays() -> None:
    once, again = Curvature(), Curvature(every=2, decay=0.25)

    def part(update: int, state: Mapping[str, Tensor]) -> Part:
        weight = torch.ones(2)
        return Part(
            step=4 * update, update=update, name="", weight=weight, state=state,
            shape=weight.shape, cut=lambda whole: whole,
        )  # fmt: skip

    known = {"text": torch.tensor([4.0, 8.0])}
    assert [once.asks(part(n, {})) is not None for n in range(3)] == [True] * 3
    assert [once.asks(part(n, known)) is not None for n in range(3)] == [False] * 3
    assert [again.asks(part(n, known)) is not None for n in range(4)] == [True, False] * 2
    found = torch.tensor([0.0, 16.0])
    assert again.calibrate(part(2, known), found)["text"].tolist() == [1.0, 14.0]
    assert once.calibrate(part(0, {}), found)["text"].tolist() == [0.0, 16.0]


def test_updates_are_counted_from_the_start_of_the_ramp() -> None:
    ramp = Gradual(start=10, end=25, hold_until=40, every=10, target=0.5)
    updates = [step for step in range(50) if ramp.is_update(step)]
    assert updates == [10, 20, 25, 30, 40]
    assert [ramp.updates_before(step) for step in updates] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("score", [Curvature(sequences=4), Activation(sequences=4)])
def test_a_resumed_run_does_not_measure_again(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(pruner: Pruner, model: Net, step: int) -> str:
        with torch.no_grad():
            for name in NAMES:
                model.get_parameter(name).mul_(1 + 0.1 * torch.arange(SIZE))
        pruner.after_step(step)
        return fingerprint(pruner.masks())

    model, pruner = made(score, hold_until=1, every=1)
    pruner.after_step(0)
    pruner.save(tmp_path)
    whole = trained(pruner, model, 1)
    again, resumed = made(score, hold_until=1, every=1)
    resumed.load(tmp_path, 0)
    monkeypatch.setattr(calibration.Calibration, "measure", None)
    assert trained(resumed, again, 1) == whole


def test_the_model_is_left_as_it_was() -> None:
    model, pruner = made(Curvature(sequences=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    pruner.after_step(0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert fuse(model)["total"]["zeros"] == 2 * SIZE * SIZE // 2


def test_a_model_without_text_and_a_curvature_that_is_not_finite_are_refused() -> None:
    pruner = Pruner(
        Net(), Gradual(end=0, target=0.5), Pattern(include=("layer",), score=Curvature())
    )
    with pytest.raises(RunError, match="curvature: needs text"):
        pruner.after_step(0)
    model, pruner = made(Curvature(sequences=2))
    model.get_parameter("layer.1.bias").data[0] = float("nan")
    with pytest.raises(RunError, match=r"layer.0.weight: its curvature on this text is not finite"):
        pruner.after_step(0)
    assert pruner.sparsity() == 0.0


def test_settings_are_checked() -> None:
    for value in ({"kind": "curvature", "sequences": 0}, {"kind": "curvature", "decay": 1.5}):
        with pytest.raises(ValidationError, match="greater than or equal to 1|less than 1"):
            Pattern.model_validate({"score": value})
    assert Pattern.model_validate({"score": "activation"}).score == Activation()
