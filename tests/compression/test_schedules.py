"""Schedules against values written out by hand."""

import pytest
from pydantic import ValidationError

from opfa.compression.schedules import Gradual, LearningRate, Ramp, in_steps


def updates(schedule: Gradual, until: int) -> list[int]:
    return [step for step in range(until + 1) if schedule.is_update(step)]


# sparsity


def test_sparsity_half_way_is_seven_eighths_of_the_target() -> None:
    assert Gradual(start=0, end=20, target=0.5).sparsity_at(10) == 0.4375


def test_the_ramp_is_cubic_from_initial_to_target() -> None:
    schedule = Gradual(start=10, end=14, initial=0.1, target=0.9)
    # 0.9 - 0.8 * (1, 27/64, 1/8, 1/64, 0)
    expected = [0.1, 0.5625, 0.8, 0.8875, 0.9]
    assert [schedule.sparsity_at(step) for step in range(10, 15)] == pytest.approx(expected)


def test_there_is_no_sparsity_before_the_start() -> None:
    assert Gradual(start=10, end=14, initial=0.1, target=0.9).sparsity_at(9) == 0.0


def test_the_target_is_exact_from_the_end_on() -> None:
    schedule = Gradual(start=0, end=3, target=0.9)
    assert [schedule.sparsity_at(step) for step in (3, 4, 10**9)] == [0.9, 0.9, 0.9]


def test_sparsity_never_falls() -> None:
    schedule = Gradual(start=3, end=97, initial=0.05, target=0.85, hold_until=120)
    values = [schedule.sparsity_at(step) for step in range(130)]
    assert values == sorted(values)


# mask updates


def test_updates_are_every_n_steps_from_the_start() -> None:
    assert updates(Gradual(start=2, end=8, every=3, target=0.5), 20) == [2, 5, 8]


def test_the_end_of_the_ramp_is_always_an_update() -> None:
    assert updates(Gradual(start=0, end=10, every=4, target=0.5), 20) == [0, 4, 8, 10]


def test_updates_go_on_until_hold_until_and_then_stop() -> None:
    schedule = Gradual(start=0, end=5, hold_until=11, every=4, target=0.5)
    assert updates(schedule, 30) == [0, 4, 5, 8, 11]


def test_an_interval_longer_than_the_ramp_still_reaches_the_target() -> None:
    assert updates(Gradual(start=1, end=3, every=100, target=0.5), 200) == [1, 3]


def test_start_equal_to_end_prunes_in_one_shot() -> None:
    schedule = Gradual(start=7, end=7, target=0.9)
    assert updates(schedule, 20) == [7]
    assert [schedule.sparsity_at(step) for step in (6, 7, 8)] == [0.0, 0.9, 0.9]


def test_one_shot_at_zero_prunes_before_the_first_step() -> None:
    assert updates(Gradual(end=0, target=0.9), 20) == [0]


def test_the_first_step_has_exactly_the_initial_sparsity() -> None:
    for initial, target in [(i / 100, t / 100) for i in range(100) for t in range(i, 100)]:
        schedule = Gradual(start=3, end=9, initial=initial, target=target)
        found = [schedule.sparsity_at(step) for step in (2, 3, 9)]
        assert found == [0.0, initial, target]


