"""A server on loopback: the answers of `opfa predict`, and a right refusal of everything else."""

import contextlib
import importlib
import json
import math
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import JSON, Live, held, serving
from onnx import TensorProto, helper, numpy_helper, save
from prometheus_client.parser import text_string_to_metric_families
from words import MODELS, WORDS, write_models

import opfa
from opfa.errors import RunError
from opfa.inference.predictor import Options
from opfa.serving.asking import Asking
from opfa.serving.limits import Limits
from opfa.tasks.predictions import VectorPrediction

ASKED: dict[str, list[Any]] = {  # in Python's form; in JSON's a tuple is a list
    "classes": ["good film", {"text": "bad", "more": 3}, "who won ? " * 40],
    "number": ["good film", "bad"],
    "answers": [
        ("who won ?", "rome beat paris . in may"),
        {"question": "who won ?", "context": "film good bad " * 40 + "rome beat paris"},
    ],
    "tags": ["good film", ["who", "won", "?"], ["bad"] * 40],
    "choices": [("who won ?", ["rome", "paris"]), {"text": "who", "choices": ["good", "bad film"]}],
    "bare": ["good film", "who won ?"],
}
KINDS = {"bare": "embedding"}
NOTHING = 30.0  # seconds, where nothing should end by itself


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def live(models: Path) -> Iterator[Live]:
    with serving(models / "classes", batch=8, queue=64) as live:
        yield live


@pytest.fixture(scope="module")
def answering(models: Path) -> Iterator[Live]:
    with serving(models / "answers") as live:
        yield live


