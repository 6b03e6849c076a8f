"""Connections that can't be held for ever: uvicorn's HTTP/1.1 with a clock for slow clients.

uvicorn waits without end for the headers of a request, for the rest of a body that was refused, and
for a client that doesn't read its answer. Here each of these has a time. A body that is wanted is
timed by who reads it. On a stop, connections without a request stay for a moment, so that a request
that is on its way is answered too.
"""

import asyncio
from typing import Any

from opfa.extras import importing

with importing("opfa serve", "opfa[serve]"):
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

TOO_SLOW = b'{"error":"the headers did not arrive in time"}'
MOMENT = 0.1  # seconds
CLOSE = (b"connection", b"close")


def timed(read_seconds: float, write_seconds: float) -> type[asyncio.Protocol]:
    """The protocol for a server: seconds for a request to arrive, and for an answer to leave."""
    return type("Timed", (TimedProtocol,), {"reading": read_seconds, "writing": write_seconds})


class TimedProtocol(H11Protocol):
    """A connection with two clocks, for what comes and for what goes."""

    reading: float
    writing: float

    def __init__(self, *arguments: Any, **options: Any) -> None:  # Any: uvicorn's
        """No clock runs."""
        super().__init__(*arguments, **options)
        self._read_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None
        self._is_ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as uvicorn has it
        """The first request must come."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` as soon as something is left
        self._start_reading()

    def data_received(self, data: bytes) -> None:
        """The clock for what comes runs from the first byte of a request to its last."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """The next request may be here already."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """The client doesn't read."""
        super().pause_writing()
        if self._write_clock is None:
            self._write_clock = self.loop.call_later(self.writing, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._write_clock = _stopped(self._write_clock)

    def connection_lost(self, exc: Exception | None) -> None:
        """No clock runs."""
        super().connection_lost(exc)
        self._read_clock = _stopped(self._read_clock)
        self._write_clock = _stopped(self._write_clock)

    def shutdown(self) -> None:
        """Let what is on its way arrive."""
        self._is_ending = True
        if self._is_quiet():
            self.loop.call_later(MOMENT, self._end)
        else:
            self._end_with_answer()

    def _end(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _end_with_answer(self) -> None:
        """As if the client had asked for it, so that it is told."""
        self.cycle.keep_alive = False
        headers: list[Any] = self.cycle.scope["headers"]  # pyright: ignore[reportAssignmentType] - Any: Starlette's copy
        if CLOSE not in headers:
            headers.append(CLOSE)

    def _is_quiet(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _look(self) -> None:
        """Start or stop the clock for what comes, by how much of a request is here."""
        if self._is_ending and not self._is_quiet():
            self._end_with_answer()
        state = self.conn.their_state
        has_begun = state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0])
        if not has_begun:
            self._read_clock = _stopped(self._read_clock)
        elif self._read_clock is None:
            self._start_reading()

    def _start_reading(self) -> None:
        self._read_clock = self.loop.call_later(self.reading, self._too_slow)

    def _too_slow(self) -> None:
        self._read_clock = None
        if self.transport.is_closing():
            return
        if not self._is_quiet():
            return  # the body is wanted, and who reads it has a clock
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            headers = [("content-type", "application/json"), ("connection", "close")]
            length = ("content-length", str(len(TOO_SLOW)))
            events = [
                h11.Response(status_code=408, headers=[*headers, length]),
                h11.Data(data=TOO_SLOW),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
        else:
            self.transport.abort()


def _stopped(clock: asyncio.TimerHandle | None) -> None:
    if clock is not None:
        clock.cancel()
