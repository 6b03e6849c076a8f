"""What chose the zeros: from the run that pruned to whoever holds them, and where it is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finetune_recipe
from safetensors.torch import load_file, save_file
from torch import nn

import opfa
from opfa.commands import app as cli
from opfa.compression.measured import Curvature, Fisher
from opfa.compression.pattern import PartPattern, Pattern
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.compression.scores import Magnitude, Part, Score
from opfa.downstream.calibrate import calibrate
from opfa.downstream.finetune import finetune
from opfa.errors import ModelError
from opfa.releases.release import release
from opfa.sparsity.chosen import in_words, noted

CURVATURE = {"kind": "curvature", "sequences": 16, "decay": 0.0}
SAID = "curvature (sequences 16, decay 0)"


class Random(Score):
    """Of one's own, without a kind."""

    share: float = 0.5

    def of(self, part: Part) -> torch.Tensor:
        return torch.rand_like(part.weight)


def stated(model: Path) -> dict[str, Any]:
    return json.loads((model / "sparsity.json").read_text())


@pytest.fixture(scope="module")
def pruned(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that pruned by curvature while it was fine-tuned."""
    output = tmp_path_factory.mktemp("pruned") / "run"
    score = {"kind": "curvature", "sequences": 16}
    pruning = {"schedule": {"end": 2, "target": 0.75}, "pattern": {"score": score}}
    finetune(finetune_recipe(sparse, examples, model={"zeros": "free"}, pruning=pruning), output)
    return output


def test_a_score_has_its_kind_and_its_numbers() -> None:
    assert Magnitude().facts() == {"kind": "magnitude"}
    assert Curvature(sequences=16).facts() == CURVATURE
    assert Fisher(every=2).facts()["every"] == 2
    assert Random().facts() == {"kind": "Random", "share": 0.5}


def test_parts_that_agree_are_one_and_nothing_is_nothing() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    parts = [
        *(PartPattern(include=(f"^{name}$",)) for name in "ab"),
        PartPattern(include=("^c$",), score=Curvature(sequences=16)),
    ]
    found = Pruner(model, Gradual(end=1, target=0.5), parts).chosen_by()
    assert noted(found) == {"chosen_by": [{"kind": "magnitude"}, CURVATURE]}
    assert in_words(noted(found)["chosen_by"]) == f"magnitude; {SAID}"
    assert noted([]) == {}
    own = Pruner(nn.ModuleDict({"a": nn.Linear(4, 4)}), Gradual(end=1, target=0.5),
                 Pattern(include=("a",)), score=Random())  # fmt: skip
    assert own.chosen_by() == [Random().facts()]


def test_a_run_notes_its_score_and_zeros_that_are_held_keep_it(
    sparse: Path, pruned: Path, examples: Path, tmp_path: Path
) -> None:
    assert stated(sparse)["chosen_by"] == [{"kind": "magnitude"}]
    assert stated(pruned / "model")["chosen_by"] == [CURVATURE]
    held = finetune_recipe(pruned / "model", examples, quantization={"bits": 8})
    finetune(held, tmp_path / "held")
    assert stated(tmp_path / "held/model")["chosen_by"] == [CURVATURE]
    again = finetune_recipe(pruned / "model", examples)
    calibrate(str(pruned), again, tmp_path / "calibrated", num_examples=8)
    assert stated(tmp_path / "calibrated")["chosen_by"] == [CURVATURE]
    free = finetune_recipe(pruned / "model", examples, model={"zeros": "free"})
    finetune(free, tmp_path / "free")
    assert "chosen_by" not in stated(tmp_path / "free/model")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"kind": "magnitude"}),
        ({"score": Random()}, {"kind": "Random", "share": 0.5}),
        (
            {"score": "activation", "reconstruct": True},
            {"kind": "activation", "sequences": 128, "decay": 0.0, "least_squares": True},
        ),
        ({"score": "admm"}, {"kind": "admm", "iterations": 20, "ramp": 15, "penalty": 1.0}),
    ],
)
def test_one_shot_notes_its_score(
    options: dict[str, Any], expected: dict[str, Any], pruned: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    _without_zeros(pruned / "model", dense)
    if options.get("score") in ("activation", "admm"):
        options = {**options, "texts": ["the cat sees the sea."] * 40, "sequences": 40}
    opfa.prune(dense, 0.5, tmp_path / "sparse", **options)
    assert stated(tmp_path / "sparse")["chosen_by"] == [expected]


def _without_zeros(model: Path, directory: Path) -> None:
    directory.mkdir()
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            tensors = {n: torch.where(t == 0, 0.01, t) for n, t in load_file(path).items()}
            save_file(tensors, directory / path.name, {"format": "pt"})
        elif path.is_file() and path.name != "sparsity.json":
            (directory / path.name).write_bytes(path.read_bytes())


def test_inspect_says_it_on_the_terminal_as_json_and_on_the_page(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["inspect", str(pruned), "--page", str(page)]) == 0
    assert f"zeros chosen by: {SAID}" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["inspect", str(pruned), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen_by"] == [CURVATURE]
    assert opfa.inspect(pruned)["chosen_by"] == [CURVATURE]
    for file in (page, pruned / "report/index.html"):
        text = file.read_text()
        assert "zeros chosen by" in text and SAID in text


def test_nothing_is_said_of_a_model_without_a_note_or_with_other_zeros(
    pruned: Path, tmp_path: Path
) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    _without_zeros(pruned / "model", other)
    (other / "sparsity.json").write_text(json.dumps(stated(pruned / "model")))
    assert opfa.inspect(other)["stated"] == "differs" and "chosen_by" not in opfa.inspect(other)
    bare.mkdir()
    for path in (pruned / "model").iterdir():
        if path.is_file():
            (bare / path.name).write_bytes(path.read_bytes())
    older = {key: value for key, value in stated(bare).items() if key != "chosen_by"}
    (bare / "sparsity.json").write_text(json.dumps(older))
    found = opfa.inspect(bare)
    assert found["stated"] == "matches" and "chosen_by" not in found


@pytest.mark.parametrize(
    "note",
    [
        "curvature",
        [{"sequences": 3}],
        [{"kind": "\x1b[31mred"}],
        [{"kind": "x", "a\nb": 1}],
        [{"kind": "x" * 61}],
        [{"kind": ["x"]}],
        [{"kind": "x"}] * 101,
    ],
)
def test_a_note_that_is_none_is_refused(note: Any, pruned: Path, tmp_path: Path) -> None:
    _without_zeros(pruned / "model", tmp_path / "model")
    report = {**stated(pruned / "model"), "chosen_by": note}
    (tmp_path / "model/sparsity.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match="sparsity.json: not a sparsity report: chosen_by"):
        opfa.inspect(tmp_path / "model")


def test_card_and_release_say_it(pruned: Path, sparse: Path, tmp_path: Path) -> None:
    found = release(pruned, tmp_path / "released", form="compact")
    assert found.chosen_by == [CURVATURE]
    assert f"The zeros were chosen by {SAID}." in (tmp_path / "released/README.md").read_text()
    facts = json.loads((tmp_path / "released/release.json").read_text())["facts"]
    assert facts["chosen_by"] == stated(tmp_path / "released")["chosen_by"] == [CURVATURE]
    opfa.unpack(tmp_path / "released", tmp_path / "plain")
    assert opfa.inspect(tmp_path / "plain")["chosen_by"] == [CURVATURE]
    report = stated(sparse)
    older = release(sparse.parent, tmp_path / "older")
    assert older.chosen_by == report["chosen_by"] == [{"kind": "magnitude"}]
