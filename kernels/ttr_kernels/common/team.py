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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .arrays import Array
from .compilation import jit_within
from .storage import element_pointer

# Each counter has a cache line of its own.
_LINE = 8
_yield = types.ExternalFunction("sched_yield", types.int32())
# Looks at a counter before the core is offered to others: a phase that is split evenly ends within a microsecond.
_LOOKS = 200


def new_control(phases: int) -> Array:
    """Counters of so many phases. Zero them before each call of the kernel."""
    return np.zeros((phases, 2 * _LINE), np.int64)


@intrinsic
def _add_one(context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "acq_rel")

    return types.int64(array, types.intp), generate


@intrinsic
def _look(context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(element_pointer(context, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(array, types.intp), generate


@jit_within
def take(control: Any, phase: int) -> Any:
    """The next unit of the phase; from its number of units on there is none left."""
    return _add_one(control, phase * 2 * _LINE)


@jit_within
def done(control: Any, phase: int) -> None:
    """A unit that was taken has been computed: what it wrote is seen by whoever has waited for it."""
    _add_one(control, phase * 2 * _LINE + _LINE)


@jit_within
def wait(control: Any, phase: int, units: int) -> None:
    """Until all units of the phase are done."""
    looks = 0
    while _look(control, phase * 2 * _LINE + _LINE) < units:
        looks += 1
        if looks > _LOOKS:
            _yield()
