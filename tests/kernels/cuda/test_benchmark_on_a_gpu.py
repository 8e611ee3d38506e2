"""`ttr-gpu bench kernels --device gpu`: operations timed on CuPy arrays, with no wait but for the time."""

import dataclasses
import importlib.util

import cupy_stand_in
import pytest

from ttr_kernels import benchmark
from ttr_kernels.operations import OPERATIONS

ON_GPUS = [
    operation
    for operation in OPERATIONS
    if importlib.util.find_spec(f"{operation.forward.__module__.removesuffix('.cases')}.gpu")
]


@pytest.mark.parametrize("operation", ON_GPUS, ids=lambda operation: operation.name)
def test_small_cases_are_timed(operation, cupy, monkeypatch):
    small = dataclasses.replace(next(case for case in operation.cases if not case.timed), timed=True)
    monkeypatch.setattr(benchmark, "OPERATIONS", [dataclasses.replace(operation, cases=[small])])
    device = benchmark.gpu(cupy)._replace(calls=1)
    before = cupy_stand_in.waits
    timings = list(benchmark.time_kernels((operation.name,), 1, device))
    parts = ["forward"] if operation.backward is None else ["forward", "backward"]
    assert [timing.part for timing in timings] == parts
    assert all(timing.seconds > 0 and timing.copy_seconds > 0 and timing.bytes > 0 for timing in timings)
    if not hasattr(cupy, "__file__"):  # the stand-in counts
        # After the operations and after the copies, in two rounds each, of which the first is not timed.
        assert cupy_stand_in.waits - before == len(parts) * 2 * 2
    on_cpu = list(benchmark.time_kernels((operation.name,), 1))
    assert [timing.bytes for timing in on_cpu] == [timing.bytes for timing in timings]


@pytest.mark.parametrize("name", benchmark.UPDATES)
def test_updates_are_timed(name, cupy, monkeypatch):
    monkeypatch.setattr(benchmark, "_PARAMETERS", 3000)
    (timing,) = benchmark.time_kernels((name,), 2, benchmark.gpu(cupy)._replace(calls=2))
    assert (timing.operation, timing.part) == (name, "update")
    assert timing.seconds > 0
