"""`opfa serve` as a program: what it says, and a stop in the middle of its work."""

import contextlib
import http.client
import json
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from many_requests import Started, server
from transformers import BertTokenizer
from words import WORDS, tiny

from opfa.models.encoders import HEADS

NUM_CLIENTS, NUM_TEXTS = 8, 20


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    directory = tmp_path_factory.mktemp("model")
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(directory).save_pretrained(directory)
    torch.manual_seed(0)
    HEADS["SequenceClassification"].from_config(tiny()).save_pretrained(directory)
    with server(str(directory), "--json", "--batch", "1", "--wait-ms", "0") as started:
        yield started


def ask(port: int, body: Any) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("POST", "/", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        return answer.status, json.loads(answer.read())


def test_the_command_that_it_tells_to_try_is_answered(started: Started) -> None:
    words = shlex.split(started.command)
    assert words[:3] == ["curl", f"http://127.0.0.1:{started.port}/predict", "-H"]
    assert words[3] == "Content-Type: application/json"
    assert ask(started.port, json.loads(words[words.index("-d") + 1]))[0] == 200


def test_only_this_machine_reaches_it(started: Started) -> None:
    lines = Path(f"/proc/{started.process.pid}/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
    assert f"0100007F:{started.port:04X}" in listening  # 127.0.0.1
    assert f"00000000:{started.port:04X}" not in listening


def test_a_stop_answers_what_was_taken_and_is_a_success(started: Started) -> None:
    """SIGTERM while eight requests wait, and one whose body is half sent."""
    asked = {"inputs": ["good film"] * NUM_TEXTS}
    with (
        ThreadPoolExecutor(NUM_CLIENTS) as clients,
        socket.create_connection(("127.0.0.1", started.port), 30) as half,
        socket.create_connection(("127.0.0.1", started.port), 30) as idle,
    ):
        half.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        half.sendall(b'Content-Length: 8\r\n\r\n["go')
        answers = [clients.submit(ask, started.port, asked) for _ in range(NUM_CLIENTS)]
        while waiting(started.port) < NUM_TEXTS:
            time.sleep(0.005)
        started.process.send_signal(signal.SIGTERM)
        assert idle.recv(100) == b""  # closed, without a word
        with pytest.raises(ConnectionError):
            ask(started.port, asked)
        half.sendall(b'od"]')
        received = b""
        while piece := half.recv(1_000):
            received += piece
        assert received.startswith(b"HTTP/1.1 200") and b"connection: close" in received.lower()
        for one in answers:
            status, found = one.result()
            assert (status, len(found)) == (200, NUM_TEXTS)
    assert started.process.wait(30) == 0
    assert started.process.stdout is not None
    result = json.loads(started.process.stdout.read())
    assert result["answered"] == result["requests"] >= NUM_CLIENTS + 1
    assert result["examples"] >= NUM_CLIENTS * NUM_TEXTS + 1


def waiting(port: int) -> float:
    """How many examples wait in the server."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
    line = next(line for line in text.splitlines() if line.startswith("opfa_queue_examples "))
    return float(line.split()[1])
