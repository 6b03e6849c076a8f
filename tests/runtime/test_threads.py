"""Threads: forked processes, and what calls leave behind."""

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opfa.runtime import build, threads
from opfa.runtime.library import library
from opfa.runtime.program import Program, Runner
from opfa.runtime.threads import Pool

CHANNELS, TOKENS = 8, 5


class OneOfTwo(threads.TorchThreads):
    """A team of OpenMP's that has one thread, where two are asked for."""

    def _made(self) -> int | None:
        self.calls: list[int] = []

        def parallel(work: Any, data: int, number: int, _: int) -> None:
            self.calls.append(number)
            work(data)

        work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        kind = ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        number = ctypes.CFUNCTYPE(ctypes.c_int)
        self.kept = kind(parallel), number(lambda: 0), number(lambda: 1)
        team = [ctypes.cast(each, ctypes.c_void_p) for each in self.kept]
        return library().opfa_pool_of(self.threads, *team)


@pytest.fixture(params=[Pool, threads.TorchThreads])
def runner(request: pytest.FixtureRequest) -> Runner:
    if why := build.why_not():
        pytest.skip(why)
    return runner_on(request.param(2))


def runner_on(pool: Pool) -> Runner:
    program = Program()
    source, target = program.buffer(CHANNELS), program.buffer(CHANNELS)
    program.load(source, CHANNELS)
    program.norm(source, target, np.ones(CHANNELS, np.float32), None, 1e-5)
    program.store(target, CHANNELS)
    return Runner(program, pool)


def output(runner: Runner) -> np.ndarray:
    given = np.arange(TOKENS * CHANNELS, dtype=np.float32).reshape(TOKENS, CHANNELS)
    target = np.zeros_like(given)
    starts = np.array([0, 2, TOKENS], np.int32)
    runner.run(starts, rows=np.arange(TOKENS, dtype=np.int32), source=given, target=target)
    return target


def test_a_forked_process_starts_threads_of_its_own(runner: Runner) -> None:
    expected = output(runner)
    child = os.fork()
    if not child:
        signal.alarm(20)  # it would wait for ever for threads that it doesn't have
        is_same = np.array_equal(output(runner), expected)
        del runner.pool  # nor may it wait for them to end
        os._exit(0 if is_same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(output(runner), expected)


def test_torch_s_threads_and_fewer_than_asked_for_compute_the_same(runner: Runner) -> None:
    expected, fewer = output(runner_on(Pool(1))), OneOfTwo(2)
    assert np.array_equal(output(runner), expected)
    assert np.array_equal(output(runner_on(fewer)), expected)
    assert fewer.calls == [2]


def test_without_torch_s_openmp_the_threads_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := build.why_not():
        pytest.skip(why)
    expected = output(runner_on(Pool(1)))
    monkeypatch.setattr(threads, "_team", lambda: None)
    assert np.array_equal(output(runner_on(threads.TorchThreads(2))), expected)


def kilobytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux")
    return int(status.read_text().partition("VmRSS:")[2].split()[0])


def test_calls_and_pools_leave_no_memory(runner: Runner) -> None:
    before = 0
    for call in range(1_500):
        if call == 500:
            before = kilobytes()
        output(runner)
        if call % 10 == 0:
            runner.pool = Pool(1 + call % 3)
    assert kilobytes() - before < 1024
