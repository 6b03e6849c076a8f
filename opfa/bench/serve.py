"""Benchmark of serving: what a request takes on each road, for several models and clients.

Clients work in a closed circle: each sends its next request when it has the answer to the last one.
All models are loaded before, and take turns, because the machine is another one a minute later.
Texts are random common words, the same for all models.

    cost of a million requests = price of an hour / (3600 * requests a second) * 10^6
"""

import contextlib
import json
import logging
import math
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from opfa.bench.roads import Columns, Door, Road, ServerRoad
from opfa.errors import RunError
from opfa.report.tables import Result, Row, Table, column
from opfa.training.machine import environment

HOUR = 3600  # seconds
MILLION = 10**6
TEXTS = 256  # different ones
CHOICES = 4
COMMON = (
    "the of and to in is was he for it with as his on be at by had are but from or have they which "
    "one you were her all she there would their we him been has when who will more no if out so "
    "said what up its about into than them can only other new some could time these two may then "
    "first any my now such like our over man me even most made after also did many before must "
    "through back years where much your way well down should because each just those people how "
    "little state good very make world still own see men work long get here between both life being"
)
log = logging.getLogger(__name__)


class Load(Row):
    """One model on one road under so many clients."""

    clients: int = column("clients", ",")
    p50_ms: float = column("p50, ms", ".2f")
    p95_ms: float = column("p95, ms", ".2f")
    requests_per_second: float = column("requests/s", ",.1f")  # the median of rounds
    cost: float | None = column("cost of a million", ",.4g", default=None)  # in the price's money
    model: str
    road: str
    num_requests: int
    rounds: list[float]  # requests a second in each


class Serving(Result):
    """What `opfa bench serve` finds."""

    machine: dict[str, Any]  # Any: as a run's environment.json has it
    words: int  # of a text
    price: float | None  # of an hour
    loads: list[Load]

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """One line for each model, road and number of clients."""
        machine = f"{self.machine['processor']}, {self.machine['processors']} processors"
        yield f"requests of one text of {self.words} words; {machine}:"
        rows = {f"{load.model}, {load.road}, {load.clients}": load for load in self.loads}
        table = Table.of("", rows)
        kept = len(table.head) - (self.price is None)
        lines = [
            (load.model, load.road, *line[1:kept])
            for load, line in zip(self.loads, table.rows, strict=True)
        ]
        yield Table(("model", "road", *table.head[1:kept]), lines, numbers_from=2)
        if self.price is not None:
            yield f"cost of a million requests, where an hour of the machine costs {self.price:g}"


def bench_serve(
    models: Sequence[str],
    *,
    clients: Sequence[int] = (1, 16),
    requests: int = 1_000,
    words: int = 24,
    rounds: int = 3,
    price: float | None = None,
    roads: Sequence[Road] = (ServerRoad(),),
) -> Serving:
    """Load models on every road with so many clients at once, and say what a request takes.

    Each model gets `requests` requests in every round, for each number of clients. `price` is what
    an hour of this machine costs. Raises `RunError` for a model that can't be served.
    """
    if price is not None and not (math.isfinite(price) and price > 0):
        raise RunError(f"--price {price}: must be a number above 0, the price of an hour")
    names = [(model, road) for road in roads for model in models]
    if len(set(models)) < len(models):
        raise RunError(f"{', '.join(models)}: a model stands there twice")
    seconds: dict[tuple[str, str, int], list[float]] = {}
    rates: dict[tuple[str, str, int], list[float]] = {}
    with contextlib.ExitStack() as open_doors:
        doors = {}
        for model, road in names:
            log.info("loading %s (%s)", model, road.name)
            doors[model, road.name] = open_doors.enter_context(road.open(model))
        bodies = {key: bodies_of(door.columns, words) for key, door in doors.items()}
        for number in range(rounds):
            log.info("round %d of %d", number + 1, rounds)
            for num_clients in clients:
                for (model, name), door in doors.items():
                    key = (model, name, num_clients)
                    _load(door, bodies[model, name], num_clients, num_clients)  # not counted
                    took, elapsed = _load(door, bodies[model, name], num_clients, requests)
                    seconds.setdefault(key, []).extend(took)
                    rates.setdefault(key, []).append(len(took) / elapsed)
    loads = [_summed(key, seconds[key], rates[key], price) for key in sorted(seconds, key=_order)]
    machine = environment()["machine"]
    return Serving(machine=machine, words=words, price=price, loads=loads)


def _order(key: tuple[str, str, int]) -> int:
    return key[2]  # the rest stays as it was given


def _summed(
    key: tuple[str, str, int], seconds: Sequence[float], rates: Sequence[float], price: float | None
) -> Load:
    model, road, num_clients = key
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    rate = statistics.median(rates)
    return Load(
        model=model,
        road=road,
        clients=num_clients,
        p50_ms=1e3 * cuts[9],
        p95_ms=1e3 * cuts[18],
        requests_per_second=rate,
        cost=None if price is None else cost_of_a_million(price, rate),
        num_requests=len(seconds),
        rounds=list(rates),
    )


def cost_of_a_million(price: float, requests_per_second: float) -> float:
    """What a million requests cost, in the money of the price of an hour."""
    return price / (HOUR * requests_per_second) * MILLION


def bodies_of(columns: Columns, words: int) -> list[bytes]:
    """Bodies with random texts of so many words, the same each time, for a row's columns."""
    numbers, common = random.Random(0), COMMON.split()

    def text(num: int) -> str:
        return " ".join(numbers.choices(common, k=num))

    def value(schema: Any) -> Any:  # Any: JSON
        if schema.get("type") == "array":
            return [text(max(1, words // CHOICES)) for _ in range(CHOICES)]
        return text(words)  # words for tags too: a text is cut at its blanks

    rows = [{name: value(schema) for name, schema in columns.items()} for _ in range(TEXTS)]
    return [json.dumps({"inputs": row}).encode() for row in rows]


def _load(
    door: Door, bodies: Sequence[bytes], num_clients: int, num_requests: int
) -> tuple[list[float], float]:
    """Seconds of each request, and of all together, the clients at work at the same time."""
    took: list[float] = []
    failed: list[RunError] = []

    def work(first: int) -> None:
        try:
            with door.line() as ask:
                for index in range(first, num_requests, num_clients):
                    begin = time.perf_counter()
                    ask(bodies[index % len(bodies)])
                    took.append(time.perf_counter() - begin)
        except RunError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(num_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    if failed:
        raise failed[0]
    return took, elapsed
