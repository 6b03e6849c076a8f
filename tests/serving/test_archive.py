"""Archives for SageMaker: what is in them, that nothing else is, and what is refused."""

import copy
import gzip
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import finetune_recipe, outside
from families import CONFIGS
from toys import lines
from transformers import AutoModelForSequenceClassification
from words import WORDS

import opfa
from opfa.api.results import ArchiveResult
from opfa.commands import app as cli
from opfa.errors import ModelError, RunError
from opfa.models.configs import wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.serving import handler
from opfa.serving.archive import write_archive

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")
TEXTS = ["good film", "bad film in rome", "who beat paris ?", "may ."]
FILES = [
    "code/inference.py",
    "code/opfa_handler/__init__.py",
    "code/opfa_handler/answering.py",
    "code/opfa_handler/asking.py",
    "code/opfa_handler/functions.py",
    "code/opfa_handler/model.py",
    "code/requirements.txt",
    "config.json",
    "model.onnx",
    "opfa.json",
    "recipe.toml",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the recipe of its task: 3 layers of 4 heads and 20 neurons."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["bert"])
    config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    made = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = wordpiece_tokenizer(vocabulary, lowercase=True, tokens=32)
    write_model(made, tokenizer, directory / "model")
    words = random.Random(0)
    for name in ("train", "validation"):
        texts = [" ".join(words.choices(WORDS[5:], k=6)) for _ in range(40)]
        rows = [{"text": text, "label": "good" if "good" in text else "bad"} for text in texts]
        (directory / f"{name}.jsonl").write_text(lines(rows))
    recipe = finetune_recipe(directory / "model", directory)
    (directory / "model/recipe.toml").write_text(recipe.to_toml())
    return directory / "model"


def unpacked(archive: Path, directory: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory


def answers(directory: Path, texts: list[str]) -> list[dict]:
    loaded = handler.model_fn(str(directory))
    return handler.predict_fn({"inputs": texts}, loaded)


def close(ours: list[dict], theirs: Path) -> bool:
    expected = opfa.predict(theirs, TEXTS)
    return all(
        a["prediction"] == b.prediction and abs(a["score"] - b.columns()["score"]) < 1e-5
        for a, b in zip(ours, expected, strict=True)
    )


def test_a_pruned_model_s_archive_answers_as_it_does_and_has_the_same_bytes_in_any_process(
    model: Path, tmp_path: Path
) -> None:
    found = opfa.archive(model, tmp_path / "model.tar.gz", keep=0.5)
    assert isinstance(found, ArchiveResult) and found.heads and found.neurons
    with tarfile.open(found.file) as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == found.files == FILES
    assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode, e.type) for e in entries} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert sum(entry.size for entry in entries) == found.unpacked
    assert found.bytes == found.file.stat().st_size < found.unpacked
    pruned = opfa.prune_structured(model, tmp_path / "pruned", keep=0.5)
    assert found.metrics == {"accuracy": (pruned.before["accuracy"], pruned.after["accuracy"])}
    assert found.heads == (sum(k.heads for k in pruned.layers), 12)
    assert found.neurons == (sum(k.neurons for k in pruned.layers), 60)
    assert sum(found.heads + found.neurons) < 2 * (12 + 60)
    assert close(answers(unpacked(found.file, tmp_path / "there"), TEXTS), tmp_path / "pruned")
    command = [sys.executable, "-m", "opfa", "pack", str(model), "--output", "again.tar.gz"]
    settings = outside(PYTHONHASHSEED="1", OMP_NUM_THREADS="1", TZ="Asia/Tokyo")
    done = subprocess.run(
        [*command, "--keep", "0.5", "--json"],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
        umask=0o077,
    )
    assert done.returncode == 0, done.stderr
    same = json.loads(json.dumps({**found.values(), "file": "again.tar.gz"}))
    assert json.loads(done.stdout) == same
    assert (tmp_path / "again.tar.gz").read_bytes() == found.file.read_bytes()
    assert str(tmp_path).encode() not in gzip.decompress(found.file.read_bytes())


def test_a_directory_s_archive_says_nothing_of_when_and_who(tmp_path: Path) -> None:
    for place, when, rights in (("one", 1, 0o600), ("other", 10**9, 0o755)):
        (tmp_path / place / "code").mkdir(parents=True)
        for name in sorted(("b", "a", "code/c", "a.b"), reverse=place == "one"):
            (tmp_path / place / name).write_text(name * 50)
            (tmp_path / place / name).chmod(rights)
            os.utime(tmp_path / place / name, (when, when))
        assert write_archive(tmp_path / place, tmp_path / f"{place}.tar.gz") == [
            "a",
            "a.b",
            "b",
            "code/c",
        ]
    content = (tmp_path / "one.tar.gz").read_bytes()
    assert content == (tmp_path / "other.tar.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0" and not content[3] & 8  # neither a time nor a name


def test_files_beyond_the_limit_are_one_message_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(bytes(2_000_000))
    write_archive(tmp_path / "model", tmp_path / "fits.tar.gz", 0.002)
    message = r"big\.tar\.gz: not written: .* have 0\.002 GB, and most_gb is 0\.0019; keep, shr"
    with pytest.raises(RunError, match=message):
        write_archive(tmp_path / "model", tmp_path / "big.tar.gz", 0.0019)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits.tar.gz", "model"]


def test_what_does_not_belong_together_is_refused_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, archive = tmp_path / "packed", tmp_path / "model.tar.gz"
    recipe = str(model / "recipe.toml")
    for option in ("--keep 0.5", "--keep 0", "--shrink", "--most-gb 0", f"--recipe {recipe}"):
        assert cli.run(["pack", str(model), "--output", str(packed), *option.split()]) == 2
        only = f"{option.split()[0]}: is for an archive, an output that ends in .tar.gz"
        assert only in capsys.readouterr().err
    assert cli.run(["pack", str(model), "seed=1", "--output", str(packed)]) == 2
    assert "[section.key=value]: is for an archive" in capsys.readouterr().err
    with pytest.raises(RunError, match="the name of an archive ends in .tar.gz"):
        opfa.archive(model, packed)
    with pytest.raises(RunError, match="opfa.archive writes an archive"):
        opfa.pack(model, archive)
    with pytest.raises(RunError, match="recipe: is for keep"):
        opfa.archive(model, archive, model / "recipe.toml")
    with pytest.raises(RunError, match="dtype = 'bf16': an archive has a model in ONNX"):
        opfa.archive(model, archive, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(RunError, match="dtype = 'int8': a shrunk model has no 8 bits"):
        opfa.archive(model, archive, dtype="int8", shrink=True)
    with pytest.raises(RunError, match="most_gb = 0: must be above 0"):
        opfa.archive(model, archive, most_gb=0)
    with pytest.raises(ModelError, match="no head and no neuron is dead"):
        opfa.archive(model, archive, shrink=True)
    with pytest.raises(ModelError, match="no quantization.safetensors|has no .*8 bits"):
        opfa.archive(model, archive, dtype="int8")
    archive.touch()
    with pytest.raises(RunError, match="exists already; give a new file"):
        opfa.archive(model, archive)
    assert list(tmp_path.iterdir()) == [archive]
