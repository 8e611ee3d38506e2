"""Threads that go through the steps of one compiled kernel together, without Python between them.

A kernel of several phases, each a number of units, is called by every thread (`parallel_for` with a range per thread).
Threads take units as they become free, and go on to the next phase when all units of this one are done: whoever comes
late, or never, costs speed alone. So nothing can wait for a thread that was interrupted before it began.

    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        ...
        done(control, phase)
    wait(control, phase, units)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array
from .atomics import add_one, wait_for
from .compilation import jit_within

# Each counter has a cache line of its own.
_LINE = 8


def new_control(phases: int) -> Array:
    """Counters of so many phases. Zero them before each call of the kernel."""
    return np.zeros((phases, 2 * _LINE), np.int64)


@jit_within
def take(control: Any, phase: int) -> Any:
    """The next unit of the phase; from its number of units on there is none left."""
    return add_one(control, phase * 2 * _LINE)


@jit_within
def done(control: Any, phase: int) -> None:
    """A unit that was taken has been computed: what it wrote is seen by whoever has waited for it."""
    add_one(control, phase * 2 * _LINE + _LINE)


@jit_within
def wait(control: Any, phase: int, units: int) -> None:
    """Until all units of the phase are done."""
    wait_for(control, phase * 2 * _LINE + _LINE, units)
