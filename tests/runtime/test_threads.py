"""Threads: forked processes, and what calls leave behind."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from opfa.runtime import build
from opfa.runtime.program import Program, Runner
from opfa.runtime.threads import Pool

CHANNELS, TOKENS = 8, 5


@pytest.fixture
def runner() -> Runner:
    if why := build.why_not():
        pytest.skip(why)
    program = Program()
    source, target = program.buffer(CHANNELS), program.buffer(CHANNELS)
    program.load(source, CHANNELS)
    program.norm(source, target, np.ones(CHANNELS, np.float32), None, 1e-5)
    program.store(target, CHANNELS)
    return Runner(program, Pool(2))


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
