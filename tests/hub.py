"""An imitation of the Hub on the loopback device: one model, ranges, and a count of bytes."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NAME = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What was asked of the imitation."""

    num_bytes: int = 0
    paths: list[str] = field(default_factory=list)


@contextmanager
def serving(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, *, has_ranges: bool = True
) -> Iterator[Hub]:
    """Serve a directory as the one model of a Hub, and point huggingface_hub there."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802 - the protocol's name
            self.answer(is_head=True)

        def do_GET(self) -> None:  # noqa: N802
            self.answer(is_head=False)

        def answer(self, *, is_head: bool) -> None:
            path = self.path.partition("?")[0]
            file = directory / path.rpartition("/")[2]
            files = [path for path in directory.iterdir() if path.is_file()]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                rows = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in files
                ]
                self.send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
            elif path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
                body = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings}
                self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            elif path.startswith(f"/{NAME}/resolve/") and file.is_file():
                self.send_file(file, is_head=is_head)
            else:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        def send_file(self, file: Path, *, is_head: bool) -> None:
            data, status = file.read_bytes(), 200
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}
            if has_ranges and "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                data, status = data[int(first) : int(last) + 1], 206
            if not is_head:
                hub.num_bytes += len(data)
                hub.paths.append(file.name)
            self.send(status, data, headers, is_head=is_head)

        def send(
            self, status: int, body: bytes, headers: dict[str, str], *, is_head: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
