"""Web servers on loopback that can misbehave: one answer of a script for each request of a path."""

import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" * 6 + "abcd"
Odd = Callable[["Handler", bytes], None]  # answers a GET of this content in its own way


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content  # by path
        self.script: dict[str, list[Odd]] = defaultdict(list)
        self.always: dict[str, Odd] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.let_go = threading.Event()  # ends a stall

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self, path: str) -> list[str | None]:
        """What each GET of a path asked for."""
        return [r for method, p, r in self.asked if (method, p) == ("GET", path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server wants
        self._answer()

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    def _answer(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        if path.startswith("http://"):  # as a proxy is asked
            path = "/" + path.split("/", 3)[3]
        server.asked.append((self.command, path, self.headers.get("Range")))
        content = server.content.get(path, b"")
        if self.command == "GET" and server.script[path]:
            server.script[path].pop(0)(self, content)
        elif self.command == "GET" and path in server.always:
            server.always[path](self, content)
        elif path in server.content:
            self.send(content)
        else:
            code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
            self.start(404, 0, **{"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def start(self, code: int, length: int | None, **headers: str) -> None:
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, content: bytes, *, num_bytes: int | None = None) -> None:
        """The content from where it was asked for, or only so many bytes of it."""
        asked = self.headers.get("Range")
        headers = {}
        if "/resolve/" in self.path:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if asked is None:
            self.start(200, len(content), **headers)
        else:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.start(416, 0)
                return
            place = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.start(206, len(content) - first, Content_Range=place, **headers)
            content = content[first:]
        if self.command == "GET":
            self.wfile.write(content if num_bytes is None else content[:num_bytes])


def cut(num_bytes: int) -> Odd:
    """Hang up after so many bytes."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.send(content, num_bytes=num_bytes)
        handler.close_connection = True

    return answer


def reset(num_bytes: int) -> Odd:
    """Break the connection after so many bytes."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.send(content, num_bytes=num_bytes)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())
        handler.close_connection = True

    return answer


def stall(num_bytes: int) -> Odd:
    """Send so many bytes, and then nothing."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.send(content, num_bytes=num_bytes)
        handler.wfile.flush()
        handler.server.let_go.wait(20)
        handler.close_connection = True

    return answer


def status(code: int, **headers: str) -> Odd:
    """No content."""
    return lambda handler, _: handler.start(code, 0, **headers)


def whole(handler: Handler, content: bytes) -> None:
    """Everything, whatever part was asked for."""
    handler.start(200, len(content))
    handler.wfile.write(content)


def elsewhere(handler: Handler, content: bytes) -> None:
    """Another part than the one that was asked for."""
    handler.start(206, len(content) - 7, Content_Range=f"bytes 7-{len(content) - 1}/{len(content)}")
    handler.wfile.write(content[7:])


def instead(other: bytes, **headers: str) -> Odd:
    """Other content, and no ranges."""

    def answer(handler: Handler, _: bytes) -> None:
        handler.start(200, len(other), **headers)
        handler.wfile.write(other)

    return answer


def endless(handler: Handler, content: bytes) -> None:
    """The content, and then more and more, with no length stated; a disk is never filled up."""
    handler.start(200, None, Connection="close")
    handler.close_connection = True
    handler.wfile.write(content)
    for _ in range(1024):
        handler.wfile.write(bytes(1 << 16))


def without_length(handler: Handler, content: bytes) -> None:
    """Half of the content, with no length stated."""
    handler.start(200, None, Connection="close")
    handler.close_connection = True
    handler.wfile.write(content[: len(content) // 2])


@contextlib.contextmanager
def serving(content: dict[str, bytes]) -> Iterator[Server]:
    """Serve until the block ends."""
    server = Server(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        thread.join()
        server.server_close()


def release(files: dict[str, bytes], name: str = "tiny") -> dict[str, bytes]:
    """These files and the manifest that they should have."""
    entries = {
        file: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in files.items()
    }
    manifest = {"format": "opfa-release/1", "name": name, "files": entries}
    return {**files, "release.json": json.dumps(manifest).encode()}


def hub(repository: str, files: dict[str, bytes], large: tuple[str, ...] = ()) -> dict[str, bytes]:
    """What a Hub answers for a repository; of large files it states the SHA-256."""
    siblings = []
    for file, content in files.items():
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        row: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": blob}
        if file in large:
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 130}
        siblings.append(row)
    about = {"id": repository, "sha": COMMIT, "siblings": siblings}
    paths = {f"/api/models/{repository}/revision/main": json.dumps(about).encode()}
    for revision in ("main", COMMIT):
        paths |= {f"/{repository}/resolve/{revision}/{f}": content for f, content in files.items()}
    return paths
