"""Roads on which a request reaches a model, for `opfa bench serve`.

A road opens a model once, as a door; each client goes through the door with a line of its own, so
that what clients do at once is as it would be. A road of another kind is one more class.
"""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from opfa.errors import RunError

HOST = "127.0.0.1"
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 300, 60, 60
LOOK_SECONDS = 0.1
JSON = {"Content-Type": "application/json"}
Columns = dict[str, Any]  # Any: JSON schemas, by column
Ask = Callable[[bytes], None]  # answers one body; raises `RunError` where it can't


class Door(Protocol):
    """A model that is ready."""

    columns: Columns

    def line(self) -> AbstractContextManager[Ask]:
        """What one client asks through, one body after the other."""
        ...


class Road(Protocol):
    """A way to a model."""

    name: str

    def open(self, model: str) -> AbstractContextManager[Door]:
        """Load a model; raises `RunError` where it can't be loaded."""
        ...


class ServerRoad:
    """`opfa serve MODEL` on loopback, in a process of its own; a connection for each client."""

    name = "server"

    @contextlib.contextmanager
    def open(self, model: str) -> Iterator[Door]:
        """Start a server; it stops with the block."""
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "opfa", "--quiet", "serve", model, "--port", str(port)]
        with tempfile.TemporaryFile("w+") as said:
            output: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said, "text": True}
            with subprocess.Popen(command, **output) as process:
                try:
                    if not _starts(process, port):
                        said.seek(0)
                        lines = [line for line in said if line.strip()]
                        why = lines[-1].strip() if lines else "it didn't start in time"
                        raise RunError(f"opfa serve {model}: {why}")
                    yield _ServerDoor(port)
                finally:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(STOP_SECONDS)
                    process.kill()


class _ServerDoor:
    """The address of a server."""

    def __init__(self, port: int) -> None:
        self._port = port
        with contextlib.closing(self._connection()) as connection:
            connection.request("GET", "/openapi.json")
            document = json.loads(connection.getresponse().read())
        self.columns: Columns = document["components"]["schemas"]["Row"]["properties"]

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self._port, timeout=ANSWER_SECONDS)

    @contextlib.contextmanager
    def line(self) -> Iterator[Ask]:
        """One connection, kept open."""
        with contextlib.closing(self._connection()) as connection:

            def ask(body: bytes) -> None:
                try:
                    connection.request("POST", "/predict", body, JSON)
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    raise RunError(f"the server doesn't answer: {error!r}") from None
                if answer.status != http.client.OK:
                    what = content.decode(errors="replace")
                    raise RunError(f"the server answers with status {answer.status}: {what}")

            yield ask


def _starts(process: "subprocess.Popen[str]", port: int) -> bool:
    """Whether a server is there in time; False as soon as it has ended."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        connection = http.client.HTTPConnection(HOST, port, timeout=1)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return True
        time.sleep(LOOK_SECONDS)
    return False


ROADS: tuple[Road, ...] = (ServerRoad(),)
