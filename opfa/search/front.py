"""A front: points that none other beats in every aim; how much it dominates; a few of it.

Points are tuples of costs and losses. All of them should be low.
"""

from collections.abc import Sequence

Values = Sequence[float]


def dominates(one: Values, other: Values) -> bool:
    """Whether a point is nowhere worse than another and somewhere better."""
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Values]) -> list[int]:
    """The numbers of the points that none dominates; of equal ones the first."""
    found = []
    for number, point in enumerate(points):
        is_second = any(tuple(point) == tuple(points[other]) for other in range(number))
        if not is_second and not any(dominates(other, point) for other in points):
            found.append(number)
    return found


def hypervolume(points: Sequence[Values], reference: Values) -> float:
    """How much of the box below `reference` points dominate: its area, or its volume.

    The last aim is cut where points begin; each slice's volume is that of the points up to there in
    the aims before (Zitzler 1999, by slicing objectives).
    """
    inside = [p for p in points if all(a < b for a, b in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in inside)
    inside.sort(key=lambda point: point[-1])
    ends = [*(point[-1] for point in inside[1:]), reference[-1]]
    return sum(
        (end - point[-1]) * hypervolume([p[:-1] for p in inside[:number]], reference[:-1])
        for number, (point, end) in enumerate(zip(inside, ends, strict=True), 1)
        if end > point[-1]
    )


def spread(num_points: int, num: int) -> list[int]:
    """The places of `num` points, or of all, spread evenly over a sorted front, both ends too."""
    num = min(num, num_points)
    if num <= 1:
        return [0][:num]
    return sorted({round(i * (num_points - 1) / (num - 1)) for i in range(num)})
