"""The release manifest: what it may list, and that it finds every difference."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from opfa.errors import ModelError
from opfa.hub import manifest

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"{ }"}
DIGEST = "0" * 64


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def text(**changes: Any) -> str:
    values = {
        "format": "opfa-release/1",
        "name": "tiny",
        "files": {"config.json": {"size": 2, "sha256": DIGEST}},
    }
    return json.dumps({**values, **changes})


def named(*names: str) -> str:
    return text(files={name: {"size": 2, "sha256": DIGEST} for name in names})


def test_what_is_written_holds_size_and_digest_of_every_file(directory: Path) -> None:
    written = manifest.write(directory, "tiny", {"task": "sst2", "results": {"accuracy": 0.9}})
    assert written == manifest.check(directory) == manifest.read(directory)
    read = json.loads((directory / "release.json").read_text())
    assert read["format"] == "opfa-release/1"
    assert read["facts"] == {"task": "sst2", "results": {"accuracy": 0.9}}
    assert read["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    }


def test_writing_it_again_does_not_list_itself(directory: Path) -> None:
    first = manifest.write(directory, "tiny", {})
    assert manifest.write(directory, "tiny", {}) == first


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", ".hidden.json", "a b.json"])
def test_a_directory_with_a_file_that_would_not_be_read_is_not_written(
    directory: Path, name: str
) -> None:
    (directory / name).write_bytes(b"x")
    with pytest.raises(ModelError, match="can't be released") as error:
        manifest.write(directory, "tiny", {})
    assert name in str(error.value)
    assert not (directory / "release.json").exists()


def test_a_link_is_not_released(directory: Path) -> None:
    (directory / "more.json").symlink_to(directory / "config.json")
    with pytest.raises(ModelError, match=r"more.json: not a plain file"):
        manifest.write(directory, "tiny", {})


@pytest.mark.parametrize("name", ["", "a name", "../up", "x" * 201])
def test_a_release_has_a_plain_name(directory: Path, name: str) -> None:
    with pytest.raises(ModelError, match="name"):
        manifest.write(directory, name, {})


def test_a_changed_a_missing_and_an_extra_file_are_named(directory: Path) -> None:
    manifest.write(directory, "tiny", {})
    (directory / "model.safetensors").write_bytes(b"Weights")
    (directory / "config.json").unlink()
    (directory / "new.json").write_bytes(b"{}")
    with pytest.raises(ModelError) as error:
        manifest.check(directory)
    assert "model.safetensors has another SHA-256" in str(error.value)
    assert "config.json is missing" in str(error.value)
    assert "new.json is not in release.json" in str(error.value)


def test_a_file_of_another_size_is_told_without_its_digest(directory: Path) -> None:
    manifest.write(directory, "tiny", {})
    (directory / "model.safetensors").write_bytes(b"weights!")
    with pytest.raises(ModelError, match=r"model.safetensors has 8 bytes, not 7"):
        manifest.check(directory)


def test_what_tools_leave_in_a_directory_is_no_part_of_a_release(directory: Path) -> None:
    manifest.write(directory, "tiny", {})
    (directory / ".git").mkdir()
    (directory / ".git/HEAD").write_text("ref")
    (directory / ".gitattributes").write_text("x")
    manifest.check(directory)


def test_a_directory_without_a_manifest_is_no_release(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"has no release.json"):
        manifest.check(directory)


@pytest.mark.parametrize(
    "name",
    ["config.json", "a/b/c.safetensors", "LICENSE", "img/figure-1.png", "x.jinja", "a..json"],
)
def test_a_plain_name_is_taken(name: str) -> None:
    assert list(manifest.parse(named(name)).files) == [name]


@pytest.mark.parametrize(
    "names",
    [
        ["../config.json"], ["a/../b.json"], ["/etc/x.json"], ["a//b.json"], ["./a.json"], [""],
        ["a\\b.json"], ["c:x.json"], [".json"], ["a/.b.json"], ["x.json\n"], ["x.json\0"],
        ["ä.json"], ["a.py"], ["pytorch_model.bin"], ["model.pkl"], ["noending"], ["license"],
        ["release.json"], ["Release.JSON"], ["x.JSON"], ["a" * 260 + ".json"], ["~/x.json"],
        ["a.json", "A.json"], ["x.json", "x.json/y.json"], ["d/x.json", "D/X.json"],
    ],
)  # fmt: skip
def test_another_name_is_refused(names: list[str]) -> None:
    with pytest.raises(ModelError, match=r"release.json: not a release manifest: files"):
        manifest.parse(named(*names))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON: recursion limit"),
        ("[]", "should be an object"),
        (text(format="opfa-release/2"), "format: Input should be 'opfa-release/1'"),
        (text(files={}), "files: Dictionary should have at least 1 item"),
        (text(version=3), "version: Extra inputs are not permitted"),
        (text(files={"a.json": {"size": -1, "sha256": DIGEST}}), "greater than or equal to 0"),
        (text(files={"a.json": {"size": "2", "sha256": DIGEST}}), "should be a valid integer"),
        (text(files={"a.json": {"size": 2.5, "sha256": DIGEST}}), "should be a valid integer"),
        (text(files={"a.json": {"size": 1 << 60, "sha256": DIGEST}}), "less than or equal to"),
        (text(files={"a.json": {"size": 2, "sha256": "abc"}}), "sha256: String should match"),
        (text(files={"a.json": {"size": 2, "sha256": "A" * 64}}), "sha256: String should match"),
        (text(files={"a.json": {"size": 2}}), "sha256: Field required"),
        (named(*(f"{i}.json" for i in range(1001))), "at most 1000 items"),
        (" " * ((1 << 20) + 1), "more than 1,048,576 bytes"),
    ],
)
def test_another_content_is_refused(bad: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        manifest.parse(bad)
    assert message in str(error.value)


def test_a_message_about_a_hostile_manifest_is_short() -> None:
    with pytest.raises(ModelError) as error:
        manifest.parse(text(files={f"../{i}": {"size": "x" * 900} for i in range(900)}))
    assert len(str(error.value)) < 1000
    assert "more" in str(error.value)
