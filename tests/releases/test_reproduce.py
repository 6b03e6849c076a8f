"""`launch/reproduce.sh`: the whole experiment on a tiny model, its recipes made short."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences, write_records

from opfa.commands import app as cli
from opfa.errors import STOPPED, RunError
from opfa.hub.manifest import check
from opfa.models.configs import load_tokenizer
from opfa.models.encoders import write_model
from opfa.models.pretraining import load_pretraining_model
from opfa.report.tables import figure
from opfa.storage import seal
from opfa.weights.inspection import inspect

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes/minilm"
START = [5e-5, 1.5e-4, 4.5e-4]
SOME = ("baseline", "no-distillation", "monotone", "global")  # of the ablations; all take minutes
SHORTER = {
    "sequence_tokens = 128": "sequence_tokens = 24",
    "validation = 0.01": "validation = 0.1",
    r"steps = [\d_]+00.*": "steps = 6",
    r"warmup_steps = \d+": "warmup_steps = 1",
    r"end = \d.*": "end = 3",
    r"hold_until = .*": "hold_until = 4",
    r"every = .*": "every = 1",
    "batch = (32|16)": "batch = 8",
    r"epochs = 0\.5": "epochs = 1",
}


@pytest.fixture(scope="module")
def output(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as launch/reproduce.sh makes it."""
    directory = tmp_path_factory.mktemp("reproduce")
    model = load_pretraining_model(str(sparse), "mlm")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    write_model(model, load_tokenizer(str(sparse)), directory / "model")
    texts = list(sentences())
    documents = [{"text": " ".join(texts[i : i + 14])} for i in range(0, 280, 14)]
    write_records(directory / "data/pretrain/train-0.jsonl.gz", documents)
    rows = [{"sentence": text, "label": int("cat" in text)} for text in texts]
    write_records(directory / "data/sst2/train.jsonl.gz", rows[:80])
    write_records(directory / "data/sst2/validation.jsonl.gz", rows[80:120])
    shutil.copytree(RECIPES, directory / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (directory / "recipes").glob("*.toml"):
        text = recipe.read_text()
        for long, short in SHORTER.items():
            text = re.sub(f"^{long}$", short, text, flags=re.MULTILINE)
        recipe.write_text(text)
    return directory


@pytest.fixture(scope="module")
def reproduce(output: Path) -> Any:
    """The program, run in `output` and in this process; `commands` are those that it ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        patch.chdir(output)
        program: Any = importlib.import_module("reproduce")
        program.commands = []

        def execute(arguments: list[str]) -> int:
            program.commands.append(arguments)
            return cli.run(arguments)

        program.EXECUTE = program.execute
        patch.setattr(program, "execute", execute)
        patch.setattr(program, "SEEDS", {"sst2": 2})
        some = {name: value for name, value in program.ABLATIONS.items() if name in SOME}
        patch.setattr(program, "ABLATIONS", some)
        patch.setattr(program, "RELEASED", ("sst2",))
        patch.setattr(program, "RATES", (3e-5, 3e-4))
        patch.setattr(program, "EDGES", (1e-5, 1e-3))
        program.main(["students", "sst2", "ablations", "releases"])
        yield program


@pytest.fixture(scope="module")
def table(reproduce: Any, output: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((output / "results/table.json").read_text())


def test_every_method_is_measured_at_its_sparsity(table: dict[str, Any], output: Path) -> None:
    found = {(row["method"], row["percent"]): row for row in table["rows"]}
    sparse = ("one-shot", "gradual", "prune-once", "prune-once-fp32", "prune-once-8bit")
    dense = ("dense", "dense-fp32", "dense-8bit")
    expected = {*((m, 0) for m in dense), *((m, p) for m in sparse for p in (85, 90))}
    assert set(found) == expected | {("gradual-early", 90)}
    for (method, percent), row in found.items():
        for seed, value in zip(row["seeds"], row["values"], strict=True):
            results = json.loads((output / row["run"] / f"seed-{seed}/results.json").read_text())
            assert results["sparsity"] == pytest.approx(percent / 100, abs=2e-3)
            assert results["quantized"] == method.endswith("8bit")
            assert value == results["metrics"]["accuracy"]
        assert row["seeds"] == [42, 43]
        assert row["mean"] == pytest.approx(sum(row["values"]) / 2)
        assert row["recovery"] == row["mean"] / found["dense", 0]["mean"]


def test_every_method_takes_as_many_steps(table: dict[str, Any], output: Path) -> None:
    steps: dict[str, set[int]] = {"8bit": set(), "fp32": set(), "all": set()}
    for row in table["rows"]:
        for seed in row["seeds"]:
            done = json.loads((output / row["run"] / f"seed-{seed}/done.json").read_text())
            form = row["method"].rpartition("-")[2]
            steps[form if form in steps else "all"].add(done["step"])
    assert steps == {"8bit": {2}, "fp32": {2}, "all": {10}}


def test_eight_bits_and_their_twins_begin_with_the_model_of_their_seed(output: Path) -> None:
    for seed in (42, 43):
        recipes = [
            tomllib.loads((output / run / f"seed-{seed}/recipe.toml").read_text())
            for run in ("runs/sst2/prune-once-8bit-90", "runs/sst2/prune-once-fp32-90")
        ]
        assert recipes[0].pop("quantization")["bits"] == 8
        assert recipes[0] == recipes[1]
        assert recipes[0]["model"]["init"] == f"runs/sst2/prune-once-90/seed-{seed}/model"
        assert recipes[0]["seed"] == seed


def test_every_number_can_be_traced(table: dict[str, Any], output: Path) -> None:
    text = (output / "results/table.md").read_text()
    for row in table["rows"]:
        runs = [f"{row['run']}/seed-{seed}" for seed in row["seeds"]]
        facts = zip(runs, row["recipes_sha256"], row["models_sha256"], strict=True)
        for run, recipe, model in facts:
            (line,) = [line for line in text.splitlines() if line.startswith(f"| `{run}` |")]
            assert recipe[:12] in line and model[:12] in line
    for run in ("teacher", "sparse-90", "ablations/global", "ablations/global-sst2"):
        assert f"| `runs/{run}` |" in text


def test_what_finished_runs_say_of_themselves_is_kept(table: dict[str, Any], output: Path) -> None:
    kept = json.loads((output / "results/runs.json").read_text())
    for path, text in kept.items():
        said = (output / path).read_text()
        if path.endswith("/metrics.jsonl"):
            lines = [line for line in said.splitlines() if '"eval": true' in line]
            assert lines and text.splitlines() == lines
        else:
            assert text == said
    for row in table["rows"]:
        for seed in row["seeds"]:
            path = f"{row['run']}/seed-{seed}"
            assert {f"{path}/recipe.toml", f"{path}/environment.json"} < set(kept)
            assert f"{path}/results.json" in kept
    assert "runs/sparse-90/done.json" in kept


def test_answers_of_another_model_are_refused(
    reproduce: Any, table: dict[str, Any], output: Path, tmp_path: Path
) -> None:
    answers: Any = importlib.import_module("answers")
    row = table["rows"][0]
    run = tmp_path / "run"
    shutil.copytree(output / row["run"] / "seed-42", run)
    right = answers.right_of(run)
    assert right.count("1") / len(right) == row["values"][0]
    first, *rest = (run / answers.FILE).read_text().splitlines()
    wrong = json.loads(first)
    wrong["prediction"] = "other" if right[0] == "1" else wrong["label"]
    (run / answers.FILE).write_text("\n".join([json.dumps(wrong), *rest]))
    with pytest.raises(RunError, match=r"answers\.jsonl: is not of this model"):
        answers.right_of(run)


def test_rates_are_chosen_on_held_out_examples_and_used_for_both_sparsities(
    reproduce: Any, table: dict[str, Any], output: Path
) -> None:
    assert len(table["learning_rates"]) == 2 * 5  # with dropout and without
    for row in table["learning_rates"]:
        method, rates = row["method"], {float(rate): s for rate, s in row["scores"].items()}
        text = (output / row["run"] / "finished").read_text()
        assert ("training.dropout=0.0" in text) == (row["dropout"] == 0.0)
        assert "task.train=split/sst2/fit.jsonl.gz task.validation=split/sst2/held" in text
        best = max(rates, key=lambda rate: rates[rate])
        assert row["chosen"] == best
        assert min(rates) < best < max(rates) or best in (1e-5, 9e-4)  # else more were tried
        finals = [output / "runs/sst2" / f"{method}-{percent}" for percent in (0, 85, 90)]
        for final in filter(Path.exists, finals):
            command = (final / "finished").read_text()
            if ("training.dropout=0.0" in command) == (row["dropout"] == 0.0):
                assert f"training.learning_rate={best}" in command
            assert ("training.dropout=0.0" in command) == (method != "dense")
    finals = [words for words in reproduce.commands if "--seeds" in words]
    assert len(finals) == 8
    assert not any("split" in word for words in finals for word in words)


@pytest.mark.parametrize(
    ("task", "best", "tried"),
    [
        ("sst2", {}, [START]),
        ("sst2", {5e-5: 2, 1.7e-5: 1}, [START, [1.7e-5, *START]]),
        (
            "sst2",
            {4.5e-4: 2, 1.4e-3: 3, 4.2e-3: 4},
            [START, [*START, 1.4e-3], [*START, 1.4e-3, 4.2e-3]],
        ),
        ("rte", {4.5e-4: 2}, [START[1:]]),
    ],
)
def test_more_rates_are_tried_while_the_best_is_at_an_edge(
    reproduce: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    best: dict[float, int],
    tried: list[list[float]],
) -> None:
    sweeps: list[list[float]] = []

    def opfa(*words: str) -> None:
        rates = tomllib.loads(words[3])["sweep"]["learning_rate"]
        sweeps.append(rates)
        scores = {**dict.fromkeys(rates, 0), 1.5e-4: 1, **best}
        chosen = max(rates, key=lambda rate: scores[rate])
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/recipe.toml").write_text(words[3])
        (tmp_path / "run/results.json").write_text(json.dumps({"learning_rate": chosen}))
        (tmp_path / "run/finished").touch()

    monkeypatch.setattr(reproduce, "opfa", opfa)
    monkeypatch.setattr(reproduce, "RATES", START)
    monkeypatch.setattr(reproduce, "EDGES", (5e-6, 5e-3))
    monkeypatch.setattr(reproduce, "held_out", lambda _: ())
    chosen = reproduce.learning_rate(task, str(tmp_path / "run"), ())
    assert chosen == max(best or {1.5e-4: 1}, key=lambda rate: best.get(rate, 1))
    assert sweeps == tried
    num_sweeps = len(sweeps)
    assert reproduce.learning_rate(task, str(tmp_path / "run"), ()) == chosen
    assert sweeps[num_sweeps:] == [sweeps[-1]]  # what was tried before counts


def test_one_seed_is_a_seed(
    reproduce: Any, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("data", "recipes", "model"):
        (tmp_path / name).symlink_to(output / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(reproduce.SEEDS, "sst2", 1)
    monkeypatch.setattr(reproduce, "RATES", (3e-4,))
    monkeypatch.setattr(reproduce, "EDGES", (1e-4, 4e-4))
    monkeypatch.setattr(reproduce, "methods", lambda *_: [("dense", 0, reproduce.DENSE)])
    reproduce.fine_tunings("sst2")
    reproduce.write_table(Path())
    rows = json.loads((tmp_path / "results/table.json").read_text())["rows"]
    assert [(row["method"], row["seeds"]) for row in rows] == [
        (method, [42]) for method in ("dense", "dense-fp32", "dense-8bit")
    ]


def test_gradual_pruning_ends_its_ramp_at_the_same_part_of_every_run(output: Path) -> None:
    tenths = {"gradual-rates/learning_rate-0.0003": 6, "gradual-90": 6, "gradual-early-90": 3}
    for run, part in tenths.items():
        directory = output / f"runs/sst2/{run}/seed-42"
        recipe = tomllib.loads((directory / "recipe.toml").read_text())
        steps = json.loads((directory / "done.json").read_text())["step"]
        assert recipe["pruning"]["schedule"]["end"] == steps * part // 10


def test_each_ablation_changes_what_it_says(
    reproduce: Any, table: dict[str, Any], output: Path
) -> None:
    assert [row["name"] for row in table["ablations"]] == list(reproduce.ABLATIONS)
    done = [json.loads((output / r["run"] / "done.json").read_text()) for r in table["ablations"]]
    assert len({facts["model_sha256"] for facts in done}) >= 3  # in so few steps some are the same
    totals = [inspect(output / row["run"] / "model")["total"] for row in table["ablations"]]
    assert all(total["sparsity"] == pytest.approx(0.9, abs=2e-3) for total in totals)


def test_students_and_their_8_bits_are_released_beside_the_other_methods(
    table: dict[str, Any], output: Path
) -> None:
    rows = {(row["method"], row["percent"]): row for row in table["rows"]}
    for percent, share in ((85, "85.06%"), (90, "89.94%")):
        assert check(output / f"releases/minilm-sparse-{percent}").name
        card = (output / f"releases/minilm-sparse-{percent}-sst2/README.md").read_text()
        second = figure(rows["prune-once-8bit", percent]["values"][1], None)
        expected = [f"| sst2/prune-once-8bit-{percent}/seed-43 | {share} | 1 | {second} |"]
        for method in ("dense", "prune-once", "gradual", "one-shot"):
            at, sparsity = (0, "0.00%") if method == "dense" else (percent, share)
            accuracy = figure(rows[method, at]["mean"], rows[method, at]["std"])
            expected.append(f"| sst2/{method}-{at} | {sparsity} | 2 | {accuracy} |")
        lines = card.splitlines()
        assert all(line in lines for line in expected), card


def test_models_are_exported_in_three_forms(table: dict[str, Any], output: Path) -> None:
    rows = {row["method"]: row for row in table["rows"] if row["percent"] == 90}
    forms = {row["form"]: row for row in table["exports"]}
    assert [*forms] == ["fp32", "8bit", "calibrated"]
    for form, precision in (("fp32", "fp32"), ("8bit", "int8"), ("calibrated", "int8")):
        said = json.loads((output / f"exports/sst2/{form}.json").read_text())
        assert forms[form] == {"task": "sst2", "form": form, **said}
        assert said["precision"] == precision
        file = output / f"exports/sst2/onnx-{form}/model.onnx"
        assert file.stat().st_size == said["bytes"]["onnx"]
        if form != "calibrated":
            accuracy = said["parity"]["metrics"]["torch"]["accuracy"]
            assert accuracy == rows[f"prune-once-{form}"]["values"][0]


def test_there_are_pictures(table: dict[str, Any], output: Path) -> None:
    others = ("sparse-90-loss.png", "sparse-85-loss.png", "global-sparsity.png")
    for name in ("accuracy.png", "cost.png", *others):
        assert (output / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_does_not_run_again(reproduce: Any) -> None:
    num_commands = len(reproduce.commands)
    reproduce.main(["sst2"])
    assert len(reproduce.commands) == num_commands


def test_what_was_begun_goes_on(reproduce: Any, output: Path) -> None:
    run = output / "runs/sst2/dense-0"
    before = (run / "results.json").read_text()
    (run / "finished").unlink()
    (run / "results.json").unlink()
    shutil.rmtree(run / "seed-43")
    reproduce.main(["sst2"])
    assert "--resume" in reproduce.commands[-1]
    assert (run / "results.json").read_text() == before


def test_what_another_recipe_made_is_not_taken_for_finished(reproduce: Any, output: Path) -> None:
    file = output / "recipes/minilm-sst2.toml"
    text = file.read_text()
    file.write_text(text.replace("warmup = 0.05", "warmup = 0.5"))
    with pytest.raises(SystemExit, match="was made by another command or recipe"):
        reproduce.main(["sst2"])
    file.write_text(text)


def test_a_part_whose_data_are_missing_is_refused_before_anything_runs(reproduce: Any) -> None:
    num_commands = len(reproduce.commands)
    with pytest.raises(SystemExit, match="data/rte/train.jsonl.gz: is not there, and rte needs it"):
        reproduce.main(["sst2", "rte"])
    assert len(reproduce.commands) == num_commands


def test_what_is_to_be_released_must_be_finished(reproduce: Any, output: Path) -> None:
    finished = output / "runs/sst2/prune-once-8bit-85/seed-43/finished"
    text = finished.read_text()
    reproduce.main(["releases"])  # all there: nothing to do
    finished.unlink()
    with pytest.raises(SystemExit, match="runs/sst2: is not finished, and releases needs it"):
        reproduce.main(["releases"])
    finished.write_text(text)


def test_parts_run_in_their_order(reproduce: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for part in ("students", "fine_tunings", "releases"):
        monkeypatch.setattr(reproduce, part, lambda *_, part=part: ran.append(part))
    reproduce.main(["releases", "sst2", "students"])
    assert ran == ["students", "fine_tunings", "releases"]


@pytest.mark.parametrize("made", ["releases/minilm-sparse-90-sst2", "exports/sst2/calibrated"])
def test_what_an_older_model_became_is_not_kept(reproduce: Any, output: Path, made: str) -> None:
    times = os.stat(output / made)
    os.utime(output / made, (0, 0))
    with pytest.raises(SystemExit, match=f"{made}: is older than runs/sst2/prune-once-"):
        reproduce.main(["releases"])
    os.utime(output / made, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_an_export_that_was_refused_is_tried_again(reproduce: Any, output: Path) -> None:
    file = output / "exports/sst2/onnx-fp32/model.onnx"
    file.unlink()  # its report is left, as that of a file which is not the model would be
    num_commands = len(reproduce.commands)
    reproduce.main(["releases"])
    assert [arguments[0] for arguments in reproduce.commands[num_commands:]] == ["export"]
    assert file.exists()


def test_an_export_that_was_refused_is_not_shown(reproduce: Any, output: Path) -> None:
    report = output / "exports/sst2/8bit.json"
    text = report.read_text()
    report.write_text(json.dumps({**json.loads(text), "problems": ["other answers"]}))
    shown = importlib.import_module("table").export_rows(output)
    assert [row["form"] for row in shown] == ["fp32", "calibrated"]
    report.write_text(text)


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("status", [STOPPED, 0])
def test_a_signal_lets_the_command_save_and_stops_the_program(
    reproduce: Any, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    monkeypatch.setattr(reproduce, "OPFA", [sys.executable, "-c", SAVES])
    start = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        child = start(*arguments, **{**options, "stdout": subprocess.PIPE})
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return child

    monkeypatch.setattr(subprocess, "Popen", started)
    handler = signal.getsignal(number)
    assert reproduce.EXECUTE([str(status)]) == STOPPED
    assert signal.getsignal(number) == handler


def test_a_command_that_fails_ends_with_its_exit_code(
    reproduce: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (output / "runs/sparse-90/finished").unlink()
    monkeypatch.setattr(reproduce, "execute", lambda _: STOPPED)
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["students"])
    assert ended.value.code == STOPPED
    assert not (output / "runs/sparse-90/finished").exists()


def test_another_model_is_refused(tmp_path: Path, output: Path) -> None:
    (tmp_path / "model").mkdir()
    script = str(ROOT / "launch/reproduce.sh")
    ended = subprocess.run(
        ["bash", script, str(output / "model"), str(output / "data"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "give another OUTPUT" in ended.stderr


@pytest.mark.parametrize(
    ("first", "second"), [("teacher", "ablations/"), ("sparse-90", "sst2/prune-once-90")]
)
def test_results_of_a_model_that_was_made_anew_are_not_shown(
    reproduce: Any, output: Path, first: str, second: str
) -> None:
    file = output / f"runs/{first}/done.json"
    text = file.read_text()
    seal.write_sealed(file, {**json.loads(text), "model_sha256": "0" * 64})
    before = (output / "results/table.json").read_bytes()
    (output / "results/table.json").unlink()
    with pytest.raises(
        RunError, match=f"runs/{second}.*: began with another model than runs/{first}"
    ):
        reproduce.write_table(Path())
    assert not (output / "results/table.json").exists()
    (output / "results/table.json").write_bytes(before)
    file.write_text(text)


def test_an_unknown_part_is_named(reproduce: Any) -> None:
    with pytest.raises(SystemExit, match="qqp: no such part; there are students, sst2, rte"):
        reproduce.main(["qqp"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "Usage: bash launch/reproduce.sh MODEL DATA"), (["none", "none", "out"], "none/config")],
)
def test_wrong_arguments_end_before_anything_is_made(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    script = str(ROOT / "launch/reproduce.sh")
    ended = subprocess.run(
        ["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not list(tmp_path.iterdir())
