"""A progress bar at the bottom of a terminal. Lines that are logged meanwhile scroll above it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LONGEST = 24  # letters of a bar's title; the rest of 80 columns is for the bar and the numbers
DISABLED = "TQDM_DISABLE"  # the variable that turns off the bars of other libraries too


class Bar:
    """A bar with a title and a word on what happens, as a context manager.

    Nothing is shown where standard error is no terminal, or `TQDM_DISABLE` is set. While it is
    shown, `sys.stderr` is rich's: what is written there appears above the bar.
    """

    def __init__(
        self, title: str, total: int | None, *, counts: bool = True, is_wanted: bool = True
    ) -> None:
        """A bar of `total` steps (None: not known), whose numbers are shown if it `counts`."""
        console = Console(stderr=True)
        is_on = is_wanted and os.environ.get(DISABLED, "0") in ("", "0")
        self.is_shown = is_on and console.is_terminal
        short = title if len(title) <= LONGEST else f"{title[: LONGEST - 1]}…"
        columns = [_text("{task.description}"), BarColumn(bar_width=None)]
        columns += [MofNCompleteColumn()] if counts else []
        columns += [TimeRemainingColumn(compact=True), _text("{task.fields[state]}")]
        self._bar = Progress(*columns, console=console, expand=True, disable=not self.is_shown)
        self._task = self._bar.add_task(short, total=total, state="")
        self._state = ""

    def __enter__(self) -> Self:
        """Show it."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it as it is."""
        self._bar.stop()

    def move_to(self, step: int) -> None:
        """So many steps are done."""
        self._bar.update(self._task, completed=step)

    def advance(self, num: float) -> None:
        """So many more steps are done."""
        self._bar.advance(self._task, num)

    def say(self, state: str) -> None:
        """Show a few words behind the bar."""
        self._state = state
        self._bar.update(self._task, state=state)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what happens in this block, in the place of what is said otherwise."""
        self._bar.update(self._task, state=what, refresh=True)
        yield
        self._bar.update(self._task, state=self._state)


def _text(format: str) -> TextColumn:
    return TextColumn(format, table_column=Column(no_wrap=True))
