"""`opfa bench inference`: contestants in processes, their turns, and what is made of them."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from opfa.bench import contest
from opfa.bench.contest import Stage, Turns
from opfa.bench.contestants import OURS, TORCH, Contestant, Plan
from opfa.bench.graphs import transpose_weights
from opfa.bench.inference import bench_inference
from opfa.bench.speed import Inference
from opfa.commands.app import app
from opfa.errors import RunError

TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 1000,
}
PLAN = Plan(
    rounds=2,
    threads=1,
    tokens=8,
    config=TINY,
    small=TINY,
    contestants=(OURS, "ours, int8", TORCH, "DeepSparse, fp32"),
    sparsities=(0.0, 0.9),
    lengths=(4, 8),
    batch=(2, 4),
)


class Here:
    """A contestant in this process, since torch takes seconds to import in another one."""

    def __init__(
        self, _: str, contestant: Contestant, paths: Mapping[str, Path], threads: int
    ) -> None:
        module, _, name = contestant.engine.partition(":")
        given = {key: str(path) for key, path in paths.items()}
        self.engine = getattr(import_module(module), name)(given, threads, **contestant.options)

    def ask(self, do: str, **values: Any) -> Any:
        return json.loads(json.dumps(getattr(self.engine, do)(**values)))

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Inference]:
    work = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "Worker", Here)
        patch.setattr("opfa.bench.figures.STREAM_SECONDS", 0.01)
        patch.setattr("opfa.bench.worker.SETTLED", 0.01)
        patch.setattr("opfa.bench.worker.WATCHED", 0.01)
        return work, bench_inference(None, PLAN, work)


def test_every_section_is_measured(measured: tuple[Path, Inference]) -> None:
    found = measured[1]
    race = found.race
    assert list(race.speeds) == [OURS, "ours, int8", TORCH]
    assert race.left_out == {"DeepSparse, fp32": "deepsparse is not installed"}
    assert race.shape.sparsity == pytest.approx(0.9, abs=0.02)
    assert all(len(speed.milliseconds) == 2 for speed in race.speeds.values())
    assert race.speeds[OURS].ratio == 1
    parts = found.anatomy.parts
    linear = [part for name, part in parts.items() if "linear" in name]
    assert linear and all(part.rate and part.share is not None for part in linear)
    assert found.by_sparsity is not None and found.small is not None
    for sweep, values in ((found.by_sparsity, {"0", "0.9"}), (found.by_tokens, {"4", "8"})):
        assert all(set(curve) == values for curve in sweep.milliseconds.values())
        assert set(sweep.ratios) == {OURS, "ours, int8"}
    assert found.figures.streams > 0 and found.figures.bytes_a_weight[OURS] > 4


def test_it_shows_itself_and_draws_itself(measured: tuple[Path, Inference], tmp_path: Path) -> None:
    found = measured[1]
    text = found.markdown()
    assert "DeepSparse, fp32: left out: deepsparse is not installed" in text
    assert "bert, 1 layers of 32, 9" in text
    assert Inference.model_validate_json(found.model_dump_json()) == found
    found.draw(tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_a_bench_that_was_stopped_goes_on(
    measured: tuple[Path, Inference], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, found = measured
    monkeypatch.setattr(contest, "Worker", None)  # nothing is measured again
    assert bench_inference(None, PLAN, work) == found


def test_the_command_prints_json_and_keeps_what_it_was_asked_to_keep(
    measured: tuple[Path, Inference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, found = measured
    plans = []

    def again(model: str | None, plan: Plan, directory: Path) -> Inference:
        plans.append((model, plan.threads, plan.peers, directory))
        return bench_inference(None, PLAN, work)  # was measured

    monkeypatch.setattr("opfa.bench.inference.bench_inference", again)
    options = ["--threads", "3", "--peers", "a", "--peers", "b", "--work", str(tmp_path)]
    picture = tmp_path / "latency.png"
    done = CliRunner().invoke(
        app, ["bench", "inference", "mine", *options, "--picture", str(picture), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert plans == [("mine", 3, ("a", "b"), tmp_path)] and picture.exists()
    assert Inference.model_validate_json(done.stdout) == found


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "peak", lambda: 100.0)
    slow = iter((2.0, 20.0, 3.0))  # the machine was slow in the second round
    fast = iter((1.0, 10.0, 1.0))
    turns = Turns().take({"slow": lambda: [next(slow)], "fast": lambda: [next(fast)]}, 3)
    assert turns.ratio("slow", "fast") == 2
    assert turns.median("slow") == 3000 and turns.fastest["fast"] == 1000
    assert turns.steadiness().median == 100


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that gives its input back."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    names = ("input_ids", "same")
    kind, axes = onnx.TensorProto.INT64, ["batch", "tokens"]
    values = [onnx.helper.make_tensor_value_info(name, kind, axes) for name in names]
    node = onnx.helper.make_node("Identity", ["input_ids"], ["same"])
    made = onnx.helper.make_graph([node], "same", values[:1], values[1:])
    opset = onnx.helper.make_opsetid("", 17)
    path = tmp_path_factory.mktemp("graph") / "fp32.onnx"
    onnx.save(onnx.helper.make_model(made, opset_imports=[opset], ir_version=8), path)
    return path


def test_a_contestant_is_stopped_but_for_its_turns(graph: Path) -> None:
    with Stage(Plan(threads=1)) as stage:
        worker = stage.need("ONNX Runtime, fp32", {"": graph.parent})
        assert len(worker.ask("call", lengths=[3, 2], calls=2)) == 2
        status = Path(f"/proc/{worker._process.pid}/stat")
        assert status.read_text().rpartition(")")[2].split()[0] == "T"
        assert worker.ask("loading")["bytes"] > 0
        assert worker.ask("idle", lengths=[3]) < 0.5
    assert not status.exists()


def test_a_contestant_that_cant_start_is_left_out_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "fp32.onnx").write_text("no graph")
    with Stage(Plan(threads=1)) as stage:
        assert stage.add("ONNX Runtime, fp32", {"": tmp_path}) is None
    assert "OnnxRuntime ended: " in stage.left_out["ONNX Runtime, fp32"]


def test_a_python_that_isnt_there_is_refused() -> None:
    with pytest.raises(RunError, match="--peers /none/python: can't be run"):
        contest.python_with("deepsparse", ["/none/python"])


def test_weights_lie_transposed_instead_of_being_transposed_by_a_node() -> None:
    onnx = pytest.importorskip("onnx")
    weight = np.arange(6, dtype=np.int8).reshape(2, 3)
    nodes = [
        onnx.helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        onnx.helper.make_node("Transpose", ["input"], ["output"]),
    ]
    stored = onnx.numpy_helper.from_array(weight, "weight")
    graph = onnx.helper.make_graph(nodes, "graph", [], [], [stored])
    transpose_weights(graph)
    assert [node.output[0] for node in graph.node] == ["output"]
    assert graph.initializer[0].name == "turned"
    found = onnx.numpy_helper.to_array(graph.initializer[0])
    np.testing.assert_array_equal(found, weight.T)
