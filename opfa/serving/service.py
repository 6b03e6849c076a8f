"""One model, its queue and its numbers: from a request to an answer, or to why there is none.

    read the body, bounded -> check it as `opfa predict` checks rows -> queue -> answer

All of this is in the event loop, but for the model, which has a thread of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from opfa.errors import DataError
from opfa.extras import importing
from opfa.inference.predictor import Predictor
from opfa.serving import asking
from opfa.serving.batching import Batcher, FullError, Row
from opfa.serving.limits import Limits
from opfa.serving.metrics import Metrics
from opfa.storage.runs import shortened
from opfa.tasks.predictions import Prediction

with importing("opfa serve", "opfa[serve]"):
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse

JSON = "application/json"
GONE = 499  # nginx's status for a client that left; nobody reads it


class Refusal(BaseModel):
    """The body of everything that is no answer."""

    error: str


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that gets this status and message."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Keep them."""
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})

    def response(self) -> Response:
        """{"error": message}."""
        body = Refusal(error=self.message).model_dump()
        return JSONResponse(body, self.status, headers=self.headers)


class Service:
    """One model, its queue and its numbers."""

    def __init__(self, name: str, predictor: Predictor, limits: Limits) -> None:
        """Nothing runs before the server starts."""
        self.name = str(shortened(name))  # no path of this machine is told
        self.predictor, self.limits = predictor, limits
        self.metrics = Metrics(self.about(), lambda: self.batcher.num_waiting)
        self.batcher = Batcher(
            self._answer,
            batch=limits.batch,
            wait_seconds=limits.wait_ms / 1_000,
            room=limits.queue,
            watch=self.metrics.batch,
        )
        self._running: asyncio.Task[None] | None = None

    def about(self) -> dict[str, str]:
        """Which model this is, for people and for Prometheus."""
        task = self.predictor.task
        return {
            "model": self.name,
            "kind": task.kind,
            "runs_in": self.predictor.runs_in,
            "sequence_tokens": str(task.sequence_tokens),
        }

    def _answer(self, rows: Sequence[Row]) -> list[Prediction]:
        """In the model's thread."""
        found: list[Prediction] = []
        answers = self.predictor.answers
        for chunk, some in answers("inputs", rows, lambda _: None, is_language_checked=False):
            found += some
            self.metrics.cut(chunk.num_misfits)
        return found

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Compute while the server runs."""
        self._running = asyncio.create_task(self.batcher.run())
        yield
        self._running.cancel()
        await asyncio.wait([self._running])

    def is_well(self) -> bool:
        """Whether answers can be given."""
        return self._running is not None and not self._running.done()

    async def predict(self, request: Request) -> Response:
        """The answers of a request, or why there are none; counted either way."""
        start, status = time.perf_counter(), 500
        try:
            asked = await self._read(request)
            answers = await self._answers(asked.rows, request.receive)
            response = Response(asked.answered(answers), media_type=JSON)
            status = 200
        except Refused as error:
            response, status = error.response(), error.status
        finally:
            self.metrics.request(status, time.perf_counter() - start)
        return response

    async def _read(self, request: Request) -> asking.Asking:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:  # what a page of another origin may send unasked is none
            raise Refused(415, f"Content-Type: is {kind!r}, and must be {JSON}")
        if coding := request.headers.get("content-encoding"):
            raise Refused(415, f"Content-Encoding: is {coding!r}; send the body as it is")
        body = await self._body(request)
        try:
            asked = asking.read(self.predictor.task, body)
        except asking.MalformedError as error:
            raise Refused(400, str(error)) from None
        except DataError as error:
            raise Refused(422, str(error)) from None
        if len(asked.rows) > self.limits.queue:
            what = f"has {len(asked.rows):,}, and at most {self.limits.queue:,} can wait"
            raise Refused(413, f"inputs: {what}; send them in several requests")
        return asked

    async def _body(self, request: Request) -> bytes:
        """At most so many bytes in so many seconds, whatever the headers say."""
        most, body = self.limits.body_bytes, bytearray()
        too_large = Refused(413, f"the body is larger than {most:,} bytes")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(GONE, "the client left")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            what = f"the body did not arrive within {self.limits.read_seconds:g} s"
            raise Refused(408, what, {"Connection": "close"}) from None

    async def _answers(
        self, rows: Sequence[Row], receive: Callable[[], Awaitable[Any]]
    ) -> list[Prediction]:
        """Wait for the answers, as long as the client does too."""
        try:
            answers = self.batcher.put(rows)
        except FullError as error:
            after = error.retry_seconds
            what = f"the queue is full; come back in {after} s"
            raise Refused(503, what, {"Retry-After": str(after)}) from None
        left = asyncio.ensure_future(receive())
        seconds = self.limits.answer_seconds
        try:
            both = [answers, left]
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            has_left = left.done()
        finally:
            left.cancel()
            answers.cancel()  # which takes back what isn't answered
        if answers.cancelled():
            what = "the client left" if has_left else f"no answer within {seconds:g} s"
            raise Refused(GONE if has_left else 504, what)
        error = answers.exception()
        if isinstance(error, DataError):  # only the tokenizer saw it
            raise Refused(422, str(error))
        return answers.result()