def assert_same(found: Any, expected: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


# what is answered


@pytest.mark.parametrize("name", [*MODELS, "bare"])
def test_every_kind_of_task_is_answered_as_predict_does(models: Path, name: str) -> None:
    kind, asked = KINDS.get(name), ASKED[name]
    expected = [one.columns() for one in opfa.predict(models / name, asked, kind=kind)]
    whole = [one.columns(has_all=True) for one in opfa.predict(models / name, asked, kind=kind)]
    with serving(models / name, Options(kind=kind)) as live:
        for body in ({"inputs": asked}, asked):
            status, found = live.ask(body)
            assert status == 200
            assert_same(found, expected)
        status, found = live.ask({"inputs": asked, "parameters": {"probabilities": True}})
        assert_same(found, whole)
        row = next((item for item in asked if isinstance(item, dict)), asked[0])
        assert_same(live.ask({"inputs": row})[1], expected[asked.index(row)])  # no list: no list


def test_a_packed_model_answers_the_same_in_the_kernels(models: Path, tmp_path: Path) -> None:
    texts = ["good film", "bad", "who won ?"]
    expected = [one.columns() for one in opfa.predict(models / "classes", texts)]
    opfa.pack(models / "classes", tmp_path / "made")
    with serving(tmp_path / "made") as live:
        assert live.service.predictor.runs_in.startswith("opfa's kernels")
        assert_same(live.ask(texts)[1], expected)


def test_an_onnx_file_is_answered_by_onnx_runtime(models: Path, tmp_path: Path) -> None:
    """A model of one table, whose logits are known: the sum of its rows for the tokens."""
    table = np.linspace(-1, 1, 2 * len(WORDS), dtype=np.float32).reshape(-1, 2)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["logits"], keepdims=0),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    known = [numpy_helper.from_array(table, "table")]
    known.append(numpy_helper.from_array(np.array([1]), "axes"))
    graph = helper.make_graph(nodes, "sum", [ids], [logits], known)
    opset = [helper.make_opsetid("", 18)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "model.onnx")
    for file in (models / "classes").iterdir():
        if "safetensors" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with serving(tmp_path / "model.onnx") as live:
        assert live.service.predictor.runs_in == "ONNX Runtime"
        (found,) = live.ask({"inputs": ["good film"], "parameters": {"probabilities": True}})[1]
    summed = table[[WORDS.index(word) for word in ("[CLS]", "good", "film", "[SEP]")]].sum(0)
    shares = np.exp(summed) / np.exp(summed).sum()
    assert list(found["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_a_run_s_columns_are_asked_for(models: Path, tmp_path: Path) -> None:
    with serving(models / "classes", Options(text="review", text_pair="other")) as live:
        status, found = live.ask({"inputs": {"review": "good", "other": "film"}})
        assert status == 200 and found["prediction"] in ("good", "bad")
        assert live.ask([["good", "film"]])[1] == [found]
        message = live.refused(b'["good"]', 422)
        assert message.startswith("inputs, [0]: 'other' is missing") or "other" in message


def test_many_clients_get_their_own_answers_in_few_batches(models: Path, live: Live) -> None:
    """1,000 here; the script many_requests.py sends 10,000."""
    from many_requests import send_many, texts_of

    before = live.service.metrics.num_requests
    texts = texts_of(WORDS[5:], 1_000)
    expected = [one.columns() for one in opfa.predict(models / "classes", texts)]
    batches: list[int] = []
    live.service.batcher._watch = lambda num, _: batches.append(num)
    found = send_many(live.port, texts, num_clients=16)
    live.service.batcher._watch = live.service.metrics.batch
    assert_same(found, expected)
    assert live.service.metrics.num_requests - before == 1_000
    assert sum(batches) == 1_000 and len(batches) < 600 and max(batches) <= 8


def test_what_arrives_together_is_computed_together(live: Live) -> None:
    sizes: list[int] = []
    live.service.batcher._watch = lambda num, _: sizes.append(num)
    with ThreadPoolExecutor(9) as clients:
        with held(live):
            first = clients.submit(live.ask, ["good"])
            time.sleep(0.1)  # it is in the model now
            others = [clients.submit(live.ask, ["bad film"]) for _ in range(8)]
            assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 8)
        assert [one.result()[0] for one in (first, *others)] == [200] * 9
    live.service.batcher._watch = live.service.metrics.batch
    assert sizes == [1, 8]


def test_no_number_in_json_is_infinite() -> None:
    found = [VectorPrediction(prediction=[math.nan, 0.5, -math.inf])]
    assert Asking([], is_single=True, has_all=False).answered(found) == (
        b'{"prediction":[null,0.5,null]}'
    )


# what is refused


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "malformed JSON: Expecting value"),
        (b'{"inputs": "good"', 400, "malformed JSON: Expecting ',' delimiter"),
        (b'{"inputs": "good\xff"}', 400, "the body is not UTF-8: byte 16 is 0xff"),
        (b'\xef\xbb\xbf{"inputs": "good"}', 400, "malformed JSON: Unexpected UTF-8 BOM"),
        (b'{"inputs": "\\ud800"}', 400, "malformed JSON: .* surrogates not allowed"),
        (b'{"inputs": NaN}', 400, "malformed JSON: NaN is no JSON"),
        (b'{"inputs": "a", "inputs": "b"}', 400, "the key 'inputs' stands twice"),
        (b"[" * 100_000, 400, "malformed JSON: "),
        (b"[" + b"9" * 5_000 + b"]", 400, "malformed JSON: Exceeds the limit"),
        (b"3", 422, "the body is neither an object nor a list"),
        (b"{}", 422, 'inputs: Field required; give {"inputs": ...}, or a list'),
        (b'{"input": "good"}', 422, "inputs: Field required"),
        (b'{"inputs": "good", "options": {}}', 422, "options: Extra inputs are not permitted"),
        (
            b'{"inputs": "good", "parameters": {"probabilities": 1}}',
            422,
            "parameters.probabilities: Input should be a valid boolean",
        ),
        (b"[]", 422, "inputs: is empty; give at least one"),
        (b'{"inputs": null}', 422, "inputs, .0.: 'text' is "),
        (b'["good", 5]', 422, r"inputs, \[1\]: 'text' is not a text \(got 5\)"),
        (b'["good", " "]', 422, r"inputs, \[1\]: 'text' is empty"),
        (b'[["good", "bad"]]', 422, r"inputs\[0\] = .*: a tuple is a text and its pair"),
        (b'[{"txt": "good"}]', 422, r"inputs, \[0\]: no column 'text' .*; there are 'txt'"),
        (b"[" + b'"a",' * 64 + b'"a"]', 413, "inputs: has 65, and at most 64 can wait"),
    ],
)
def test_what_can_t_be_answered_is_one_clear_message(
    live: Live, body: bytes, status: int, message: str
) -> None:
    assert re.search(message, live.refused(body, status))
    assert live.ask(["good"])[0] == 200


