"""Resume points and finished models on disk."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import TINY_BERT
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertTokenizer

from opfa.compression.pattern import Pattern
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.errors import ModelError, RunError
from opfa.sparsity.layers import fuse
from opfa.training import checkpoint


def sparse_model() -> BertForPreTraining:
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=8, **{**TINY_BERT, "model_type": "bert"}))
    Pruner(model, Gradual(end=0, target=0.75), Pattern()).after_step(0)
    return model


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    checkpoint.write_finished(sparse_model(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def write(directory: Path, text: str) -> None:
    (directory / "state.bin").write_text(text)


def test_the_newest_complete_point_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save_point(tmp_path, step, lambda d, s=step: write(d, str(s)), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    newest = checkpoint.newest_point(tmp_path)
    assert newest is not None and (newest / "state.bin").read_text() == "3"
    assert checkpoint.facts_of(newest)["step"] == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "bad manifest"])
def test_a_damaged_point_is_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoint.save_point(tmp_path, step, lambda d: write(d, "state"), {}, keep=2)
    state = tmp_path / "step-00000002/state.bin"
    manifest = tmp_path / "step-00000002/MANIFEST.json"
    {
        "flip": lambda: state.write_text("statf"),
        "truncate": lambda: state.write_text("stat"),
        "remove": state.unlink,
        "no manifest": manifest.unlink,
        "bad manifest": lambda: manifest.write_text("{"),
    }[damage]()
    assert checkpoint.newest_point(tmp_path) == tmp_path / "step-00000001"


def test_damaged_newer_points_take_no_place(tmp_path: Path) -> None:
    for step in (3, 6):
        checkpoint.save_point(tmp_path, step, lambda d: write(d, "state"), {}, keep=2)
    (tmp_path / "step-00000006/state.bin").write_text("statf")
    checkpoint.save_point(tmp_path, 4, lambda d: write(d, "state"), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_point_without_a_manifest_takes_no_place(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save_point(tmp_path, step, lambda d: write(d, "state"), {}, keep=3)
    (tmp_path / "step-00000002/MANIFEST.json").unlink()  # a removal that was killed
    checkpoint.save_point(tmp_path, 4, lambda d: write(d, "state"), {}, keep=3)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["1", "3", "4"]


def test_what_a_killed_save_left_is_not_in_the_next_point(tmp_path: Path) -> None:
    (tmp_path / ".incomplete").mkdir()
    (tmp_path / ".incomplete/state-00009").write_text("old")
    checkpoint.save_point(tmp_path, 1, lambda d: write(d, "state"), {}, keep=1)
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert names == {"state.bin", "MANIFEST.json"}


def test_any_damage_is_found(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        save_file({"w": torch.arange(300.0)}, directory / "state-00000.safetensors")
        (directory / "masks.safetensors").write_bytes(bytes(range(256)))

    for step in (1, 2):
        checkpoint.save_point(tmp_path, step, fill, {"world_size": 1}, keep=2)
    point, chance = tmp_path / "step-00000002", random.Random(0)
    for path in sorted(point.iterdir()):
        whole = path.read_bytes()
        for case in range(40):
            if case % 2:
                path.write_bytes(whole[: chance.randrange(len(whole))])
            else:
                place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
                flipped = bytes([whole[place] ^ bit])
                path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            assert checkpoint.newest_point(tmp_path) == tmp_path / "step-00000001"
        path.write_bytes(whole)
    assert checkpoint.newest_point(tmp_path) == point


def test_points_that_are_all_damaged_are_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    assert checkpoint.newest_point(tmp_path) is None
    checkpoint.save_point(tmp_path, 1, lambda d: write(d, "state"), {}, keep=2)
    (tmp_path / "step-00000001/state.bin").write_text("statf")
    with pytest.raises(RunError, match="every resume point here is damaged"):
        checkpoint.newest_point(tmp_path)


def test_a_save_that_fails_leaves_the_earlier_point(tmp_path: Path) -> None:
    checkpoint.save_point(tmp_path, 1, lambda d: write(d, "state"), {}, keep=1)

    def fail(directory: Path) -> None:
        write(directory, "half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        checkpoint.save_point(tmp_path, 2, fail, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_finished_model_is_verified_from_its_files(finished: Path) -> None:
    report = json.loads((finished / "sparsity.json").read_text())
    checkpoint.verify(finished, report)
    tensors = load_file(finished / "model.safetensors")
    weight = tensors["bert.encoder.layer.0.output.dense.weight"].view(-1)
    zero, live = (weight == 0).nonzero()[0], weight.nonzero()[0]
    weight[zero] = 1.0
    save_file(tensors, finished / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer.0.output.dense.weight has .*'zeros': 383"):
        checkpoint.verify(finished, report)
    weight[live] = 0.0  # as many zeros as before, but elsewhere
    save_file(tensors, finished / "model.safetensors")
    with pytest.raises(ModelError, match="not where its sparsity.json says"):
        checkpoint.verify(finished, report)


def test_a_masked_weight_that_fuse_leaves_is_found_and_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sparse_model(), BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1})
    name, mask = next(iter(checkpoint.masks_of(model).items()))

    def fuse_all_but_one(model: BertForPreTraining) -> dict:
        report = fuse(model)
        with torch.no_grad():
            model.get_parameter(name)[tuple((~mask).nonzero()[0])] = 1e-30
        return report

    monkeypatch.setattr(checkpoint, "fuse", fuse_all_but_one)
    with pytest.raises(ModelError, match=rf"{name} has .*'zeros': 191.*, not .*'zeros': 192"):
        checkpoint.write_finished(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_value_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = sparse_model()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0, 0] = torch.nan
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1})
    with pytest.raises(ModelError, match="word_embeddings.weight: holds a non-finite value"):
        checkpoint.write_finished(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_randomness_depends_on_seed_step_and_rank_alone() -> None:
    drawn = []
    for place in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)):
        checkpoint.seed_step(*place)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[4] and len(set(drawn)) == 4
