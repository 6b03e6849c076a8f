"""`opfa bench serve`: what it counts, on roads whose times are known, and on a real server."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer
from words import WORDS, tiny

from opfa.bench import roads
from opfa.bench.serve import bench_serve, bodies_of, cost_of_a_million
from opfa.commands import app as cli
from opfa.errors import RunError
from opfa.models.encoders import HEADS

TEXT = {"text": {"type": "string"}}


class SlowRoad:
    """A road on which a request takes so many seconds, `places` of them at a time."""

    name = "slow"

    def __init__(self, seconds: dict[str, float], places: int = 100) -> None:
        self.seconds, self.places = seconds, threading.Semaphore(places)
        self.num_open = self.num_lines = 0
        self.asked: dict[str, list[bytes]] = {model: [] for model in seconds}

    @contextlib.contextmanager
    def open(self, model: str) -> Iterator[Any]:
        self.num_open += 1
        yield SlowDoor(self, model)
        self.num_open -= 1


class SlowDoor:
    columns = TEXT

    def __init__(self, road: SlowRoad, model: str) -> None:
        self.road, self.model = road, model

    @contextlib.contextmanager
    def line(self) -> Iterator[Any]:
        self.road.num_lines += 1

        def ask(body: bytes) -> None:
            with self.road.places:
                time.sleep(self.road.seconds[self.model])
                self.road.asked[self.model].append(body)
                if self.model == "broken" and len(self.road.asked["broken"]) > 3:
                    raise RunError("broken down")

        yield ask


def test_times_rates_and_costs_are_those_of_the_road() -> None:
    road = SlowRoad({"a": 0.001, "b": 0.004}, places=1)
    found = bench_serve(["a", "b"], clients=(1, 4), requests=40, rounds=2, price=7.2, roads=[road])
    assert road.num_open == 0
    assert [(load.model, load.clients) for load in found.loads] == [
        ("a", 1),
        ("b", 1),
        ("a", 4),
        ("b", 4),
    ]
    for load in found.loads:
        seconds = road.seconds[load.model]
        assert load.num_requests == 80 and len(load.rounds) == 2
        assert load.p95_ms >= load.p50_ms >= 1e3 * seconds
        assert load.requests_per_second == sum(load.rounds) / 2 <= 1 / seconds
        assert load.cost == pytest.approx(7.2 / 3600 / load.requests_per_second * 1e6)
    assert road.num_lines == 2 * 2 * 2 * (1 + 4)  # warm-up and load, models, rounds, clients
    for line in ("| a | slow | 4 |", "| p95, ms |", "where an hour of the machine costs 7.2"):
        assert line in found.markdown()


def test_without_a_price_there_is_no_cost() -> None:
    found = bench_serve(["a"], clients=(2,), requests=4, rounds=1, roads=[SlowRoad({"a": 0.0})])
    assert found.loads[0].cost is None and "cost" not in found.markdown()


def test_a_request_that_fails_is_no_fast_one() -> None:
    with pytest.raises(RunError, match="broken down"):
        bench_serve(["broken"], clients=(2,), requests=10, roads=[SlowRoad({"broken": 0.0})])


def test_all_models_are_asked_the_same_which_has_the_words_that_were_wanted() -> None:
    road = SlowRoad({"a": 0.0, "b": 0.0})
    bench_serve(["a", "b"], clients=(1,), requests=30, words=7, rounds=1, roads=[road])
    assert road.asked["a"] == road.asked["b"] and len(set(road.asked["a"])) > 25
    for body in road.asked["a"]:
        assert len(json.loads(body)["inputs"]["text"].split()) == 7
    columns = {"q": {"type": "string"}, "choices": {"type": "array"}}
    row = json.loads(bodies_of(columns, 20)[0])["inputs"]
    assert len(row["q"].split()) == 20 and [len(c.split()) for c in row["choices"]] == [5] * 4


def test_a_million_requests_at_1000_a_second_take_1000_seconds() -> None:
    assert cost_of_a_million(3.6, 1_000.0) == pytest.approx(1.0)


@pytest.mark.parametrize("price", [math.nan, math.inf, 0.0, -1.0])
def test_a_price_is_a_number_above_0(price: float) -> None:
    with pytest.raises(RunError, match=f"--price {price}: must be a number above 0"):
        bench_serve(["a"], price=price, roads=[SlowRoad({"a": 0.0})])


def test_a_price_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "serve", "runs/sst2", "--price", "cheap"]) == 2
    said = capsys.readouterr().err
    assert "--price" in said and "valid number" in said and len(said.splitlines()) == 1


def test_a_model_that_stands_twice_is_refused() -> None:
    with pytest.raises(RunError, match="a, a: a model stands there twice"):
        bench_serve(["a", "a"], roads=[SlowRoad({"a": 0.0})])


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    HEADS["SequenceClassification"].from_config(tiny()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_real_server_and_a_real_handler_are_measured(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--clients", "1", "--clients", "4", "--requests", "20", "--rounds", "1", "--json"]
    command = ["bench", "serve", model, *words, "--road", "server", "--road", "handler"]
    assert cli.run(command) == 0
    loads = json.loads(capsys.readouterr().out)["loads"]
    found = [(load["road"], load["clients"], load["num_requests"]) for load in loads]
    assert found == [(road, n, 20) for n in (1, 4) for road in ("server", "handler")]


def test_a_handler_answers_and_says_why_it_ended(model: str) -> None:
    with roads.HandlerRoad().open(model) as door:
        assert door.columns == TEXT
        with door.line() as ask:
            ask(b'{"inputs": {"text": "the cat"}}')
            with pytest.raises(
                RunError, match=f"the handler of {model}: ValueError: .*has no column 'text'"
            ):
                ask(b'{"inputs": {"other": "the cat"}}')
            with pytest.raises(RunError, match=f"the handler of {model}: ValueError"):
                ask(b'{"inputs": {"text": "the cat"}}')  # it is gone
            with pytest.raises(RunError, match=f"the handler of {model}: ValueError"):
                ask(b'{"inputs": {"text": "the cat"}}')


def test_columns_are_those_of_the_task(tmp_path: Path) -> None:
    text, several = {"type": "string"}, {"type": "array"}
    for choices, of_choices in ((["a", "b"], {"a": text, "b": text}), (["all"], {"all": several})):
        file = tmp_path / "opfa.json"
        file.write_text(json.dumps({"text": "q", "text_pair": None, "choices": choices}))
        assert roads._columns(file) == {"q": text, **of_choices}


def test_a_server_that_ends_before_it_answers_is_told_by_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text(
        "#!/bin/sh\necho 'loading' >&2; echo 'no such model' >&2; exit 2\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(roads.sys, "executable", str(tmp_path / "python"))
    message = "^opfa serve nothing: no such model$"
    with pytest.raises(RunError, match=message), roads.ServerRoad().open("nothing"):
        pass
