"""Pruning along a ramp inside of transformers' Trainer."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import opfa
from opfa.compression.movement import SoftMovement
from opfa.compression.pruner import FILE
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Magnitude, Part, Score, State
from opfa.errors import ModelError, RecipeError
from opfa.integrations.pruning import MASKS, MaskUpdate, PruningCallback
from opfa.sparsity.layers import MaskedLinear, masks_of

DATA: Any = [{"input_ids": [2, 7 + i % 5, 3], "labels": i % 2} for i in range(32)]
SIZES = [256] * 8 + [512] * 4  # 4 of attention and 2 of the feed-forward, in 2 layers


def dense() -> BertForSequenceClassification:
    torch.manual_seed(0)
    values = {name: value for name, value in TINY_BERT.items() if name != "model_type"}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **values))


def trainer(
    model: PreTrainedModel, directory: Path, callback: PruningCallback, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(directory),
        **{"max_steps": 8, "save_steps": 3, "learning_rate": 1e-2, **settings},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback])


class Looking(PruningCallback):
    """Keeps a copy of the masks after every step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.masks: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, _: Any, state: Any, *__: Any, model: Any = None, **___: Any) -> None:
        super().on_step_end(_, state)
        found = {name: mask.clone() for name, mask in masks_of(model).items()}
        self.masks[state.global_step] = found


@pytest.mark.parametrize(
    ("settings", "bf16"),
    [({}, False), ({"start": 1, "end": 5, "every": 2, "hold_until": 7, "initial": 0.3}, True)],
)
def test_counts_are_the_schedules_at_every_update(
    tmp_path: Path, settings: dict[str, Any], bf16: bool
) -> None:
    callback, model = Looking(0.9, **{"every": 1, **settings}), dense()
    trainer(model, tmp_path, callback, bf16=bf16).train()
    steps = {"start": 0, "end": 4, "every": 1, **settings}
    schedule = Gradual(**steps, target=0.9)
    expected = [step for step in range(9) if schedule.is_update(step)]
    assert [update.step for update in callback.updates] == expected
    for update in callback.updates:
        zeros = [round(schedule.sparsity_at(update.step) * size) for size in SIZES]
        asked = schedule.sparsity_at(update.step)
        assert update == MaskUpdate(update.step, asked, sum(zeros), sum(SIZES))
        if update.step:
            found = callback.masks[update.step].values()
            assert sorted(int((~mask).sum()) for mask in found) == sorted(zeros)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert opfa.inspect(model)["total"]["zeros"] == sum(round(0.9 * size) for size in SIZES)


def test_of_all_together_the_count_is_the_schedules(tmp_path: Path) -> None:
    callback, model = PruningCallback(0.8, end=3, every=1, scope="global"), dense()
    trainer(model, tmp_path, callback).train()
    assert callback.updates[-1].zeros == round(0.8 * sum(SIZES))
    zeros = [tensor["zeros"] for tensor in opfa.inspect(model)["tensors"].values()]
    assert sum(zeros) == round(0.8 * sum(SIZES)) and len({n / 256 for n in zeros}) > 2


def ramp() -> Looking:
    return Looking(0.9, end=5, every=2)


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Looking, PreTrainedModel]:
    """Where the checkpoints are, the callback, the finished model."""
    directory, callback, model = tmp_path_factory.mktemp("unbroken"), ramp(), dense()
    trainer(model, directory, callback).train()
    return directory, callback, model


@pytest.fixture
def directory(unbroken: tuple[Path, Looking, PreTrainedModel], tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(unbroken[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("last", [3, 6])  # in the ramp, and behind it
def test_a_resumed_run_is_the_unbroken_one(
    unbroken: tuple[Path, Looking, PreTrainedModel], directory: Path, last: int
) -> None:
    _, before, model = unbroken
    callback, resumed = ramp(), dense()
    point = directory / f"checkpoint-{last}"
    trainer(resumed, directory, callback).train(resume_from_checkpoint=str(point))
    assert list(callback.masks) == list(range(last + 1, 9))
    for step, masks in callback.masks.items():
        for name, mask in masks.items():
            assert torch.equal(mask, before.masks[step][name]), (step, name)
    assert callback.updates == before.updates
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_behind_the_ramp_is_sparse_and_plain(
    unbroken: tuple[Path, Looking, PreTrainedModel],
) -> None:
    after = AutoModelForSequenceClassification.from_pretrained(unbroken[0] / "checkpoint-6")
    assert opfa.inspect(after)["fingerprint"] == opfa.inspect(unbroken[2])["fingerprint"]


def test_only_a_model_behind_the_ramp_can_be_the_best(tmp_path: Path) -> None:
    """Each evaluation is worse than those before, so the best of all is the first."""
    settings = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps"}
    loop = trainer(
        model := dense(),
        tmp_path,
        PruningCallback(0.9, end=3, every=1),
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **settings,
    )
    scores = iter(range(100, 0, -1))
    loop.compute_metrics = lambda _: {"score": next(scores)}
    loop.train()
    assert loop.state.best_global_step == 3
    assert opfa.inspect(model)["total"]["zeros"] == sum(round(0.9 * size) for size in SIZES)


def test_a_checkpoint_without_masks_is_refused(directory: Path) -> None:
    (directory / f"checkpoint-3/{MASKS}").unlink()
    with pytest.raises(ModelError, match=r"checkpoint-3 has no opfa-masks\.safetensors"):
        trainer(dense(), directory, ramp()).train(
            resume_from_checkpoint=str(directory / "checkpoint-3")
        )


def test_a_resume_with_another_ramp_is_refused(directory: Path) -> None:
    again = trainer(dense(), directory, PruningCallback(0.9, end=6, every=2))
    with pytest.raises(RecipeError, match="end was 5 when .*checkpoint-3 was written, and is 6"):
        again.train(resume_from_checkpoint=str(directory / "checkpoint-3"))


def test_a_checkpoint_of_another_directory_is_given(directory: Path, tmp_path: Path) -> None:
    point = directory / "checkpoint-6"
    here = PruningCallback(0.9, end=5, every=2, resume_from=point)
    trainer(dense(), tmp_path / "new", here).train(resume_from_checkpoint=str(point))
    assert here.updates[-1].step == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.5}, "sparsity: Input should be less than 1"),
        ({"sparsity": 0.9, "end": 1.5}, "end: must be steps, an .* or a share of .* 1.0 .got 1.5"),
        ({"sparsity": 0.9, "start": 5, "end": 3}, "end = 3: the ramp must not end before start"),
        ({"sparsity": 0.9, "start": 0.6}, "end = 0.5: the ramp must not end before start = 0.6"),
        ({"sparsity": 0.9, "every": 0}, "every: must be steps, an .* equal to 1, or a share"),
        ({"sparsity": 0.9, "scope": "row"}, "scope: Input should be 'layer' or 'global'"),
        ({"sparsity": 0.9, "score": "size"}, "score"),
        ({"sparsity": 0.9, "end": "half"}, "end: must be steps, .* or a share .*.got 'half'"),
    ],
)
def test_what_can_not_be_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PruningCallback(**settings)


