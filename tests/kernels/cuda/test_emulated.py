"""Every operation's CUDA kernels, executed on the host through their own launch code: the cases of the CPU tests.

In plain mode each case in three dtypes, forward and backward, with strided input and given results; in checked mode,
some cases with several orders of threads, and no fault may be reported.
"""

import dataclasses
import importlib.util

import emulator
import operation_checks as checks
import pytest

from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.operations import OPERATIONS

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

WITH_GPU_VERSION = [
    operation
    for operation in OPERATIONS
    if importlib.util.find_spec(f"{operation.forward.__module__.removesuffix('.cases')}.gpu")
]
CASES = [
    pytest.param(operation, case, id=f"{operation.name}-{case.name}")
    for operation in WITH_GPU_VERSION
    for case in operation.cases
    if not case.timed
]
# The last cases have the most inputs.
LAST_CASES = [
    pytest.param(operation, case, id=f"{operation.name}-{case.name}")
    for operation in WITH_GPU_VERSION
    for case in [case for case in operation.cases if not case.timed][-2:]
]


@pytest.fixture
def on_emulator():
    # What a kernel does not write is NaN.
    with use_executor(emulator.EmulatorExecutor("plain")), emulator.poisoned_empty():
        yield


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_agrees_with_reference(operation, case, dtype, on_emulator):
    checks.check_against_reference(operation, case, checks.DTYPES[dtype])


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_preallocated_results(operation, case, on_emulator):
    checks.check_preallocated(operation, case)


@pytest.mark.parametrize(("operation", "case"), LAST_CASES)
def test_strided_input(operation, case, on_emulator):
    # How rows are shared out among threads follows from their alignment, and the order of sums with it.
    checks.check_layout(dataclasses.replace(operation, same_bits_on_any_threads=False), case)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize(("operation", "case"), LAST_CASES)
def test_no_fault_in_any_order_of_threads(operation, case, dtype, seed):
    with use_executor(emulator.EmulatorExecutor("check", seed)), emulator.poisoned_empty():
        checks.check_against_reference(operation, case, checks.DTYPES[dtype])
