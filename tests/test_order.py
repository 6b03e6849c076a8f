"""Data order: a function of (seed, epoch), whatever the ranks and micro-batches."""

from typing import Any

import numpy as np
import pytest

from opfa.order import MicroBatches, Order, Place, generator


def order(**changes: Any) -> Order:
    options: dict[str, Any] = {
        "seed": 7,
        "num_examples": 20,
        "batch": 8,
        "micro_batch": 8,
        "rank": 0,
        "world_size": 1,
    }
    return Order(**{**options, **changes})


def flat(steps: range, orders: Order) -> list[Place]:
    return [place for step in steps for part in orders.step(step) for place in part]


def test_each_epoch_is_a_permutation_of_all_examples() -> None:
    places = flat(range(10), order())  # 80 places: 4 epochs of 20
    for epoch in range(4):
        assert sorted(places[20 * epoch : 20 * epoch + 20]) == [(epoch, i) for i in range(20)]


def test_epochs_have_different_orders() -> None:
    places = flat(range(10), order())
    epochs = [[index for epoch, index in places if epoch == e] for e in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_another_seed_is_another_order() -> None:
    assert order(seed=8).step(0) != order().step(0)


def test_an_epoch_ends_within_a_batch() -> None:
    epochs = [epoch for part in order().step(2) for epoch, _ in part]
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 1]  # places 16 to 23 of 20


def test_a_batch_larger_than_the_data_reaches_over_several_epochs() -> None:
    (batch,) = order(num_examples=3, batch=8).step(0)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch[:3]) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("step", [0, 1, 2, 7])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_ranks_and_micro_batches_cut_the_same_global_batch(
    step: int, world_size: int, micro_batch: int
) -> None:
    ranks = [
        order(world_size=world_size, micro_batch=micro_batch, rank=rank).step(step)
        for rank in range(world_size)
    ]
    assert [place for rank in ranks for part in rank for place in part] == order().step(step)[0]
    assert {len(part) for rank in ranks for part in rank} == {micro_batch}
    assert {len(rank) for rank in ranks} == {8 // (world_size * micro_batch)}


def test_accumulation_is_the_number_of_micro_batches_of_a_rank() -> None:
    assert order(world_size=2, micro_batch=2).accumulation == 2


def test_micro_batches_of_later_steps_are_those_of_the_unbroken_run() -> None:
    orders = order(micro_batch=2)
    unbroken = list(MicroBatches(orders, range(6)))
    assert list(MicroBatches(orders, range(4, 6))) == unbroken[4 * 4 :]
    assert len(unbroken) == len(MicroBatches(orders, range(6))) == 24


def test_streams_are_philox_and_so_the_same_everywhere() -> None:
    # numpy promises that a named bit generator never changes; for `default_rng` it doesn't.
    raw = np.random.Philox(np.random.SeedSequence([7, 1, 2]))
    expected = [int(v) for v in raw.random_raw(3)]
    assert [int(v) for v in generator(7, 1, 2).bit_generator.random_raw(3)] == expected


@pytest.mark.parametrize("other", [(8, 1, 2), (7, 2, 1), (7, 1, 3), (7, 1)])
def test_other_numbers_are_another_stream(other: tuple[int, ...]) -> None:
    assert generator(*other).random() != generator(7, 1, 2).random()
