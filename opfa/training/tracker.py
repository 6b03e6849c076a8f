"""Sends a run's rows to wandb too. wandb may fail: the run then goes on without it."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from opfa.errors import RunError, first_line, opening, redacted
from opfa.extras import importing
from opfa.storage.files import write_text, writing

HEX = re.compile(r"[0-9a-f]{32}")
log = logging.getLogger(__name__)


class Tracker:
    """One run of wandb a run directory, in a group of the recipe's name."""

    def __init__(
        self,
        directory: Path,
        mode: Literal["offline", "online"],
        *,
        project: str,
        group: str,
        config: dict[str, Any],
    ) -> None:
        """Start it, or go on with the directory's. Raises `RunError` if wandb can't."""
        with importing(f"logging.wandb = {mode!r}", "opfa[wandb]"):
            import wandb  # only here: it is slow to import, and most runs don't use it

        self._broken = False
        name = _run_id(directory / "wandb/id")
        try:
            with writing(directory / "wandb"):
                self._run = wandb.init(
                    project=redacted(project),
                    group=redacted(group),
                    name=str(directory),
                    id=name,
                    resume="allow",
                    mode=mode,
                    dir=str(directory),
                    config=redacted(config),
                    settings=wandb.Settings(silent=True, console="off"),
                )
        except RunError:
            raise
        except Exception as error:  # those of its service have no class in common
            raise RunError(f"logging.wandb = {mode!r}: {first_line(error)}") from error

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Send the numbers of one step."""
        self._try(lambda: self._run.log(dict(numbers), step=step))

    def finish(self, exit_code: int) -> None:
        """Wait until everything is sent."""
        self._try(lambda: self._run.finish(exit_code=exit_code))

    def _try(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - they have no class in common, and no run ends for one
            self._broken = True
            log.warning("wandb: %s; the run goes on without it", first_line(error))


def _run_id(path: Path) -> str:
    """A directory's own name for wandb: 32 digits, and 8 more that check them."""
    if not path.exists():
        new = uuid4().hex
        write_text(path, f"{new}{_check_digits(new)}")
    with opening(path, RunError):
        text = path.read_text(encoding="utf-8")
    name, check = text[:32], text[32:]
    if not HEX.fullmatch(name) or check not in ("", _check_digits(name)):
        raise RunError(f"{path}: is damaged; without it, rows go to a new run of wandb")
    return text


def _check_digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
