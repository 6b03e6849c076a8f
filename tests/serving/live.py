"""A server on loopback in a thread of this process, and clients that speak HTTP by hand."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uvicorn import Server

from opfa.inference.predictor import Options, Predictor
from opfa.serving.limits import Limits
from opfa.serving.run import config_of
from opfa.serving.service import Service

JSON = {"Content-Type": "application/json"}


class Live:
    """A server that runs, and its service."""

    def __init__(self, service: Service, server: Server, port: int) -> None:
        self.service, self.server, self.port = service, server, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(
        self, method: str, path: str, body: Any = None, headers: Any = JSON
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request on a connection of its own."""
        with contextlib.closing(self.client()) as client:
            client.request(method, path, body, headers)
            answer = client.getresponse()
            return answer.status, answer.headers, answer.read()

    def ask(self, value: Any) -> tuple[int, Any]:
        status, _, body = self.send("POST", "/predict", json.dumps(value).encode())
        return status, json.loads(body)

    def refused(self, body: Any, status: int, **headers: str) -> str:
        """The message of a refusal with this status."""
        given = {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
        found, _, answer = self.send("POST", "/predict", body, given)
        assert (found, list(json.loads(answer))) == (status, ["error"]), answer
        return json.loads(answer)["error"]

    def wait_until(self, seconds: float, claim: Any) -> bool:
        """Whether a claim becomes true in so many seconds."""
        end = time.monotonic() + seconds
        while not claim() and time.monotonic() < end:
            time.sleep(0.01)
        return claim()


@contextlib.contextmanager
def serving(
    model: Path, options: Options | None = None, *, send_bytes: int | None = None, **limits: Any
) -> Iterator[Live]:
    """Serve a model until the block ends; the system holds so many bytes for a client."""
    chosen = Limits.of(**{"port": 0, "read_seconds": 5, "answer_seconds": 10, **limits})
    service = Service(str(model), Predictor(str(model), options or Options()), chosen)
    server = Server(config_of(service))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if send_bytes is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            live = Live(service, server, port)
            assert live.wait_until(10, lambda: server.started)
            yield live
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def held(live: Live) -> Iterator[None]:
    """The model doesn't answer before the block ends."""
    let_go, answers = threading.Event(), live.service.predictor.answers

    def late(*arguments: Any, **options: Any) -> Any:
        assert let_go.wait(20)
        return answers(*arguments, **options)

    live.service.predictor.answers = late
    try:
        yield
    finally:
        live.service.predictor.answers = answers
        let_go.set()