def test_a_ramp_beyond_the_end_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"last mask update, 9, is after the end .*\(step 8\)"):
        trainer(dense(), tmp_path, PruningCallback(0.9, end=9)).train()
    with pytest.raises(RecipeError, match="end = 4: .* before start = 5, of 8 steps"):
        trainer(dense(), tmp_path, PruningCallback(0.9, start=5, end=0.5)).train()


def test_a_training_that_ends_early_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Ending(PruningCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            super().on_step_end(args, state, control, **options)
            control.should_training_stop = state.global_step == 2

    with caplog.at_level(logging.INFO, "opfa"):
        trainer(dense(), tmp_path, Ending(0.9, end=5, every=1)).train()
    assert "ended at step 2, before its last update" in caplog.text


def test_movement_learns_at_the_pace_of_the_trainers_scheduler(tmp_path: Path) -> None:
    """Of two steps of warm-up the Trainer's first has no rate, and the second half of it."""
    callback = PruningCallback(0.9, score="movement", start=2, end=4, every=1)
    trainer(dense(), tmp_path, callback, max_steps=4, warmup_steps=2, save_steps=1).train()
    first, second = (load_file(tmp_path / f"checkpoint-{n}" / FILE) for n in (1, 2))
    assert not any(run.any() for key, run in first.items() if key.startswith("score/"))
    moved = [float(run.abs().max()) for key, run in second.items() if key.startswith("score/")]
    assert len(moved) == len(SIZES) and all(0.002 < most < 0.0055 for most in moved)
    assert callback.updates[-1].zeros == sum(round(0.9 * size) for size in SIZES)


def test_an_update_by_thresholds_says_what_came_out(tmp_path: Path) -> None:
    score = SoftMovement(penalty=1e6, initial_threshold=0.4, threshold=0.499)
    callback = PruningCallback(0.9, score=score, start=2, end=4, every=1)
    trainer(dense(), tmp_path, callback, max_steps=4).train()
    assert [update.sparsity for update in callback.updates] == [
        update.zeros / update.size for update in callback.updates
    ]
    assert callback.updates[0].zeros == 0
    assert callback.updates[-1].zeros == sum(int(0.9 * size) for size in SIZES)


def test_a_score_sees_the_gradient_of_the_whole_step(tmp_path: Path) -> None:
    """Two micro-batches of four are one batch of eight."""

    class Fisher(Score):
        kind: str = "fisher"

        def observes(self, step: int) -> bool:
            return step > 0

        def observe(self, part: Part, gradient: torch.Tensor) -> State:
            seen.append((part.step, part.name, gradient.clone()))
            return {"sum": part.state.get("sum", 0) + gradient**2}

        def of(self, part: Part) -> torch.Tensor:
            return Magnitude().of(part) if not part.state else part.state["sum"]

    found = []
    for sizes in ((4, 2), (8, 1)):
        seen: list[tuple[int, str, torch.Tensor]] = []
        model: Any = dense()
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=sizes[0],
            gradient_accumulation_steps=sizes[1],
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        model.accepts_loss_kwargs = False  # else the loss is too large by the accumulation
        callback = PruningCallback(0.5, start=1, end=1, score=Fisher())
        Trainer(model, arguments, train_dataset=DATA, callbacks=[callback]).train()
        found.append(seen)
    assert len(found[0]) == len(SIZES) and all(gradient.any() for *_, gradient in found[0])
    assert [(step, name) for step, name, _ in found[0]] == [(1, name) for _, name, _ in found[1]]
    for (_, _, one), (_, _, other) in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
