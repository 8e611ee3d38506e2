"""Timing of operations on their timed cases, beside a plain copy of the bytes that they must move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .common.arrays import FLOAT32
from .common.cases import Case, Operation
from .common.conversion import copy_converted


class Timing(NamedTuple):
    """Medians over the repeats; `copies` are times over that of copying inputs and outputs once.

    An operation without a backward has None for its times.
    """

    operation: str
    case: str
    forward_seconds: float
    backward_seconds: float | None
    forward_copies: float
    backward_copies: float | None
    flops: float


def time_operation(operation: Operation, repeats: int) -> Iterator[Timing]:
    """Time every case of an operation that is marked for it, in float32, results preallocated."""
    for case in operation.cases:
        if case.timed:
            yield _time_case(operation, case, repeats)


def _time_case(operation: Operation, case: Case, repeats: int) -> Timing:
    inputs = case.make(np.random.default_rng(0))
    for name in (*operation.activations, *operation.parameters):
        if isinstance(inputs.get(name), np.ndarray):
            inputs[name] = inputs[name].astype(FLOAT32)
    y, saved = operation.forward(**inputs)
    given = {"out": np.empty_like(y)} if np.ndim(y) else {}
    forward = _median(lambda: operation.forward(**inputs, **given), repeats)
    read = sum(inputs[name].nbytes for name in operation.activations if isinstance(inputs.get(name), np.ndarray))
    moved = read + (y.nbytes if np.ndim(y) else 0)
    copies = forward / _copy_seconds(moved, repeats)
    backward = operation.backward
    if backward is None:
        return Timing(operation.name, case.name, forward, None, copies, None, case.flops)
    dy: Any = np.ones(np.shape(y), FLOAT32) if np.ndim(y) else 1.0
    first = backward(dy, saved)
    gradients = first if isinstance(first, tuple) else (first,)
    results = {
        f"d{name}": gradient
        for name, gradient in zip(operation.gradients, gradients, strict=True)
        if gradient is not None and inputs.get(name) is not None
    }
    seconds = _median(lambda: backward(dy, saved, **results), repeats)
    written = sum(results[f"d{name}"].nbytes for name in operation.activations if f"d{name}" in results)
    return Timing(
        operation.name, case.name, forward, seconds, copies, seconds / _copy_seconds(moved + written, repeats),
        case.flops,
    )  # fmt: skip


def _copy_seconds(moved: int, repeats: int) -> float:
    """Time of reading and writing so many bytes in total, on all threads."""
    width = 1024
    source = np.ones((max(1, moved // 2 // (4 * width)), width), FLOAT32)
    target = np.empty_like(source)
    return _median(lambda: copy_converted(source, target), repeats)


def _median(call: Callable[[], Any], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))
