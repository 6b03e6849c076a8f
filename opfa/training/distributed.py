"""Processes that work together: what they tell each other, and how they stop.

A rank that died makes the others' collectives fail within a second. Nobody notices one that hangs,
or a pulled cable: DeepSpeed's groups wait 30 minutes. So a watchdog ends each process in which
nothing was finished for a while, and then the launcher ends the others.
"""

import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist

from opfa.errors import STOPPED, OpfaError, first_line
from opfa.training import launch

CONTACT = ("gloo", "nccl", "connection")  # words of collectives that failed
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # variables that torchrun and DeepSpeed set
AGAIN = "The same command with --resume goes on; scripts of launch/ do so by themselves"
SHARED = "RUN must be in a directory that all machines share"
HUNG = 76  # exit code that a watchdog leaves with
T = TypeVar("T")
log = logging.getLogger(__name__)


class LostContactError(OpfaError):
    """Another process of this launch is gone."""

    status = 1


class Stopped(OpfaError):  # noqa: N818 - not an error
    """The run was asked to stop, and can be resumed."""

    status = STOPPED


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Add these numbers of the host over all ranks, without waiting for a GPU. Collective."""
    total = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total, group=_host_group())
    return total.tolist()


@functools.cache
def _host_group() -> Any:  # Any: torch's own signature has an int in it
    """One of all ranks that adds up on the host; None where the usual one does. Collective."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def gather_texts(text: str) -> list[str]:
    """This text of every rank, by rank. Collective."""
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def on_first_rank(find: Callable[[], T]) -> T:
    """What rank 0 finds. Collective; an `OpfaError` there is raised on every rank."""
    if world_size() == 1:
        return find()
    box: list[Any] = list(_tried(find)) if rank() == 0 else [None, None]  # Any: as below
    dist.broadcast_object_list(box, src=0)
    found, error = box
    if error is not None:
        raise error
    return found


def on_every_rank(find: Callable[[], T]) -> T:
    """What this rank finds. Collective; an `OpfaError` on one rank is raised on every one."""
    found, error = _tried(find)
    errors: list[OpfaError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next(filter(None, (error, *errors)), None):
        raise first
    return found


# Any: T, or None beside an error
def _tried(find: Callable[[], T]) -> tuple[Any, OpfaError | None]:
    try:
        return find(), None
    except OpfaError as error:
        return None, error


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether this becomes true in time: network file systems show new files with a delay."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def barrier() -> None:
    """Wait for every rank. Collective."""
    if world_size() > 1:
        dist.barrier()


def end_process(status: int) -> NoReturn:
    """Leave at once, all files closed: some ranks abort in the interpreter's own exit."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Supervisor:
    """Looks after this process while it trains; a context manager.

    A watchdog thread ends the process when `beat` was not called for `seconds`, or when its
    launcher is gone (it would train on beside its replacement). A thread, because a main one that
    hangs in a collective runs no signal handlers.

    SIGTERM raises `Stopped` at once. From `save_on_signals` on, SIGTERM and the first Ctrl-C are
    noted in `signal`, so that a run can save before it ends. The supervisor of one of several runs
    hands what it noted and didn't answer to the outer one.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds` is the longest time that one beat may be followed by none."""
        self.signal = ""
        self._seconds = seconds
        is_launched = any(name in os.environ for name in LAUNCHERS)
        self._launcher = os.getppid() if is_launched else None
        self._is_over = threading.Event()
        self._handlers: dict[int, Any] = {}  # Any: what signal.signal gives back
        self._process = os.getpid()
        self.beat("starting up")

    def beat(self, doing: str) -> None:
        """Something was finished; what comes next."""
        self._since, self._doing = time.monotonic(), doing

    def __enter__(self) -> Self:
        """Start watching."""
        threading.Thread(target=self._watch, daemon=True).start()
        self._handle(self._end)
        return self

    def save_on_signals(self) -> None:
        """Note both signals from now on: there is something to save."""
        self._handle(self._note)

    def stop_if_told(self, what: str) -> None:
        """Raise `Stopped`, which says `what`, if a signal was noted."""
        if self.signal:
            raise Stopped(what)

    def _handle(self, answer: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread do so; the main one's handlers stay
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, answer)
            self._handlers.setdefault(number, before)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Stop watching, and give the signals back."""
        self._is_over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.signal and self._is_nested and not isinstance(error, Stopped):
            number = signal.Signals[self.signal]
            self._handlers[number](number, None)
        if error is not None and _is_lost_contact(error):
            # gloo's ends in an emoji
            reason = first_line(error).encode("ascii", "ignore").decode()[:160]
            raise LostContactError(
                f"lost contact with another process while {self._doing}; its own output says why "
                f"({reason}). {AGAIN}"
            ) from error

    @property
    def _is_nested(self) -> bool:
        handler = self._handlers.get(signal.SIGTERM)
        return isinstance(getattr(handler, "__self__", None), Supervisor)

    def _end(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked: ended as any other process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and not self._is_nested:
            raise KeyboardInterrupt
        else:
            what = f"{signal.Signals(number).name} while {self._doing}"
            raise Stopped(f"{what}: stopped before the next step; nothing is lost")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._end(number, frame)
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        log.warning("%s: stopping as soon as what was done is saved", self.signal)

    def _watch(self) -> None:
        rank = launch.place().rank
        while not self._is_over.wait(min(1.0, self._seconds / 10)):
            if self._launcher is not None and os.getppid() != self._launcher:
                problem = "the launcher is gone"
            elif time.monotonic() - self._since > self._seconds:
                problem = (
                    f"nothing was finished for {self._seconds:g} s while {self._doing}; another "
                    "process hangs or is out of reach, or launch.timeout_seconds is too short"
                )
            else:
                continue
            said = f"opfa: rank {rank}: {problem}. This process ends. {AGAIN}"
            print(said, file=sys.stderr, flush=True)
            os._exit(HUNG)


def _is_lost_contact(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or launch.place().world_size == 1:
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in CONTACT)
