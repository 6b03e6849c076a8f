"""Tiny corpora, models and recipes. Nothing here needs a network, a GPU or data from outside."""

import gc
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure
from torch import Tensor
from transformers import BertTokenizer
from transformers.monkey_patching import clear_patch_mapping
from words import WORDS

from opfa.downstream.recipe import FinetuneRecipe
from opfa.recipe import Recipe
from opfa.storage.seal import FILES
from opfa.training.loop import Concern, Progress
from opfa.upstream.batches import Batch
from opfa.upstream.corpus import prepare
from opfa.upstream.recipe import PretrainRecipe

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SUBJECTS = ["the cat", "a dog", "the old man", "my sister", "the captain", "no child", "a bird"]
VERBS = ["sees", "wants", "hears", "follows", "loves", "hates", "finds"]
OBJECTS = ["the sea", "a house", "the moon", "some bread", "the road", "her letter", "a song"]
TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
frozen = {"modules": 0}

settings.register_profile("many")  # random models where there are a few by default


@pytest.fixture(autouse=True, scope="session")  # before any other, a module's among them
def _one_thread() -> None:
    """A child that is forked would wait for ever for the threads of its parent."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def nothing_stays_registered() -> Iterator[None]:
    """Where an uneven model was read: while its classes are known, any load takes 0.4 s."""
    yield
    clear_patch_mapping()


@pytest.fixture(autouse=True)
def _modules_are_no_garbage() -> None:
    """DeepSpeed collects garbage many times a run; with torch's modules in it that takes 0.4 s."""
    if len(sys.modules) > frozen["modules"] + 100:
        gc.collect()
        gc.freeze()
        frozen["modules"] = len(sys.modules)


DRAW = Figure.savefig


def draw(figure: Figure, file: Path, **options: Any) -> None:
    """Draw a picture; those in a run's report are left empty, they take longer than tiny runs."""
    if {"report", ".report.incomplete"} & set(file.parts):
        file.touch()
    else:
        DRAW(figure, file, **options)


@pytest.fixture(scope="session", autouse=True)
def _reports_are_empty() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the pictures of a report."""
    monkeypatch.setattr(Figure, "savefig", DRAW)


def outside(**settings: str) -> dict[str, str]:
    """The environment for a program of its own: without the process group of this one."""
    group = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {**{k: v for k, v in os.environ.items() if k not in group}, **settings}


def sentences() -> Iterator[str]:
    """All sentences of a tiny language, in an order that looks random."""
    size = len(SUBJECTS) * len(VERBS) * len(OBJECTS)
    for i in range(size):
        j = i * 101 % size
        subject, rest = divmod(j, len(VERBS) * len(OBJECTS))
        verb, thing = divmod(rest, len(OBJECTS))
        yield f"{SUBJECTS[subject]} {VERBS[verb]} {OBJECTS[thing]}."


def write_records(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write a compressed file of JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def pretrain_values(data: Path, **sections: Any) -> dict[str, Any]:
    """The values of a tiny upstream recipe; sections are merged in."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": str(data),
        "corpus": {
            "documents": [str(data.parent / "documents.jsonl")],
            "sequence_tokens": 24,
            "validation": 0.1,
            "train_tokenizer": {"vocabulary": 120},
        },
        "model": {"config": TINY_BERT},
        "training": {
            "steps": 8,
            "batch": 8,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "precision": "fp32",
        },
        "logging": {"every_steps": 1, "checkpoint_steps": 3},
    }
    for name, section in sections.items():
        is_section = isinstance(section, dict) and name not in ("model", "pruning", "distillation")
        values[name] = {**values.get(name, {}), **section} if is_section else section
    return values


def pretrain_recipe(data: Path, **sections: Any) -> PretrainRecipe:
    """A tiny upstream recipe."""
    return PretrainRecipe.check(pretrain_values(data, **sections))


def dense_labels(batch: Batch) -> Tensor:
    """MLM labels [B, T] as plain transformers takes them: -100 where nothing is predicted."""
    labels = torch.full(batch.inputs["input_ids"].shape, -100)
    labels.view(-1)[batch.predicted] = batch.labels
    return labels


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 24 documents."""
    directory = tmp_path_factory.mktemp("corpus")
    lines = list(sentences())
    documents = [" ".join(lines[i : i + 14]) for i in range(0, len(lines) - 13, 14)]
    text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (directory / "documents.jsonl").write_text(text)
    prepare(pretrain_recipe(directory / "prepared").corpus, directory / "prepared")
    return directory / "prepared"


@pytest.fixture(scope="session")
def sparse(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sparse model: 90 % of the encoder's weights are zero."""
    from opfa.upstream.pretrain import pretrain

    output = tmp_path_factory.mktemp("sparse") / "run"
    schedule = {"end": 2, "target": 0.9}
    recipe = pretrain_recipe(
        prepared, pruning={"schedule": schedule}, training={"steps": 4}, logging={"every_steps": 4}
    )
    pretrain(recipe, output)
    return output / "model"


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl and validation.jsonl: who is the sentence about?"""
    directory = tmp_path_factory.mktemp("examples")
    rows = [
        {"text": s, "label": "cat" if s.startswith("the cat") else "other"} for s in sentences()
    ]
    rows = [r for r in rows if r["label"] == "cat"] + [r for r in rows if r["label"] != "cat"][:60]
    rows = [rows[i * 37 % len(rows)] for i in range(len(rows))]
    for name, part in (("train", rows[:80]), ("validation", rows[80:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return directory


def as_older(run: Path) -> None:
    """Make a run's files what a version wrote that listed and sealed none."""
    for path in (run / "done.json", run / "environment.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("sealed", FILES)}))


def finetune_recipe(init: Path, examples: Path, **sections: Any) -> FinetuneRecipe:
    """A tiny fine-tuning recipe."""
    values: dict[str, Any] = {
        "name": "tiny-task",
        "model": {"init": str(init)},
        "task": {
            "train": str(examples / "train.jsonl"),
            "validation": str(examples / "validation.jsonl"),
            "text": "text",
            "sequence_tokens": 24,
        },
        "training": {"epochs": 1.0, "batch": 8, "learning_rate": 1e-3},
        "logging": {"every_steps": 1, "checkpoint_steps": 4},
    }
    for name, section in sections.items():
        is_section = isinstance(section, dict)
        values[name] = {**values.get(name, {}), **section} if is_section else section
    return FinetuneRecipe.check(values)


class AfterStep(Concern):
    """Does something once, after this step and before it is logged and saved."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self.step, self.do = step, do

    def after_step(self, at: Progress) -> None:
        if at.step == self.step:
            self.do()


def break_off(last: int, train: Callable[..., object], recipe: Recipe, output: Path) -> None:
    """Begin a run and break off after a step."""

    class StoppedError(Exception):
        pass

    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        train(recipe, output, concerns=[AfterStep(last, stop)])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where this machine lets us make one."""
    yield from mounted(tmp_path / "disk", "size=2m")


def mounted(disk: Path, options: str) -> Iterator[Path]:
    """Mount an empty file system in memory for the length of a test, or skip it."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    """The tokenizer of `words`."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium (apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
