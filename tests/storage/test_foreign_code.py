"""No code of a model directory or data set runs, whatever is answered to a question: none is asked.

Each command is run with `y` on standard input, as often as it wants. A marker file shows whether
any code ran.
"""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finetune_recipe, outside, pretrain_recipe
from safetensors.torch import load_file
from test_foreign import tiny

from opfa.commands import app as cli
from opfa.errors import ModelError
from opfa.models.configs import load_config, load_tokenizer
from opfa.models.encoders import load_finetuned_model
from opfa.storage.files import write_text

CODE = """from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
class Config(BertConfig):
    model_type = "evil"
Model, Tokenizer = BertForSequenceClassification, BertTokenizer
"""
MAP = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForSequenceClassification": "evil.Model",
    "AutoModelForMaskedLM": "evil.Model",
    "AutoModelForPreTraining": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}
TOKENIZER_MAP = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


@pytest.fixture
def evil(whole: Path, tmp_path: Path, marker: Path) -> Path:
    """A model that needs code of its own."""
    directory = Path(shutil.copytree(whole, tmp_path / "evil"))
    changed(directory / "config.json", model_type="evil", auto_map=MAP)
    changed(
        directory / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=TOKENIZER_MAP
    )
    for name in ("evil.py", "model.py", "setup.py", "__init__.py"):
        (directory / name).write_text(CODE.format(marker=str(marker)))
    (directory / "custom_generate").mkdir()
    shutil.copy(directory / "evil.py", directory / "custom_generate/generate.py")
    return directory


@pytest.fixture(autouse=True)
def _always_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))


COMMANDS = {
    "finetune": "finetune {task} --output {out} model.init={evil}",
    "finetune, its tokenizer": "finetune {task} --output {out} model.tokenizer={evil}",
    "finetune, its teacher": "finetune {task} --output {out} distillation.teacher={evil}",
    "finetune, its data": "finetune {task} --output {out} task.hub={evil}",
    "pretrain": "pretrain {upstream} --output {out} model.init={evil} pruning.schedule.end=2"
    " pruning.schedule.target=0.5",
    "pretrain, its teacher": "pretrain {upstream} --output {out} distillation.teacher={evil}",
    "prepare": "prepare {hub} --output {out} corpus.tokenizer={evil}",
    "prepare, its documents": "prepare {upstream} --output {out} corpus.documents= "
    "corpus.hub={evil}",
    "evaluate": "evaluate {evil} --recipe {task}",
    "calibrate": "calibrate {evil} --recipe {task} --output {out}",
    "export": "export {evil} --output {out}",
    "release": "release {run} --output {out}",
    "unpack": "unpack {evil} --output {out}",
    "download": "download {evil} --output {out}",
    "plan": "plan {upstream} --gpus 1 --memory-gb 1 --bandwidth-gbps 1 model.init={evil}",
    "bench train": "bench train {upstream} model.init={evil}",
    "push": "push {evil} someone/name",
    "pack": "pack {evil} --output {out}",
    "shrink": "shrink {evil} --output {out}",
    "trim": "trim {evil} --text {task} --output {out}",
    "inspect --runtime": "inspect {evil} --runtime",
    "predict": "predict {evil} {task}",
    "prune": "prune {evil} --sparsity 0.5 --output {out}",
    "bench inference": "bench inference {evil}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_of_a_model(
    command: str,
    evil: Path,
    whole: Path,
    prepared: Path,
    examples: Path,
    tmp_path: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = pretrain_recipe(prepared)
    corpus = {"train_tokenizer": None, "tokenizer": str(evil)}
    write_text(tmp_path / "upstream.toml", recipe.to_toml())
    write_text(tmp_path / "task.toml", finetune_recipe(whole, examples).to_toml())
    write_text(tmp_path / "hub.toml", pretrain_recipe(prepared, corpus=corpus).to_toml())
    (tmp_path / "run").mkdir()
    shutil.copytree(evil, tmp_path / "run/model")
    files = {"out": tmp_path / "out", "evil": evil, "run": tmp_path / "run"}
    files |= {each: tmp_path / f"{each}.toml" for each in ("upstream", "task", "hub")}
    status = cli.run([word.format(**files) for word in COMMANDS[command].split()])
    message = capsys.readouterr().err
    assert not marker.exists()
    assert (status, "[y/N]" in message, "Traceback" in message) == (2, False, False), message
    assert not (tmp_path / "out").exists()


def test_inspect_reads_tensors_alone(evil: Path, marker: Path) -> None:
    assert cli.run(["inspect", str(evil)]) == 0
    assert not marker.exists()


def test_a_known_type_is_loaded_with_its_own_class(
    whole: Path, tmp_path: Path, evil: Path, marker: Path
) -> None:
    """Many older models of the Hub come with code that transformers has long had itself."""
    values = json.loads((whole / "config.json").read_text())
    changed(evil / "config.json", model_type=values["model_type"])
    assert type(load_finetuned_model(str(evil))).__module__.startswith("transformers.")
    assert type(load_tokenizer(str(evil))).__module__.startswith("transformers.")
    assert not marker.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": MAP},
        {"model_type": None, "auto_map": MAP},
        {"model_type": ["bert"], "auto_map": MAP},
        {"auto_map": None},
        {"auto_map": {"AutoModel": "elsewhere/repository--evil.Model"}},
        {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
        {"attn_implementation": "someone/kernel", "model_type": "bert"},
    ],
)
def test_code_is_refused_by_name(evil: Path, values: dict[str, Any]) -> None:
    config = json.loads((evil / "config.json").read_text())
    del config["auto_map"]
    (evil / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ModelError, match="remote code is never run"):
        load_config(str(evil))


@pytest.mark.parametrize("file", ["generation_config.json", "processor_config.json"])
def test_another_configuration_that_names_code_is_refused(evil: Path, file: str) -> None:
    (evil / file).write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Processor"}}))
    config = json.loads((evil / "config.json").read_text())
    del config["auto_map"]
    (evil / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{file} asks for code of its own"):
        load_config(str(evil))


class Bomb:
    """A pickle that writes the marker when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("command", ["inspect {}", "export {} --output out.onnx"])
def test_a_pickle_that_executes_does_not(
    whole: Path,
    tmp_path: Path,
    marker: Path,
    is_zip: bool,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "pickled"))
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(
            {**state, "bomb": Bomb(marker)}, directory / name, _use_new_zipfile_serialization=is_zip
        )
    assert cli.run(command.format(directory).split()) == 2
    assert not marker.exists()
    assert "weights_only" not in capsys.readouterr().err


def test_on_a_terminal_no_question_is_asked(
    evil: Path, whole: Path, examples: Path, tmp_path: Path, marker: Path
) -> None:
    """As a user would sit there, with a terminal for all three streams and `yes |` before it."""
    write_text(tmp_path / "task.toml", finetune_recipe(whole, examples).to_toml())
    ours, theirs = pty.openpty()
    words = ["finetune", str(tmp_path / "task.toml"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "opfa", *words, f"model.init={evil}"],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=outside(),
    )
    os.write(ours, b"y\n" * 50)
    _, errors = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 2
    assert b"remote code is never run" in errors and b"[y/N]" not in errors
    assert not marker.exists()
