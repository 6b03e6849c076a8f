"""Evaluations by optuna: what is tried depends on the seed alone, whatever interrupts it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from opfa.search.recipe import Search
from opfa.search.recipe import Space as Settings
from opfa.search.shapes import Shape, Space
from opfa.search.study import JOURNAL, Evaluation, Study

SPACE = Space((4, 4), (64, 64), 1, Settings(neuron_steps=8))
SEEDS = [SPACE.whole, SPACE.least]


class StoppedError(Exception):
    pass


def settings(**search: Any) -> Search:
    return Search(
        **{
            "evaluations": 16,
            "population": 5,
            "seeds": 2,
            "aims": ("macs",),
            "even": False,
            **search,
        }
    )


def judged(place: int, shape: Shape) -> Evaluation:
    """More units answer better and cost more; some layers matter more than others."""
    share = sum(
        (2 - i) * (h + n / 16) for i, (h, n) in enumerate(zip(*shape_of(shape), strict=True))
    )
    costs: Mapping[Any, float] = {"macs": float(sum(shape.groups))}
    return Evaluation(
        place, shape, {"accuracy": round(share, 3)}, costs, {"macs": costs["macs"] - 40}
    )


def shape_of(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shape.heads, shape.neurons


def run(
    directory: Path, search: Search, stop_after: int | None = None, seed: int = 1
) -> list[Shape]:
    """All shapes by their places; stops after so many were told, as if it was killed."""
    study, told = Study(directory, search, SPACE, SEEDS[: search.seeds], seed), 0
    for generation in study.generations():
        for asked in generation:
            if told == stop_after:
                raise StoppedError
            study.tell(asked, judged(asked.place, asked.shape), "accuracy")
            told += 1
    done = study.done()
    assert not study._study.get_trials(states=(TrialState.RUNNING,))
    assert sorted(done) == list(range(len(done)))
    return [done[place][0] for place in range(len(done))]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Shape]:
    return run(tmp_path_factory.mktemp("unbroken"), settings())


@pytest.mark.parametrize("stop_after", [0, 4, 5, 12])
def test_an_interrupted_search_tries_what_an_unbroken_one_does(
    unbroken: list[Shape], stop_after: int, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        run(tmp_path, settings(), stop_after)
    with pytest.raises(StoppedError):
        run(tmp_path, settings(), 3)  # and again
    assert run(tmp_path, settings()) == unbroken


def test_a_search_killed_while_it_asks_goes_on(unbroken: list[Shape], tmp_path: Path) -> None:
    """Whatever the last line is that came onto the disk, half a line and a lock included."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    assert run(whole, settings()) == unbroken
    lines = (whole / JOURNAL).read_bytes().splitlines(keepends=True)
    for number in range(2, len(lines), len(lines) // 4):
        part.mkdir(exist_ok=True)
        (part / JOURNAL).write_bytes(b"".join(lines[:number]) + lines[number][:7])
        (part / f"{JOURNAL}.lock").unlink(missing_ok=True)
        (part / f"{JOURNAL}.lock").symlink_to(JOURNAL)
        assert run(part, settings()) == unbroken, number


def test_no_shape_is_judged_twice(unbroken: list[Shape]) -> None:
    assert len(set(unbroken)) == len(unbroken) == 16
    assert unbroken[:2] == SEEDS


def test_more_evaluations_begin_with_the_same_ones(unbroken: list[Shape], tmp_path: Path) -> None:
    first = run(tmp_path, settings(evaluations=8))
    assert first == unbroken[:8]
    assert run(tmp_path, settings()) == unbroken


def test_another_seed_tries_others(unbroken: list[Shape], tmp_path: Path) -> None:
    assert run(tmp_path, settings(), seed=2)[2:] != unbroken[2:]


def test_a_small_space_ends_before_all_evaluations(tmp_path: Path) -> None:
    space = Space((1, 1), (4, 4), 1, Settings(neuron_steps=0, layers=False))
    study = Study(tmp_path, settings(), space, [], 1)
    for generation in study.generations():
        for asked in generation:
            study.tell(asked, judged(asked.place, asked.shape), "accuracy")
    assert len(study.done()) == space.size == 4 and study.is_exhausted


def test_later_generations_have_more_that_keeps_to_the_limit_than_random_ones(
    tmp_path: Path,
) -> None:
    found = {}
    for sampler in ("nsga2", "random"):
        (tmp_path / sampler).mkdir()
        search = settings(sampler=sampler, evaluations=40, seeds=0)
        shapes = run(tmp_path / sampler, search)
        found[sampler] = sum(judged(0, shape).is_feasible for shape in shapes[20:])
    assert found["nsga2"] > found["random"]
