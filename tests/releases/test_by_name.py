"""A released model by the name that the index gives it: from a clone, or from its address."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import finetune_recipe
from huggingface_hub import constants
from servers import Server, serving

import opfa
from opfa.downstream.finetune import finetune
from opfa.errors import ModelError
from opfa.hub import index
from opfa.hub.download import download
from opfa.hub.place import place_of
from opfa.releases.release import release
from opfa.storage.seal import digest

NAME = "tiny-90"
TEXTS = ["a good film", "a bad film"]


@pytest.fixture(scope="module")
def released(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("by-name")
    finetune(finetune_recipe(sparse, examples), directory / "run")
    release(directory / "run", directory / NAME, form="compact")
    return directory / NAME


@pytest.fixture
def clone(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cards of a clone, with a released model among them that no address has."""
    shutil.copytree(released, tmp_path / "model_cards" / NAME)
    monkeypatch.setattr(index, "INDEX", tmp_path / "model_cards/index.json")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_index(None)
    return tmp_path / "model_cards" / NAME


@pytest.fixture
def server(clone: Path) -> Iterator[Server]:
    """A web server that has the model, where no clone is."""
    content = {f"/m/{path.name}": path.read_bytes() for path in clone.iterdir()}
    with serving(content) as running:
        write_index(f"{running.url}/m")
        shutil.rmtree(clone)
        yield running


def write_index(source: str | None) -> None:
    row = dict.fromkeys(("sparsity", "bytes", "results", "licence"))
    row |= {"name": NAME, "source": source, "task": "t", "base_model": "b"}
    row |= {"manifest_sha256": digest(index.INDEX.parent / NAME / "release.json")}
    index.INDEX.write_text(json.dumps([row]))


def test_in_a_clone_a_name_is_the_directory_of_its_card(clone: Path, tmp_path: Path) -> None:
    assert place_of(NAME) == str(clone)
    assert download(NAME, tmp_path / "out").files > 3
    assert opfa.inspect(NAME)["fingerprint"] == opfa.inspect(tmp_path / "out")["fingerprint"]


def test_elsewhere_it_is_downloaded_once_and_checked(server: Server, released: Path) -> None:
    for _ in range(2):
        assert opfa.inspect(NAME)["fingerprint"] == opfa.inspect(released)["fingerprint"]
    assert len(server.ranges("/m/release.json")) == 1
    assert {path.name for path in Path(place_of(NAME)).iterdir()} == {
        path.name for path in released.iterdir()
    }


def test_a_name_predicts_as_its_directory_does(clone: Path, released: Path) -> None:
    assert opfa.predict(NAME, TEXTS) == opfa.predict(released, TEXTS)


def test_a_name_is_measured_by_its_own_recipe(clone: Path, released: Path, examples: Path) -> None:
    here = {"task.validation": str(examples / "validation.jsonl")}
    found = [opfa.evaluate(model, None, here).metrics for model in (NAME, released)]
    assert found[0] == found[1]


def test_a_name_is_fine_tuned_with_its_zeros(clone: Path, examples: Path, tmp_path: Path) -> None:
    recipe = finetune_recipe(clone, examples)
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": NAME})})
    finetune(named, tmp_path / "run")
    before, after = (opfa.inspect(model) for model in (NAME, tmp_path / "run"))
    assert before["fingerprint"] == after["fingerprint"]


def test_a_directory_of_that_name_goes_first(clone: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert place_of(NAME) == NAME


def test_without_weights_and_address_it_is_said_where_they_are(clone: Path, tmp_path: Path) -> None:
    (clone / "model.opfa.safetensors").unlink()
    message = f"{NAME}: is in a clone of opfa, as model_cards/{NAME}, and has no address yet"
    for use in (lambda: opfa.inspect(NAME), lambda: download(NAME, tmp_path / "out")):
        with pytest.raises(ModelError, match=message):
            use()


def test_another_manifest_than_the_known_one_is_refused(clone: Path, tmp_path: Path) -> None:
    manifest = clone / "release.json"
    manifest.write_text(manifest.read_text().replace(f'"{NAME}"', '"another"'))
    with pytest.raises(ModelError, match="is not the one that opfa knows"):
        download(NAME, tmp_path / "out")