def test_other_headers_paths_and_methods_are_refused(live: Live) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert live.refused(b"[]", 415, Content_Type=kind).startswith("Content-Type: is ")
    assert "send the body as it is" in live.refused(b"[]", 415, Content_Encoding="gzip")
    for method, path, status in (("GET", "/predict", 405), ("POST", "/x", 404), ("PUT", "/", 405)):
        found, _, body = live.send(method, path)
        assert (found, list(json.loads(body))) == (status, ["error"])
    with live.socket() as client:
        client.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:80", 200),
        ("10.0.0.1", 200),  # an address can't be rebound
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::1", 421),
    ],
)
def test_a_server_on_loopback_is_not_there_for_names_of_others(
    live: Live, host: str, status: int
) -> None:
    for method, path in (("POST", "/predict"), ("GET", "/")):
        found, _, _ = live.send(method, path, b'["good"]', {**JSON, "Host": host})
        assert found == status


def test_a_server_for_others_is_there_for_any_name(models: Path) -> None:
    with serving(models / "classes", host="0.0.0.0") as live:
        found, _, _ = live.send("GET", "/health", None, {"Host": "models.example"})
    assert found == 200


def test_a_question_too_long_for_its_windows_spoils_no_other(answering: Live) -> None:
    good, wrong = [["who won ?", "rome beat paris"]], [["who " * 40, "rome"]]
    expected = answering.ask(good)
    with ThreadPoolExecutor(3) as clients:
        with held(answering):
            asked = [clients.submit(answering.ask, body) for body in (good, good)]
            time.sleep(0.1)
            asked += [clients.submit(answering.ask, body) for body in (good + wrong, good, good)]
            time.sleep(0.2)
        found = [one.result() for one in asked]
    status, body = found.pop(2)
    assert status == 422
    assert "[1]: the question has 40 tokens, too many for windows" in body["error"]
    assert [status for status, _ in found] == [200] * 4
    for _, body in found:
        assert_same(body, expected[1])


def test_requests_that_fit_no_common_batch_are_answered_one_by_one(models: Path) -> None:
    rows = [{"text": "who", "choices": ["good", "bad", "film"][:num]} for num in (2, 3, 2)]
    expected = [opfa.predict(models / "choices", [row])[0].columns() for row in rows]
    with serving(models / "choices") as live, ThreadPoolExecutor(4) as clients:
        with held(live):
            asked = [clients.submit(live.ask, {"inputs": row}) for row in rows[:1]]
            time.sleep(0.1)
            asked += [clients.submit(live.ask, {"inputs": row}) for row in rows[1:]]
            assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 2)
        for one, other in zip(asked, expected, strict=True):
            assert_same(one.result(), (200, other))
        status, body = live.ask({"inputs": rows})
        assert status == 422 and "has 3 choices, the first example 2" in body["error"]


def test_a_fault_of_the_server_spoils_no_other_and_is_logged(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    answers = live.service.predictor.answers

    def faulty(source: str, rows: Any, *more: Any, **options: Any) -> Any:
        if any(row["text"] == "paris" for _, row in rows):
            raise MemoryError("none left")
        return answers(source, rows, *more, **options)

    with ThreadPoolExecutor(4) as clients:
        with held(live):
            asked = [clients.submit(live.ask, ["good"])]
            time.sleep(0.1)
            asked += [clients.submit(live.ask, [text]) for text in ("bad", "paris", "film")]
            assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 3)
            inside = live.service.predictor.answers
            live.service.predictor.answers = faulty
        live.service.predictor.answers = faulty
        found = [one.result() for one in asked]
    live.service.predictor.answers = answers
    assert inside is not faulty
    assert [status for status, _ in found] == [200, 200, 500, 200]
    assert found[2][1] == {"error": "a fault of the server; its log says more"}
    assert live.wait_until(5, lambda: "none left" in caplog.text)
    assert live.ask(["good"])[0] == 200


# what is bounded


def test_a_body_of_100_mb_gets_its_refusal_also_by_a_client_that_sends_it_all(live: Live) -> None:
    piece = bytes(1 << 20)
    status, _, body = live.send("POST", "/predict", piece * 100)
    assert (status, json.loads(body)["error"]) == (413, "the body is larger than 1,000,000 bytes")
    before = resident()
    status, _, body = live.send("POST", "/predict", (piece for _ in range(100)))  # chunked
    assert (status, json.loads(body)["error"]) == (413, "the body is larger than 1,000,000 bytes")
    assert resident() - before < 20e6  # none of it is kept
    assert live.ask(["good"])[0] == 200


