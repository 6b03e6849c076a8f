"""Whether this process is one of several, by the variables that launchers set.

A launch is `opfa pretrain` with WORLD_SIZE above 1. Pods and schedulers set RANK for purposes of
their own: without WORLD_SIZE above 1 it means nothing here.
"""

import os
from typing import NamedTuple

from opfa.errors import RunError

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what no launch can do without
VARIABLES = (*MEETING, "LOCAL_RANK")
LONGEST = 10  # digits of a number of processes
ALONE = "to run one process alone, unset WORLD_SIZE"


class Place(NamedTuple):
    """The ranks of this process: among all of its launch, and on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """This process's place; raises `RunError` where the variables contradict each other."""
    size = _number("WORLD_SIZE", "1")
    if size == 1:
        return Place()
    rank = _number("RANK", "")
    if size < 1 or not 0 <= rank < size:
        raise RunError(f"RANK = {rank}, WORLD_SIZE = {size}: no place in a launch; {ALONE}")
    return Place(rank, size, _number("LOCAL_RANK", "0"))


def has_rendezvous() -> bool:
    """Whether a launcher says where the processes meet, be it one process alone."""
    is_told = all(os.environ.get(name) for name in MEETING)
    return place().world_size > 1 or (is_told and os.environ["RANK"].strip() == "0")


def check_rendezvous() -> None:
    """Refuse a launch whose processes can't find each other."""
    missing = [name for name in MEETING if not os.environ.get(name)]
    if place().world_size > 1 and missing:
        raise RunError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: and {missing[0]} is not set, so this was no "
            f"launcher; use one of launch/, or {ALONE}"
        )


def refuse_several(command: str) -> None:
    """Refuse a command that uses one process when it was started as several."""
    size = os.environ.get("WORLD_SIZE", "1").strip()
    if _is_number(size) and int(size) > 1:
        raise RunError(
            f"{command}: uses one process, and WORLD_SIZE = {size} says that it was started "
            f"{size} times; start it without a launcher, or unset WORLD_SIZE"
        )


def _number(name: str, otherwise: str) -> int:
    text = os.environ.get(name, "").strip() or otherwise
    if not _is_number(text):
        what = f"{text[:40]!r} is not a whole number" if text else "is not set"
        raise RunError(f"{name}: {what}, and a launch needs one; {ALONE}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < LONGEST
