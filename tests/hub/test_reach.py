"""A Hub that doesn't answer is waited for once, and said once."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import NAME, serving

import opfa.hub.cache as cache
from opfa.errors import DataError, ModelError, RunError
from opfa.hub import reach
from opfa.hub.download import download
from opfa.hub.tensors import RemoteFiles
from opfa.tasks.examples import read
from opfa.tasks.kinds import KINDS
from opfa.tasks.recipe import Task


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes every connection and says nothing."""
    monkeypatch.setattr(reach, "SECONDS", 0.3)
    monkeypatch.setattr(reach, "_found", {})
    reach.tell_of_cache.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield address


def test_it_is_waited_for_once_by_all_that_ask(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = [], reach._ask
    monkeypatch.setattr(reach, "_ask", lambda where: asked.append(where) or ask(where))
    message = f"{silent} is out of reach: "
    for pattern in ("*.json", "*.safetensors"):  # a configuration or tokenizer, and weights
        with pytest.raises(ModelError, match=f"^a/b: no such directory, and not .*{message}"):
            cache.downloaded("a/b", [pattern])
    with pytest.raises(ModelError, match=message):
        RemoteFiles("a/b")
    with pytest.raises(RunError, match=f"^a/b: not available from the Hub: {message}"):
        download("a/b", tmp_path / "output")
    with pytest.raises(DataError, match=rf"^a/b \[train\]: can't be read: {message}"):
        read(Task(hub="a/b"), "train", KINDS["classification"].check)
    assert asked == [silent]
    assert not (tmp_path / "output").exists()


def test_what_is_in_the_cache_is_used_and_said_once(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with monkeypatch.context() as patch, serving(tmp_path / "model", tmp_path / "cache", patch):
        found = cache.downloaded(NAME, ["*.json"])
    for _ in range(2):
        assert cache.downloaded(NAME, ["*.json"]) == found
    assert [record.getMessage() for record in caplog.records] == [
        f"{silent} is out of reach: no answer in 0.3 s; what is used comes from the cache"
    ]


def test_a_hub_that_is_reached_again_is_asked_again(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reach.problem_of_hub()
    monkeypatch.setattr(reach, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(reach, "_ask", lambda where: "")
    assert not reach.problem_of_hub() and not reach.problem_of_hub()
