"""The tables in opfa/bench/README.md are those of opfa/bench/results. Written anew by

OPFA_REWRITE=1 pytest tests/bench/test_bench_page.py
"""

import os
import re
from pathlib import Path

import pytest

from opfa.bench import shapes, steps
from opfa.bench.costs import Costs
from opfa.bench.files import KINDS, Files
from opfa.bench.finetune import Finetuning
from opfa.bench.serve import Serving
from opfa.bench.shapes import DENSE, LEAST, SMALL, Shapes, bench_shapes
from opfa.bench.speed import Inference
from opfa.bench.steps import MaskUpdates, TeacherSteps
from opfa.report.between import write_between
from opfa.report.tables import Result

ROOM = Path(__file__).parents[2] / "opfa/bench"
MEASURED = {
    "train": Costs,
    "masks": MaskUpdates,
    "distillation": TeacherSteps,
    "files": Files,
    "finetune": Finetuning,
    "inference": Inference,
    "inference-amx": Inference,
    "serve": Serving,
    "shapes": Shapes,
}


def found(name: str) -> Result:
    text = (ROOM / f"results/{name}.json").read_text()
    return MEASURED[name].model_validate_json(text)


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_shows_what_was_measured(name: str, tmp_path: Path) -> None:
    page = ROOM / "README.md"
    written = page if os.environ.get("OPFA_REWRITE") else tmp_path / "README.md"
    before = page.read_text()
    written.write_text(before)
    write_between(written, f"opfa bench {name}", found(name).markdown())
    assert written.read_text() == before


def test_what_the_text_says_of_a_step_is_measured() -> None:
    costs = found("train")
    assert isinstance(costs, Costs)
    time, memory = (costs.ratios[f"ours / plain, {of}"] for of in ("time", "peak memory"))
    text = (ROOM / "README.md").read_text()
    said = f"takes {time:.2f} of a plain loop's time and {memory:.2f} of its memory"
    assert said in " ".join(text.split())


def test_ratios_and_sums_follow_from_what_was_measured() -> None:
    teachers, files = found("distillation"), found("files")
    assert isinstance(teachers, TeacherSteps) and isinstance(files, Files)
    for step in teachers.rows:
        assert step.ratio == pytest.approx(step.anew / step.kept)
    for form in files.rows:
        encoder = sum(form.parts[kind] for kind in KINDS[:3])
        assert form.encoder_bits == pytest.approx(8 * encoder / files.weights)
        assert sum(form.parts.values()) == pytest.approx(form.bytes, rel=2e-3)


def test_a_step_is_measured_with_logits_kept_and_computed_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    monkeypatch.setattr(steps, "TEACHERS", {"BERT-base": shape, "BERT-large": shape})
    monkeypatch.setattr(steps, "REPEATS", 1)
    rows = steps.bench_distillation().rows
    assert [row.teacher for row in rows] == ["BERT-base", "BERT-large"]
    assert all(row.kept > 0 and row.ratio == row.anew / row.kept for row in rows)


def test_a_mask_update_is_measured_with_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "NUM_LAYERS", 1)
    monkeypatch.setattr(steps, "SHAPES", [(64, 64)])
    monkeypatch.setattr(steps, "in_a_process", lambda measure, *given: measure(*given))
    found = steps.bench_masks()
    assert found.weights == 64 * 64 and [row.scope for row in found.scopes] == ["layer", "global"]
    assert all(row.is_exact for row in found.scopes)


def test_what_the_readme_says_of_speed_is_measured() -> None:
    measured, text = found("inference"), (ROOM.parents[1] / "README.md").read_text()
    assert isinstance(measured, Inference)
    ratios = measured.by_tokens.ratios
    torch = [f"{ratios[f'ours, {dtype}']['128']:.1f}" for dtype in ("fp32", "bf16", "int8")]
    said = re.search(r"([\d.]+) times as fast as .*bf16 ([\d.]+) and in int8 ([\d.]+) times", text)
    assert said and torch == [*said.groups()]
    said = re.findall(r"(?:DeepSparse|OpenVINO) takes ([\d.]+) |our int8 ([\d.]+) times", text)
    amx = found("inference-amx")
    assert isinstance(amx, Inference)
    others = [
        f"{result.race.speeds[name].ratio:.1f}"
        for result, name in (
            (measured, "DeepSparse, fp32"),
            *(
                (each, name)
                for each in (measured, amx)
                for name in ("OpenVINO, int8", "ours, int8")
            ),
        )
    ]
    assert others == ["".join(groups) for groups in said]


def test_shapes_are_measured_against_their_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 1536}
    monkeypatch.setattr(shapes, "MINILM", {**shapes.MINILM, **sizes})
    monkeypatch.setattr("torch.compile", lambda model, **_: model)  # it takes minutes
    monkeypatch.setattr("shutil.which", lambda _: "g++")
    measured = bench_shapes(1)
    rows = {(row.heads, row.neurons): row for row in measured.rows}
    assert rows[DENSE].macs_large == rows[DENSE].large == 1
    dense, small = (
        4 * 48 * 48 + 2 * 48 * 1536 + 2 * 128 * 48,
        2 * 48 * 48 + 2 * 48 * 512 + 2 * 128 * 24,
    )
    assert rows[SMALL].macs_large == pytest.approx(dense / small)
    assert all(row.large > 0 and row.one > 0 for row in (*measured.rows, *measured.engines))
    engines = {(row.engine, row.heads, row.neurons): row for row in measured.engines}
    names = ("torch, compiled", "ONNX Runtime", "ours, fp32", "ours, int8, 70% zeros")
    assert engines.keys() == {(name, *shape) for name in names for shape in (DENSE, SMALL, LEAST)}
    assert all(engines[name, *DENSE].own_large == 1 for name in names)
