"""Many requests from several clients to a server, each answer compared with `opfa.predict`.

    python tests/serving/many_requests.py MODEL [NUM_REQUESTS] [NUM_CLIENTS]

Starts `opfa serve MODEL` on loopback in a process of its own. Every text is another one, so an
answer that goes to another client is seen. Ends with 1 where one is lost or wrong.
"""

import contextlib
import http.client
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

import opfa

WORDS = 3, 12  # in a text
CLOSE = 1e-4  # of scores, whose last digits depend on the batch


def texts_of(words: Sequence[str], num: int) -> list[str]:
    """Different texts of random words."""
    numbers, found = random.Random(0), dict[str, None]()
    while len(found) < num:
        found[" ".join(numbers.choices(words, k=numbers.randint(*WORDS)))] = None
    return list(found)


def send_many(
    port: int, texts: Sequence[str], num_clients: int, seconds: list[float] | None = None
) -> list[Any]:
    """The answer to each text, sent alone; None where one is lost. Each client keeps one connection
    and sends its next text when it has its answer. `seconds` gets what each took.
    """
    found: list[Any] = [None] * len(texts)

    def work(first: int) -> None:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        ) as client:
            for index in range(first, len(texts), num_clients):
                start = time.perf_counter()
                body = json.dumps({"inputs": texts[index]})
                client.request("POST", "/predict", body, {"Content-Type": "application/json"})
                answer = client.getresponse()
                content = answer.read()
                if answer.status == 200:
                    found[index] = json.loads(content)
                if seconds is not None:
                    seconds.append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@dataclass(frozen=True)
class Started:
    """A server: its port, the command that it tells to try, and its process."""

    port: int
    command: str
    process: "subprocess.Popen[str]"


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator["Started"]:
    """`opfa serve MODEL` in a process of its own, until the block ends."""
    command = [sys.executable, "-m", "opfa", "serve", model, "--port", "0", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stderr is not None
            said = ""
            while "curl" not in said:
                said = process.stderr.readline()
                if not said:
                    raise SystemExit(f"opfa serve {model}: it didn't start")
            found = re.search(r"http://[^ ]*:(\d+)/predict", said)
            assert found is not None
            drain = threading.Thread(target=process.stderr.read)
            drain.start()
            yield Started(int(found[1]), said, process)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            drain.join()
        finally:
            process.kill()


def is_same(found: Any, expected: dict[str, Any]) -> bool:
    """Whether an answer is the one of `opfa.predict`."""
    if found is None or found.keys() != expected.keys():
        return False
    scores = zip(found.values(), expected.values(), strict=True)
    return all(
        math.isclose(one, other, abs_tol=CLOSE) if isinstance(other, float) else one == other
        for one, other in scores
    )


def main(model: str, num_requests: int = 10_000, num_clients: int = 16) -> int:
    """Print what was lost and wrong, and how fast it was."""
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    texts = texts_of(sorted(word for word in vocabulary if word.isalpha()), num_requests)
    expected = [one.columns() for one in opfa.predict(model, texts)]
    seconds: list[float] = []
    with server(model) as started:
        start = time.perf_counter()
        found = send_many(started.port, texts, num_clients, seconds)
        elapsed = time.perf_counter() - start
    lost = found.count(None)
    wrong = sum(not is_same(*pair) for pair in zip(found, expected, strict=True)) - lost
    cuts = statistics.quantiles(seconds, n=20)
    print(f"{num_requests:,} requests, {num_clients} clients: {lost} lost, {wrong} wrong")
    print(f"{num_requests / elapsed:,.0f} a second; p50 {1e3 * cuts[9]:.1f} ms, ", end="")
    print(f"p95 {1e3 * cuts[18]:.1f} ms; exit code {started.process.returncode}")
    return int(lost or wrong or started.process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