def test_the_newest_ramp_update_is_one_that_happened() -> None:
    schedule = Gradual(start=2, end=9, hold_until=20, every=3, target=0.5)
    newest = [schedule.last_ramp_update(step) for step in range(12)]
    assert newest == [None, None, 2, 2, 2, 5, 5, 5, 8, 9, 9, 9]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": 9, "end": 3, "target": 0.5}, "end = 3: the ramp must not end before start = 9"),
        ({"end": 3, "hold_until": 2, "target": 0.5}, "hold_until = 2: the last mask update"),
        ({"end": 3, "target": 1.0}, "less than 1"),
        ({"end": 3, "target": -0.5}, "greater than or equal to 0"),
        ({"end": 3, "target": 0.2, "initial": 0.3}, "target = 0.2: must not be below initial"),
        ({"start": -1, "end": 3, "target": 0.5}, "greater than or equal to 0"),
    ],
)
def test_an_impossible_schedule_fails_at_construction(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gradual(**values)


# learning rate


def rates(schedule: LearningRate) -> list[float]:
    return [schedule.at(step) for step in range(schedule.steps + 1)]


def test_the_rate_warms_up_and_falls_linearly_to_zero() -> None:
    expected = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(LearningRate(peak=1.0, warmup_steps=2, steps=6)) == expected


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(LearningRate(peak=3.0, warmup_steps=0, steps=3)) == [3.0, 2.0, 1.0, 0.0]


def test_each_mask_update_of_the_ramp_rewinds_the_rate() -> None:
    ramp = Gradual(start=0, end=4, every=2, hold_until=6, target=0.5)
    schedule = LearningRate(peak=1.0, warmup_steps=0, steps=8, rewind_at=ramp)
    # Updates after 0, 2, 4 steps start the decay anew; the one at 6 is past the ramp.
    expected = [1, 7 / 8, 1, 5 / 6, 1, 3 / 4, 2 / 4, 1 / 4, 0]
    assert rates(schedule) == pytest.approx(expected)


def test_an_update_during_warm_up_does_not_rewind() -> None:
    ramp = Gradual(start=1, end=5, every=2, target=0.5)
    schedule = LearningRate(peak=1.0, warmup_steps=4, steps=9, rewind_at=ramp)
    # 3 lies in the warm-up, so the decay begins at 4; then 5 rewinds it.
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(schedule) == pytest.approx(expected)


def test_the_rate_falls_to_the_lowest_where_there_is_one() -> None:
    schedule = LearningRate(peak=5.0, lowest=1.0, warmup_steps=1, steps=5)
    assert rates(schedule) == [5.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_a_cycle_ends_at_the_lowest_rate_just_before_the_next_mask_update() -> None:
    ramp = Gradual(start=0, end=6, every=3, hold_until=8, initial=0.7, target=0.9)
    schedule = LearningRate(
        peak=5.0, lowest=1.0, warmup_steps=0, steps=11, rewind_at=ramp, is_cyclic=True
    )
    # Updates after 0, 3 and 6 steps; the one at 8 is past the ramp. Each cycle's last step has 1.
    expected = [5, 3, 1, 5, 3, 1, 5, 4, 3, 2, 1]
    assert schedule.rates() == expected


def test_before_the_ramp_there_is_a_cycle_of_its_own_and_its_end_is_an_update_too() -> None:
    ramp = Gradual(start=4, end=7, every=2, target=0.9)
    schedule = LearningRate(peak=3.0, warmup_steps=1, steps=9, rewind_at=ramp, is_cyclic=True)
    # Warm-up, down until 4; 4 and 5; 6 alone, since the ramp ends at 7; then 7 and 8.
    assert schedule.rates() == [3.0, 3.0, 1.5, 0.0, 3.0, 0.0, 3.0, 3.0, 0.0]


def test_twelve_cycles_of_the_optimal_bert_surgeon() -> None:
    # 3epochs_unstructured90_mlm.yaml: updates every quarter epoch from 0 to 2.75, of 3 epochs
    ramp = Gradual(start=0, end=1100, every=100, initial=0.7, target=0.9)
    schedule = LearningRate(
        peak=5e-4, lowest=5e-6, warmup_steps=0, steps=1200, rewind_at=ramp, is_cyclic=True
    )
    cycle = [5e-4 - step % 100 / 99 * (5e-4 - 5e-6) for step in range(1200)]  # its formula
    assert schedule.rates() == pytest.approx(cycle, rel=1e-12)
    sparsities = [ramp.sparsity_at(step) for step in range(0, 1200, 100)]
    assert len(sparsities) == 12 and sparsities[0] == 0.7 and sparsities[-1] == 0.9
    assert sparsities[1] == pytest.approx(0.9 - 0.2 * (10 / 11) ** 3)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_the_next_update_of_the_ramp_is_the_first_one_later(start: int, every: int) -> None:
    schedule = Gradual(start=start, end=11, hold_until=20, every=every, target=0.5)
    own = [step for step in updates(schedule, 20) if step <= 11]
    for step in range(25):
        later = [update for update in own if update > step]
        assert schedule.next_ramp_update(step) == (later[0] if later else None)


def test_a_ramp_that_starts_late_leaves_the_rate_alone_until_then() -> None:
    ramp = Gradual(start=2, end=3, target=0.5)
    rewound = LearningRate(peak=1.0, warmup_steps=0, steps=4, rewind_at=ramp)
    assert rates(rewound) == [1.0, 0.75, 1.0, 1.0, 0.0]


# shares of a run


def test_an_integer_is_steps_and_a_number_with_a_point_a_share() -> None:
    found = [in_steps(value, 200) for value in (0, 1, 7, 0.0, 0.29, 0.5, 1.0)]
    assert found == [0, 1, 7, 0, 58, 100, 200]  # 0.29 * 200 is 57.99999999999999


def test_an_interval_is_a_step_at_least() -> None:
    assert [in_steps(value, 3, 1) for value in (2, 0.01, 0.5, 1.0)] == [2, 1, 2, 3]


def test_steps_stay_what_they_are_over_any_run() -> None:
    given = {"start": 3, "end": 9, "hold_until": 12, "every": 2, "initial": 0.1, "target": 0.5}
    assert all(Ramp(**given).over(steps) == Gradual(**given) for steps in (1, 9, 1000))


def test_shares_and_steps_may_stand_together() -> None:
    ramp = Ramp(start=5, end=0.5, hold_until=1.0, every=0.1, target=0.9)
    wanted = Gradual(start=5, end=50, hold_until=100, every=10, target=0.9)
    assert ramp.over(100) == wanted
    with pytest.raises(
        ValueError, match=r"end = 4: .* start = 5, of 8 steps \(start = 5, end = 0.5"
    ):
        ramp.over(8)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 4800])
def test_shares_in_order_are_in_order_over_any_run(steps: int) -> None:
    shares = [index / 40 for index in range(41)]
    for start, end in [(s, e) for s in shares for e in shares if s <= e]:
        found = Ramp(start=start, end=end, hold_until=1.0, target=0.5).over(steps)
        assert found.start <= found.end <= found.last_update == steps
