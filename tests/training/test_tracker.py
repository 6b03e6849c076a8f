"""wandb may refuse, or die in the middle: the first is one error, the second one warning."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.errors import UsageError
from wandb.sdk.mailbox.mailbox import MailboxClosedError

from opfa.errors import RunError, first_line
from opfa.training import tracker
from opfa.training.tracker import Tracker


def started(directory: Path) -> Tracker:
    return Tracker(directory, "online", project="p", group="g", config={})


@pytest.mark.parametrize(
    "error",
    [UsageError("No API key configured."), MailboxClosedError(), ConnectionResetError("lost")],
)
def test_a_refusal_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(RunError, match=rf"logging.wandb = 'online': {first_line(error)}"):
        started(tmp_path)


def test_a_service_that_dies_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[int] = []

    def log(numbers: dict[str, Any], step: int) -> None:
        sent.append(step)
        if step == 2:
            raise MailboxClosedError("it is gone")

    monkeypatch.setattr("wandb.init", lambda **_: SimpleNamespace(log=log))
    with caplog.at_level(logging.WARNING):
        run = started(tmp_path)
        for step in (1, 2, 3):
            run.log({"loss": 1.0}, step)
        run.finish(0)
    assert sent == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb: it is gone; the run goes on without it"
    ]


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: f"0{text[1:]}0"])
def test_a_damaged_id_is_named(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "wandb/id"
    first = tracker._run_id(path)
    assert tracker._run_id(path) == first
    path.write_text(first[:32])  # an older version's
    assert tracker._run_id(path) == first[:32]
    path.write_text(damage(first))
    with pytest.raises(RunError, match="wandb/id: is damaged"):
        tracker._run_id(path)
