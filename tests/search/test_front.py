"""Fronts and hypervolumes against counting every cell of a grid."""

import itertools

import numpy as np
import pytest

from opfa.search.front import dominates, front, hypervolume, spread

RANDOM = np.random.default_rng(0)


def cells(points: np.ndarray, reference: tuple[int, ...]) -> int:
    """Unit cells of the box below the reference whose lower corner some point dominates."""
    corners = np.array(list(itertools.product(*map(range, reference))))
    return int(sum(any((corner >= point).all() for point in points) for corner in corners))


@pytest.mark.parametrize("num_aims", [1, 2, 3])
@pytest.mark.parametrize("num_points", [0, 1, 5, 30])
def test_the_hypervolume_is_the_number_of_dominated_cells(num_aims: int, num_points: int) -> None:
    reference = (9, 7, 5)[:num_aims]
    for _ in range(20):  # ties, and points beyond the reference, are among them
        points = RANDOM.integers(0, 10, (num_points, num_aims))
        assert hypervolume(points.tolist(), reference) == cells(points, reference)


def test_a_point_on_the_edge_of_the_box_adds_nothing() -> None:
    assert hypervolume([(0.0, 1.0), (1.0, 0.0)], (1.0, 1.0)) == 0.0
    assert hypervolume([(0.25, 0.5)], (1.0, 1.0)) == 0.375


def test_the_front_is_what_no_other_point_dominates() -> None:
    for _ in range(30):
        points = [tuple(point) for point in RANDOM.integers(0, 6, (25, 2)).tolist()]
        found = front(points)
        assert {points[i] for i in found} == {
            one for one in points if not any(dominates(other, one) for other in points)
        }
        assert len({points[i] for i in found}) == len(found)
        assert all(points.index(points[i]) == i for i in found)  # of equal ones the first


def test_a_point_dominates_what_is_nowhere_better() -> None:
    assert dominates((1, 2), (1, 3)) and dominates((0, 0), (1, 1))
    assert not dominates((1, 2), (1, 2)) and not dominates((0, 3), (1, 2))


@pytest.mark.parametrize(
    ("points", "num", "expected"),
    [
        (9, 3, [0, 4, 8]),
        (9, 1, [0]),
        (2, 5, [0, 1]),
        (9, 0, []),
        (0, 2, []),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_points_are_spread_over_the_front(points: int, num: int, expected: list[int]) -> None:
    assert spread(points, num) == expected
