"""What chose a model's zeros: scores and their numbers, as `sparsity.json` keeps them.

A run notes the scores that it prunes by, and passes on what its beginning says where it holds those
zeros. A model without a note was made by others or before there were notes: then nothing is said.
"""

from collections.abc import Iterable, Mapping

KEY = "chosen_by"  # in sparsity.json
Value = str | int | float | bool
Chosen = Mapping[str, Value]  # `kind`, and its numbers


def noted(found: Iterable[Chosen]) -> dict[str, list[Chosen]]:
    """What is added to a sparsity report; nothing where nothing is known. Parts may agree."""
    different: list[Chosen] = []
    for each in found:
        if each not in different:
            different.append(each)
    return {KEY: different} if different else {}


def in_words(found: Iterable[Chosen]) -> str:
    """Such as "curvature (sequences 384, decay 0)", with several parts between semicolons."""
    return "; ".join(map(_one, found))


def _one(chosen: Chosen) -> str:
    numbers = [f"{key} {_shown(value)}" for key, value in chosen.items() if key != "kind"]
    return f"{chosen['kind']} ({', '.join(numbers)})" if numbers else str(chosen["kind"])


def _shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
