"""Timing of operations on their timed cases, beside a plain copy of the bytes that they must move."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .adamw import adamw, global_norm
from .common.arrays import FLOAT32, array_module
from .common.cases import Case, Operation
from .common.conversion import copy_converted
from .operations import OPERATIONS

# Elements of the parameters that an update of the optimizer is timed on: those of the preset `tiny`.
_PARAMETERS = 6_300_000
# Floats in a row of what is copied.
_WIDTH = 1024
# Optimizer updates have no backward, and so no table of cases.
UPDATES = ("adamw", "global_norm")
NAMES = (*(operation.name for operation in OPERATIONS), *UPDATES)


# What says how much work there is stays on the host (see the operations' contracts).
_ON_THE_HOST = ("cu_seqlens", "lengths", "rings")


class Device(NamedTuple):
    """Where operations are timed.

    Attributes:
        put: a NumPy array as one of the device's.
        wait: until all that was begun is done.
        copy: (source, target), an array to another.
        calls: timed together, so that launching the first and waiting for the last counts for little.
    """

    put: Callable[[Any], Any]
    wait: Callable[[], None]
    copy: Callable[[Any, Any], None]
    calls: int


CPU = Device(lambda array: array, lambda: None, copy_converted, 1)


def gpu(cupy: Any) -> Device:
    """The current GPU of CuPy."""
    stream = cupy.cuda.get_current_stream()
    return Device(cupy.asarray, stream.synchronize, lambda source, target: cupy.copyto(target, source), 20)


class Timing(NamedTuple):
    """One pass of one case.

    Attributes:
        operation, case: names.
        part: "forward", "backward" or "update".
        seconds: median over the repeats.
        bytes: of activations and results, each moved once; parameters of a layer are not counted.
        copy_seconds: what a plain copy (on a CPU by all threads) takes that reads and writes as many, measured beside.
        flops: floating-point operations, an exp, logarithm or sine counted as one.
    """

    operation: str
    case: str
    part: str
    seconds: float
    bytes: int
    copy_seconds: float
    flops: float

    def limit_seconds(self, peak: float) -> float:
        """The least that the machine needs: to move the bytes, or to compute at `peak` operations per second."""
        return max(self.copy_seconds, self.flops / peak)


def time_kernels(names: tuple[str, ...], repeats: int, device: Device = CPU) -> Iterator[Timing]:
    """Time the timed cases of these operations (all of them: `NAMES`), in float32, results preallocated."""
    for operation in OPERATIONS:
        if operation.name in names:
            for case in operation.cases:
                if case.timed:
                    yield from _time_case(operation, case, repeats, device)
    for name in UPDATES:
        if name in names:
            yield _time_update(name, repeats, device)


def _time_case(operation: Operation, case: Case, repeats: int, device: Device) -> Iterator[Timing]:
    on_host = float32_inputs(operation, case)
    inputs = {name: _placed(name, value, device) for name, value in on_host.items()}
    y, saved = operation.forward(**inputs)
    given = {"out": array_module(y).empty_like(y)} if np.ndim(y) else {}
    moved, moved_backward = moved_bytes(operation, on_host, y)
    seconds, copy = _beside_a_copy(lambda: operation.forward(**inputs, **given), moved, repeats, device)
    yield Timing(operation.name, case.name, "forward", seconds, moved, copy, case.flops)
    backward = operation.backward
    if backward is None:
        return
    dy: Any = device.put(np.ones(y.shape, FLOAT32)) if np.ndim(y) else 1.0
    first = backward(dy, saved)
    gradients = first if isinstance(first, tuple) else (first,)
    results = {
        f"d{name}": gradient
        for name, gradient in zip(operation.gradients, gradients, strict=True)
        if gradient is not None and inputs.get(name) is not None
    }
    seconds, copy = _beside_a_copy(lambda: backward(dy, saved, **results), moved_backward, repeats, device)
    flops = operation.backward_flops * case.flops
    yield Timing(operation.name, case.name, "backward", seconds, moved_backward, copy, flops)


def moved_bytes(operation: Operation, inputs: dict[str, Any], y: Any) -> tuple[int, int]:
    """Bytes of activations and result that the forward must move, and the backward with their gradients."""
    read = {name: inputs[name].nbytes for name in operation.activations if isinstance(inputs.get(name), np.ndarray)}
    forward = sum(read.values()) + (y.nbytes if np.ndim(y) else 0)
    return forward, forward + sum(size for name, size in read.items() if name in operation.gradients)


def float32_inputs(operation: Operation, case: Case) -> dict[str, Any]:
    """The inputs of a case, its floating-point arrays in float32."""
    inputs = case.make(np.random.default_rng(0))
    for name in (*operation.activations, *operation.parameters):
        if isinstance(inputs.get(name), np.ndarray):
            inputs[name] = inputs[name].astype(FLOAT32)
    return inputs


def _placed(name: str, value: Any, device: Device) -> Any:
    """An input of an operation on the device; arrays may lie in a dataclass, such as a time bias."""
    if isinstance(value, np.ndarray):
        return value if name in _ON_THE_HOST else device.put(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _placed(f.name, getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _time_update(name: str, repeats: int, device: Device) -> Timing:
    rng = np.random.default_rng(0)
    parameter, gradient = (device.put(rng.standard_normal(_PARAMETERS, dtype=FLOAT32)) for _ in range(2))
    first, second = (device.put(np.full(_PARAMETERS, value, FLOAT32)) for value in (0, 1))

    def update() -> None:
        adamw(parameter, gradient, first, second, learning_rate=1e-6, step=9)

    # AdamW reads four arrays and writes three: two means, a root, a quotient, the decay, the update.
    call, arrays, operations = (update, 7, 14) if name == "adamw" else (lambda: global_norm([gradient]), 1, 2)
    moved = arrays * gradient.nbytes
    seconds, copy = _beside_a_copy(call, moved, repeats, device)
    case = f"{_PARAMETERS / 1e6:.1f} M parameters"
    return Timing(name, case, "update", seconds, moved, copy, float(operations * _PARAMETERS))


def copy_bandwidth(device: Device = CPU, size: int = 1 << 26) -> float:
    """Bytes per second of a plain copy of `size` bytes (on a CPU by all threads), read and written together, the best
    of some."""
    ones = np.ones((size // (4 * _WIDTH), _WIDTH), FLOAT32)
    source, target = device.put(ones), device.put(np.empty_like(ones))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        device.copy(source, target)
        device.wait()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * ones.nbytes / best


def _beside_a_copy(call: Callable[[], Any], moved: int, repeats: int, device: Device) -> tuple[float, float]:
    """Medians of its time and that of reading and writing so many bytes in total, in turns."""
    ones = np.ones((max(1, moved // 2 // (4 * _WIDTH)), _WIDTH), FLOAT32)
    source, target = device.put(ones), device.put(np.empty_like(ones))
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        for _ in range(device.calls):
            call()
        device.wait()
        middle = time.perf_counter()
        for _ in range(device.calls):
            device.copy(source, target)
        device.wait()
        seconds.append((middle - begin, time.perf_counter() - middle))
    ours, copy = (np.median(seconds[1:], axis=0) / device.calls).tolist()
    return ours, copy
