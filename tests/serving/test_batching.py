"""The queue before a model: who is computed when, and what comes back to whom."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from opfa.serving.batching import LONGEST_RETRY, Batcher, FullError, Row
from opfa.tasks.predictions import NumberPrediction, Prediction


class Doubling:
    """A model that doubles numbers, and remembers its batches; it waits while it is held."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, rows: Sequence[Row]) -> Sequence[Prediction]:
        assert self.free.wait(10)
        numbers = [row["n"] for _, row in rows]
        self.batches.append(numbers)
        if -1 in numbers:
            raise ValueError("a number below 0")
        return [NumberPrediction(prediction=2 * number) for number in numbers]


def rows(*numbers: int) -> list[Row]:
    return [(f"[{index}]", {"n": number}) for index, number in enumerate(numbers)]


def run(play: Any, model: Doubling | None = None, **options: Any) -> Any:
    """Play a scene with a batcher that runs."""

    async def scene() -> Any:
        chosen = {"batch": 4, "wait_seconds": 0.0, "room": 100, **options}
        batcher = Batcher(model or Doubling(), **chosen)
        running = asyncio.create_task(batcher.run())
        try:
            async with asyncio.timeout(20):
                return await play(batcher)
        finally:
            running.cancel()

    return asyncio.run(scene())


def numbers(predictions: Sequence[Prediction]) -> list[float]:
    return [one.prediction for one in predictions]


def test_requests_of_any_size_get_their_own_answers_in_order() -> None:
    model = Doubling()

    async def play(batcher: Batcher) -> Any:
        sizes = [1, 3, 9, 2, 4, 0, 7]
        start, asked = 0, []
        for size in sizes:
            asked.append(list(range(start, start + size)))
            start += size
        futures = [batcher.put(rows(*some)) for some in asked if some]
        found = [numbers(await future) for future in futures]
        assert found == [[2 * number for number in some] for some in asked if some]
        assert batcher.num_waiting == 0

    run(play, model)
    assert max(map(len, model.batches)) == 4
    assert sorted(sum(model.batches, [])) == list(range(26))


def test_a_large_request_lets_others_pass() -> None:
    model = Doubling()
    model.free.clear()

    async def play(batcher: Batcher) -> None:
        large, small = batcher.put(rows(*range(20))), batcher.put(rows(50, 51))
        await asyncio.sleep(0.05)
        model.free.set()
        assert numbers(await small) == [100, 102]
        assert not large.done()
        assert numbers(await large) == list(range(0, 40, 2))

    run(play, model)
    assert model.batches[:2] == [[0, 1, 2, 3], [50, 51, 4, 5]]


def test_a_batch_waits_for_more_but_no_longer_than_told() -> None:
    model = Doubling()

    async def play(batcher: Batcher) -> None:
        first = batcher.put(rows(1))
        await asyncio.sleep(0.02)
        second = batcher.put(rows(2))
        await first
        assert second.done()
        loop = asyncio.get_running_loop()
        start = loop.time()
        full = [batcher.put(rows(number)) for number in range(4)]
        await asyncio.gather(*full)
        assert loop.time() - start < 0.25  # a full batch waits for nobody
        await batcher.put(rows(9))
        assert loop.time() - start > 0.25

    run(play, model, wait_seconds=0.3)
    assert model.batches == [[1, 2], [0, 1, 2, 3], [9]]


def test_a_wrong_request_fails_alone() -> None:
    async def play(batcher: Batcher) -> None:
        asked = [batcher.put(rows(*some)) for some in ([1], [2, -1, 3, 4, 5, 6], [7])]
        with pytest.raises(ValueError, match="below 0"):
            await asked[1]
        assert [numbers(await asked[i]) for i in (0, 2)] == [[2], [14]]
        assert batcher.num_waiting == 0
        assert numbers(await batcher.put(rows(8))) == [16]

    model = Doubling()
    run(play, model, wait_seconds=0.01)
    assert [6] not in model.batches  # what is left of a request that failed isn't computed


def test_a_full_queue_takes_nothing_and_frees_what_is_taken_back() -> None:
    model = Doubling()
    model.free.clear()

    async def play(batcher: Batcher) -> None:
        inside = batcher.put(rows(0))
        await asyncio.sleep(0.05)
        waiting = [batcher.put(rows(1, 2)), batcher.put(rows(3))]
        with pytest.raises(FullError) as full:
            batcher.put(rows(4))
        assert full.value.retry_seconds == 1
        waiting[0].cancel()
        await asyncio.sleep(0)
        later = batcher.put(rows(5, 6))
        inside.cancel()  # in the model already, so only its answer is dropped
        model.free.set()
        assert [numbers(await one) for one in (waiting[1], later)] == [[6], [10, 12]]
        assert batcher.num_waiting == 0

    run(play, model, room=3)
    assert model.batches == [[0], [3, 5, 6]]


def test_the_time_to_come_back_grows_with_the_queue() -> None:
    batcher = Batcher(lambda _: [], batch=4, wait_seconds=0.0, room=50)
    batcher.num_waiting = 50

    def told(pace: float) -> int:
        batcher._pace = pace
        with pytest.raises(FullError) as full:
            batcher.put(rows(1))
        return full.value.retry_seconds

    assert [told(pace) for pace in (0.0, 0.001, 0.2, 0.21, 99.0)] == [1, 1, 10, 11, LONGEST_RETRY]
