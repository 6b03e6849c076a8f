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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol

from opfa.errors import RunError
from opfa.serving import archive

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


class HandlerRoad:
    """What `opfa pack RUN --output model.tar.gz` puts into an archive, in a process of its own. It
    has one request at a time, as a worker of an endpoint's container; there is no HTTP.
    """

    name = "handler"

    @contextlib.contextmanager
    def open(self, model: str) -> Iterator[Door]:
        """Export a model and start its handler; it stops with the block."""
        with tempfile.TemporaryDirectory() as aside:
            place = Path(aside, "model")
            archive.fill(model, place)
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            command = [sys.executable, "-c", HANDLING]
            with (
                tempfile.TemporaryFile("w+") as said,
                subprocess.Popen(command, cwd=place, stderr=said, **pipes) as process,
            ):
                try:
                    yield _HandlerDoor(model, process, said, _columns(place / archive.TASK_FILE))
                finally:
                    process.kill()
                    with contextlib.suppress(BrokenPipeError):  # of a body that it didn't read
                        pipe: Any = process.stdin
                        pipe.close()


class _HandlerDoor:
    """A process that answers each line with a line."""

    def __init__(self, model: str, process: Any, said: IO[str], columns: Columns) -> None:
        self.columns = columns
        self._model, self._process, self._said = model, process, said
        self._free = threading.Lock()

    @contextlib.contextmanager
    def line(self) -> Iterator[Ask]:
        """Clients take turns."""

        def ask(body: bytes) -> None:
            with self._free, contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(body + b"\n")
                self._process.stdin.flush()
                if self._process.stdout.readline():
                    return
            self._said.seek(0)
            lines = [line for line in self._said if line.strip()] or ["it has ended"]
            raise RunError(f"the handler of {self._model}: {lines[-1].strip()}")

        yield ask


def _columns(file: Path) -> Columns:
    """The columns of a row, by what an archive says of its task."""
    task = json.loads(file.read_text(encoding="utf-8"))
    choices = task["choices"]
    texts = [task["text"], *filter(None, [task["text_pair"]])]
    found = {name: {"type": "string"} for name in [*texts, *choices]}
    return {**found, choices[0]: {"type": "array"}} if len(choices) == 1 else found


HANDLING = """
import sys
sys.path.insert(0, "code")
from inference import input_fn, model_fn, output_fn, predict_fn
model, form = model_fn("."), "application/json"
for line in sys.stdin:
    print(output_fn(predict_fn(input_fn(line, form), model), form), flush=True)
"""
ROADS: dict[str, Road] = {road.name: road for road in (ServerRoad(), HandlerRoad())}