def test_a_client_that_asks_first_sends_no_body_that_is_too_large(live: Live) -> None:
    with live.socket() as client:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "answer", "more"),
    [
        (b"", b"", b""),  # a connection without a request
        (HEAD, b"HTTP/1.1 408", b""),
        (HEAD, b"HTTP/1.1 408", b"X"),  # a letter now and then
        (HEAD + b"Content-Length: 90\r\n\r\n", b"HTTP/1.1 408", b""),
        (HEAD + b"Content-Length: 90\r\n\r\n", b"HTTP/1.1 408", b"X"),
        (HEAD + b"Content-Length: 900000000\r\n\r\n", b"HTTP/1.1 413", b"X"),
    ],
    ids=["silent", "headers", "slow headers", "body", "slow body", "refused body"],
)
def test_a_slow_client_is_answered_and_let_go(
    models: Path, sent: bytes, answer: bytes, more: bytes
) -> None:
    with (
        serving(models / "classes", read_seconds=0.4, answer_seconds=NOTHING) as live,
        live.socket() as client,
    ):
        client.sendall(sent)
        received, end = b"", time.monotonic() + 5
        client.settimeout(0.05)
        while time.monotonic() < end:
            try:
                client.sendall(more)
                if not (piece := client.recv(1_000)):
                    break
                received += piece
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert received.startswith(answer) and bool(received) == bool(answer)
        assert time.monotonic() < end
        assert live.wait_until(2, lambda: not live.server.server_state.connections)


@pytest.mark.parametrize("more", [HEAD, HEAD + b"Content-Length: 900000000\r\n\r\n"])
def test_a_second_request_of_a_connection_has_a_time_too(models: Path, more: bytes) -> None:
    good = HEAD + b"Content-Length: 8\r\n\r\n" + b'["good"]'
    for together in (True, False):
        with serving(models / "classes", read_seconds=0.4) as live, live.socket() as client:
            client.sendall(good + more if together else good)
            received = client.recv(1_000)
            assert received.startswith(b"HTTP/1.1 200")
            client.sendall(b"" if together else more)
            end = time.monotonic() + 5
            with contextlib.suppress(ConnectionError):
                while piece := client.recv(1_000):
                    received += piece
            assert time.monotonic() < end
            assert (b"HTTP/1.1 408" if more == HEAD else b"HTTP/1.1 413") in received


def test_a_client_that_does_not_read_is_let_go(models: Path) -> None:
    limits = {"answer_seconds": 2, "batch": 1_000, "send_bytes": 4_096}
    with (
        serving(models / "bare", Options(kind="embedding"), **limits) as live,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect(("127.0.0.1", live.port))
        body = json.dumps(["good"] * 1_000).encode()
        head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
        state = live.server.server_state
        client.sendall(head + body)  # the answer has 300 kB
        assert live.wait_until(9, lambda: live.service.metrics.num_answered == 1)
        assert state.connections
        assert live.wait_until(9, lambda: not state.connections)
        assert live.ask(["good"])[0] == 200


def test_a_full_queue_says_when_to_come_back(models: Path) -> None:
    with serving(models / "classes", queue=3, batch=1) as live, ThreadPoolExecutor(4) as clients:
        with held(live):
            asked = [clients.submit(live.ask, ["good"])]
            time.sleep(0.1)
            asked += [clients.submit(live.ask, {"inputs": ["bad"] * 2})]
            assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 2)
            status, headers, body = live.send("POST", "/", b'["a", "b"]')
            assert (status, headers["Retry-After"]) == (503, "1")
            assert json.loads(body)["error"] == "the queue is full; come back in 1 s"
            asked += [clients.submit(live.ask, ["film"])]  # there is room for one
            assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 3)
        assert [one.result()[0] for one in asked] == [200] * 3


def test_an_answer_that_takes_too_long_is_504_and_leaves_the_queue(models: Path) -> None:
    with serving(models / "classes", answer_seconds=0.3) as live, ThreadPoolExecutor(2) as clients:
        with held(live):
            first = clients.submit(live.ask, ["good"])
            time.sleep(0.1)
            second = clients.submit(live.ask, ["bad"])
            for one in (first, second):
                assert one.result() == (504, {"error": "no answer within 0.3 s"})
            assert live.wait_until(1, lambda: live.service.batcher.num_waiting == 0)
        assert live.ask(["good"])[0] == 200


