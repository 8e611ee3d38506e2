"""Kernels whose threads share the units of one phase after another."""

import threading

import numpy as np
import pytest

from ttr_kernels.common.compilation import jit
from ttr_kernels.common.parallel import parallel_for
from ttr_kernels.common.team import done, new_control, take, wait

PHASES, UNITS = 200, 7


@jit
def _sums(control, values, begin, end):
    # Each unit of a phase adds up the whole of the phase before: one that began too early would miss a part.
    for phase in range(1, values.shape[0]):
        while True:
            unit = take(control, phase)
            if unit >= values.shape[1]:
                break
            # Long enough for threads to be at work at the same time.
            delay = 0.0
            for step in range(2000):
                delay += np.sqrt(step + delay)
            total = 0.0 if delay > 0.0 else np.nan
            for other in range(values.shape[1]):
                total += values[phase - 1, other]
            values[phase, unit] = total / values.shape[1] + 1.0
            done(control, phase)
        wait(control, phase, values.shape[1])


def expected():
    return np.broadcast_to(np.arange(PHASES, dtype=np.float64)[:, None], (PHASES, UNITS))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_phase_begins_when_the_one_before_is_done(threads):
    control, values = new_control(PHASES), np.zeros((PHASES, UNITS))
    for _ in range(20):
        control.fill(0)
        values[1:] = np.nan
        callers = [threading.Thread(target=_sums, args=(control.reshape(-1), values, 0, 1)) for _ in range(threads)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
        np.testing.assert_array_equal(values, expected())


def test_one_thread_alone_does_all_of_it():
    """A thread that never comes is not waited for; one that comes late finds nothing to do."""
    control, values = new_control(PHASES), np.zeros((PHASES, UNITS))
    _sums(control.reshape(-1), values, 0, 2)
    np.testing.assert_array_equal(values, expected())
    values[1:] = -1.0
    _sums(control.reshape(-1), values, 1, 2)
    assert (values[1:] == -1.0).all()


def test_the_pool_runs_it():
    control, values = new_control(PHASES), np.zeros((PHASES, UNITS))
    parallel_for(_sums, 2, control.reshape(-1), values)
    np.testing.assert_array_equal(values, expected())
