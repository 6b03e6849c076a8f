"""DeepSpeed configuration files: what a launch may choose, and what is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from opfa.errors import RecipeError
from opfa.training.zero import DeepSpeedFile

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_read_and_say_what_they_are_called(path: Path) -> None:
    file = DeepSpeedFile.load(str(path))
    assert path.stem.startswith(f"zero{file.stage}")
    assert (file.zero_optimization.offload_optimizer is not None) == ("offload" in path.stem)
    assert file.values()["zero_optimization"]["stage"] == file.stage


def test_without_a_file_it_is_zero_1_for_one_process_and_zero_2_for_several() -> None:
    assert [DeepSpeedFile.load(None, processes).stage for processes in (1, 2, 8)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size: belongs to the recipe, as training.batch"),
        ({"gradient_clipping": 1.0}, "belongs to the recipe, as training.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "belongs to the recipe, as training.precision"),
        ({"zero_optimization": {"stage": 4}}, r"stage: Input should be 0, 1, 2 or 3 \(got 4\)"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "round_robin_gradients = True: not with opfa: it breaks",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "it rounds weights"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer: needs stage 1, 2 or 3",
        ),
        ({"zero_optimization": 3}, r"zero_optimization: Input should be an object \(got 3\)"),
        ({"zero_optimization": [2]}, r"zero_optimization: Input should be an object \(got \[2\]"),
        ({"zero_optimization": {"stag": 1}}, "stag: unknown key; did you mean 'stage'"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "got 'auto'"),
        ({"elasticity": {}}, "elasticity: unknown key; known keys"),
        ([1], "must hold a JSON object"),
    ],
)
def test_what_is_not_a_matter_of_the_launch_is_refused(
    tmp_path: Path, values: Any, message: str
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(values))
    with pytest.raises(RecipeError, match=message) as caught:
        DeepSpeedFile.load(str(tmp_path / "x.json"))
    assert "launch.deepspeed = " in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RecipeError, match=r"x\.json': can't read this file"):
        DeepSpeedFile.load(str(tmp_path / "x.json"))


def test_what_is_off_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"zero_optimization": {"round_robin_gradients": false}}')
    assert "round_robin_gradients" not in DeepSpeedFile.load(str(tmp_path / "x.json")).values()
