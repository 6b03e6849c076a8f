"""Requests on their way through one model: what arrives together is computed together.

    put(rows) -> queue -> at most `batch` rows of one or several requests -> model -> each its own

The queue belongs to the event loop and the model to one thread. A batch begins when it is full, or
when its first request has waited long enough; while the model computes, the next one gathers. A
request larger than a batch goes through in parts, and to the end of the queue after each of them.
Where a batch fails, its requests are computed one by one, so only the wrong one fails.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from opfa.data.json_records import Record
from opfa.tasks.predictions import Prediction

Row = tuple[str, Record]  # where it stands in its request ("[0]"), and the row
Answer = Callable[[Sequence[Row]], Sequence[Prediction]]  # one each
LONGEST_RETRY = 60  # seconds that a client is told to wait at most
RECENT = 0.2  # the weight of the last batch in the pace


class FullError(Exception):
    """The queue has no room; a client may come back after so many seconds."""

    def __init__(self, retry_seconds: int) -> None:
        """Keep the seconds."""
        super().__init__(f"full; again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(eq=False)
class _Asked:
    """A request: its rows, how many of them the model has taken, and the answers so far."""

    rows: Sequence[Row]
    done: asyncio.Future[list[Prediction]]
    arrived: float  # of the loop's clock
    num_taken: int = 0
    answers: list[Prediction] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """Rows of one request that are computed in one batch."""

    asked: _Asked
    rows: Sequence[Row]


class Batcher:
    """The queue before a model. `put` and `run` belong to one event loop."""

    def __init__(
        self,
        answer: Answer,
        *,
        batch: int,
        wait_seconds: float,
        room: int,
        watch: Callable[[int, float], object] = lambda *_: None,
    ) -> None:
        """`answer` computes, in a thread of its own; `room` is how many rows may wait; `watch`
        hears of each batch, its rows and seconds.
        """
        self.num_waiting = 0  # rows
        self._answer, self._batch, self._room = answer, batch, room
        self._wait_seconds, self._watch = wait_seconds, watch
        self._queue: deque[_Asked] = deque()
        self._arrival = asyncio.Event()
        self._pace = 0.0  # recent seconds for a row

    def put(self, rows: Sequence[Row]) -> asyncio.Future[list[Prediction]]:
        """The answers to come, one for each row; whoever cancels them takes the request back.

        Raises `FullError` where the queue has no room for all of them.
        """
        if self.num_waiting + len(rows) > self._room:
            seconds = math.ceil(self.num_waiting * self._pace)
            raise FullError(min(max(1, seconds), LONGEST_RETRY))
        loop = asyncio.get_running_loop()
        asked = _Asked(rows, loop.create_future(), loop.time())
        self._queue.append(asked)
        self.num_waiting += len(rows)
        asked.done.add_done_callback(lambda _: self._drop(asked))
        self._arrival.set()
        return asked.done

    def _drop(self, asked: _Asked) -> None:
        """Forget what the model has not taken of a request that is over."""
        if asked in self._queue:
            self._queue.remove(asked)
            self.num_waiting -= len(asked.rows) - asked.num_taken

    async def run(self) -> None:
        """Compute until cancelled."""
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                await self._gather()
                await self._compute(self._take(), thread)

    async def _gather(self) -> None:
        """Return when a batch is full, or its first request has waited."""
        loop = asyncio.get_running_loop()
        while not self._queue:
            self._arrival.clear()
            await self._arrival.wait()
        until = self._queue[0].arrived + self._wait_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while self._queue and self.num_waiting < self._batch and loop.time() < until:
                    self._arrival.clear()
                    await self._arrival.wait()

    def _take(self) -> list[_Part]:
        """The parts of the next batch, the oldest requests first."""
        parts: list[_Part] = []
        room = self._batch
        while self._queue and room:
            asked = self._queue.popleft()
            part = _Part(asked, asked.rows[asked.num_taken : asked.num_taken + room])
            asked.num_taken += len(part.rows)
            self.num_waiting -= len(part.rows)
            room -= len(part.rows)
            parts.append(part)
            if asked.num_taken < len(asked.rows):
                self._queue.append(asked)
        return parts

    async def _compute(self, parts: Sequence[_Part], thread: ThreadPoolExecutor) -> None:
        """Give each part its answers, or its error; nothing is raised."""
        parts = [part for part in parts if not part.asked.done.done()]
        rows = [row for part in parts for row in part.rows]
        if not rows:
            return
        loop = asyncio.get_running_loop()
        start = loop.time()
        computed = loop.run_in_executor(thread, self._answer, rows)
        await asyncio.wait([computed])  # which doesn't raise what it raises
        error = computed.exception()
        if error is None:
            self._tell(len(rows), loop.time() - start)
            _give(parts, computed.result())
        elif len(parts) == 1:
            if not parts[0].asked.done.done():
                parts[0].asked.done.set_exception(error)
        else:
            for part in parts:
                await self._compute([part], thread)

    def _tell(self, num_rows: int, seconds: float) -> None:
        pace = seconds / num_rows
        self._pace = pace if not self._pace else (1 - RECENT) * self._pace + RECENT * pace
        self._watch(num_rows, seconds)


def _give(parts: Sequence[_Part], answers: Sequence[Prediction]) -> None:
    """Hand answers out in the order of the rows."""
    assert len(answers) == sum(len(part.rows) for part in parts), "one for each row"
    start = 0
    for part in parts:
        asked, stop = part.asked, start + len(part.rows)
        asked.answers += answers[start:stop]
        start = stop
        if len(asked.answers) == len(asked.rows) and not asked.done.done():
            asked.done.set_result(asked.answers)
