"""Data order: a function of (seed, epoch), whatever the ranks and micro-batches."""

from typing import Any

import numpy as np
import pytest

from opfa.data.order import MicroBatches, Order, Place, generator


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


def lengths(num_examples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 129, size=num_examples)


def grouped(num_examples: int = 1000, **changes: Any) -> Order:
    return order(num_examples=num_examples, lengths=lengths(num_examples), **changes)


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


# grouped by length


@pytest.mark.parametrize(("size", "batch"), [(1000, 8), (20, 8), (37, 8), (8, 8), (7, 8), (3, 8)])
def test_each_grouped_epoch_is_a_permutation_of_all_examples(size: int, batch: int) -> None:
    places = flat(range(4 * size // batch), grouped(size, batch=batch))
    for epoch in range(len(places) // size):
        part = places[size * epoch : size * (epoch + 1)]
        assert sorted(part) == [(epoch, i) for i in range(size)]


def test_a_grouped_order_is_a_function_of_seed_and_epoch() -> None:
    orders = grouped(100)
    unbroken = [orders.step(step) for step in range(60)]
    backwards = [orders.step(step) for step in reversed(range(60))][::-1]
    assert unbroken == backwards == [grouped(100).step(step) for step in range(60)]


def test_grouped_epochs_and_seeds_have_different_orders() -> None:
    size = 104
    epochs = [
        tuple(index for _, index in flat(range(13 * epoch, 13 * epoch + 13), orders))
        for orders in (grouped(size), grouped(size, seed=8))
        for epoch in range(3)
    ]
    assert len(set(epochs)) == 6


@pytest.mark.parametrize("step", [0, 1, 7, 12, 13, 130])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 4), (2, 2), (8, 1)])
def test_ranks_and_micro_batches_cut_the_same_grouped_batch(
    step: int, world_size: int, micro_batch: int
) -> None:
    ranks = [
        grouped(100, world_size=world_size, micro_batch=micro_batch, rank=rank).step(step)
        for rank in range(world_size)
    ]
    together = [place for rank in ranks for part in rank for place in part]
    assert together == grouped(100).step(step)[0]


def padding(orders: Order, steps: range, num_examples: int) -> float:
    """The share of all tokens in batches that is padding, if each is padded to its longest."""
    sizes, real, total = lengths(num_examples), 0, 0
    for step in steps:
        for part in orders.step(step):
            found = sizes[[index for _, index in part]]
            real, total = real + found.sum(), total + found.max() * len(part)
    return 1 - real / total


def test_grouping_leaves_little_padding() -> None:
    plain = padding(order(num_examples=4000, batch=16, micro_batch=16), range(250), 4000)
    found = padding(grouped(4000, batch=16, micro_batch=16), range(250), 4000)
    assert plain > 0.35 and found < 0.05


def test_every_step_of_later_epochs_is_grouped_too() -> None:
    # 1001 examples: epochs begin within a batch, and only that one mixes lengths.
    orders, sizes = grouped(1001), lengths(1001)
    for step in range(126, 876):  # epochs 1 to 6
        places = orders.step(step)[0]
        if len({epoch for epoch, _ in places}) == 1:
            found = sizes[[index for _, index in places]]
            assert found.max() - found.min() <= 40
    spreads = [np.ptp(sizes[[i for _, i in orders.step(step)[0]]]) for step in range(126, 876)]
    assert sum(spread > 40 for spread in spreads) <= 7


def test_the_first_places_of_an_epoch_finish_the_batch_that_the_last_one_began() -> None:
    orders, sizes = grouped(1001), lengths(1001)
    epochs, found = zip(*orders.step(125)[0], strict=True)
    assert epochs == (0, 1, 1, 1, 1, 1, 1, 1)
    plain = generator(7, 1, 1).permutation(1001)  # these are drawn at random
    assert list(found[1:]) == plain[:7].tolist()
    assert np.ptp(sizes[list(found)]) > 40


def test_batches_of_an_epoch_come_in_random_order_of_their_length() -> None:
    sizes, orders = lengths(8000), grouped(8000)
    means = np.array([sizes[[i for _, i in orders.step(s)[0]]].mean() for s in range(1000)])
    correlation = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(1000)


def test_batches_are_grouped_anew_in_every_epoch() -> None:
    orders = grouped(800)
    first, second = (
        {frozenset(i for _, i in orders.step(step)[0]) for step in range(start, start + 100)}
        for start in (0, 100)
    )
    assert len(first) == len(second) == 100
    assert not first & second


@pytest.mark.parametrize("num_lengths", [1, 3])
def test_examples_of_equal_length_stay_in_the_permutations_order(num_lengths: int) -> None:
    sizes = np.arange(800) % num_lengths
    plain = [index for _, index in flat(range(100), order(num_examples=800))]
    runs = [plain[start : start + 25 * 8] for start in range(0, 800, 25 * 8)]  # a quarter each
    joined = [index for run in runs for index in sorted(run, key=lambda i: sizes[i])]
    expected = {tuple(joined[start : start + 8]) for start in range(0, 800, 8)}
    orders = order(num_examples=800, lengths=sizes)
    assert {tuple(i for _, i in orders.step(step)[0]) for step in range(100)} == expected


def test_runs_that_are_sorted_have_no_more_than_50_batches() -> None:
    sizes = np.arange(8 * 400)  # all different
    plain = generator(7, 1, 0).permutation(8 * 400)
    runs = {frozenset(plain[start : start + 400].tolist()) for start in range(0, 3200, 400)}
    orders = order(num_examples=3200, lengths=sizes)
    for step in range(400):
        batch = {i for _, i in orders.step(step)[0]}
        assert sum(batch <= run for run in runs) == 1


def test_a_grouped_batch_larger_than_the_data_reaches_over_several_epochs() -> None:
    (batch,) = grouped(3).step(0)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch[:3]) == [(0, 0), (0, 1), (0, 2)]


def test_lengths_are_not_changed() -> None:
    sizes = lengths(100)
    order(num_examples=100, lengths=sizes).step(3)
    assert np.array_equal(sizes, lengths(100))


# random streams


def test_streams_are_philox_and_so_the_same_everywhere() -> None:
    # numpy promises that a named bit generator never changes; for `default_rng` it doesn't.
    raw = np.random.Philox(np.random.SeedSequence([7, 1, 2]))
    expected = [int(v) for v in raw.random_raw(3)]
    assert [int(v) for v in generator(7, 1, 2).bit_generator.random_raw(3)] == expected


@pytest.mark.parametrize("other", [(8, 1, 2), (7, 2, 1), (7, 1, 3), (7, 1)])
def test_other_numbers_are_another_stream(other: tuple[int, ...]) -> None:
    assert generator(*other).random() != generator(7, 1, 2).random()