def test_a_client_that_leaves_takes_its_question_back(live: Live) -> None:
    examples = live.service.metrics.num_examples
    with ThreadPoolExecutor(2) as clients, held(live):
        first = clients.submit(live.ask, ["good"])
        time.sleep(0.1)
        with live.socket() as client:
            client.sendall(HEAD + b"Content-Length: 7\r\n\r\n" + b'["bad"]')
            assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 1)
        assert live.wait_until(5, lambda: live.service.batcher.num_waiting == 0)
    assert first.result()[0] == 200
    assert live.service.metrics.num_examples == examples + 1


# what can be looked at


def test_health_says_which_model_answers(models: Path, live: Live) -> None:
    status, _, body = live.send("GET", "/health")
    found = json.loads(body)
    assert (status, found["status"], found["kind"]) == (200, "ok", "classification")
    assert found["model"] == "/".join(models.parts[-1:]) + "/classes"  # no path of the machine
    assert found["runs_in"] == live.service.predictor.runs_in


def test_health_is_503_where_nothing_computes_any_more(models: Path) -> None:
    with serving(models / "classes") as live:
        running = live.service._running
        assert running is not None
        running.get_loop().call_soon_threadsafe(running.cancel)
        assert live.wait_until(5, lambda: live.send("GET", "/health")[0] == 503)


def test_prometheus_reads_the_numbers(models: Path) -> None:
    with serving(models / "classes") as live:
        live.ask(["good", "who won ? " * 40])
        live.ask([])
        _, headers, body = live.send("GET", "/metrics")
        families = list(text_string_to_metric_families(body.decode()))
    assert headers["Content-Type"].startswith("text/plain; version=")
    found = {(s.name, s.labels.get("status")): s.value for f in families for s in f.samples}
    assert found["opfa_requests_total", "200"] == found["opfa_requests_total", "422"] == 1
    assert found["opfa_examples_total", None] == found["opfa_batch_examples_sum", None] == 2
    assert found["opfa_examples_cut_total", None] == 1
    assert found["opfa_request_seconds_count", None] == 2
    assert found["opfa_queue_examples", None] == 0
    assert found["process_resident_memory_bytes", None] > 1e6


@pytest.mark.parametrize("name", [*MODELS, "bare"])
def test_openapi_is_whole_and_its_example_is_answered(models: Path, name: str) -> None:
    with serving(models / name, Options(kind=KINDS.get(name))) as live:
        document = json.loads(live.send("GET", "/openapi.json")[2])
        schema = document["components"]["schemas"]
        assert live.ask(schema["Request"]["example"])[0] == 200
    for place in re.findall(r'"\$ref": "#/([^"]*)"', json.dumps(document)):
        found: Any = document
        for key in place.split("/"):
            found = found[key]
        assert found
    assert sorted(document["paths"]) == ["/health", "/metrics", "/predict"]
    refusals = document["paths"]["/predict"]["post"]["responses"]
    assert {"200", "400", "408", "413", "415", "422", "503", "504"} <= set(refusals)
    assert schema["Answer"]["properties"]["prediction"]


# options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70_000}, "--port 70000: Input should be less than or equal to 65535"),
        ({"queue": 0}, "--queue 0: Input should be greater than or equal to 1"),
        ({"batch": 0}, "--batch 0: "),
        ({"wait_ms": -1}, "--wait-ms -1: "),
        ({"body_mb": float("nan")}, "--body-mb nan: "),
        ({"read_seconds": 0}, "--read-seconds 0: "),
        ({"answer_seconds": float("inf")}, "--answer-seconds inf: "),
        ({"host": ""}, "--host '': "),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=f"^{re.escape(message)}"):
        Limits.of(**values)
    with pytest.raises(RunError, match=f"^{re.escape(message)}"):
        opfa.serve("nothing", **values)


def test_an_address_that_is_taken_or_unknown_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"--host 127.0.0.1 --port {port}: can't be bound: "):
            opfa.serve("no-such-model", port=port)
    with pytest.raises(RunError, match="--host nowhere.invalid --port 0: no such address"):
        opfa.serve("no-such-model", host="nowhere.invalid", port=0)


def test_without_its_packages_the_server_says_how_to_get_them_and_the_rest_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "opfa.serving.results", raising=False)
    monkeypatch.delitem(sys.modules, "opfa.serving.service", raising=False)
    importlib.import_module("opfa.serving.results")  # which opfa.api.results imports
    assert "opfa.serving.service" not in sys.modules
    message = r'^opfa serve needs fastapi: pip install "opfa\[serve\]"$'
    with pytest.raises(RunError, match=message):
        opfa.serve("no-such-model")
