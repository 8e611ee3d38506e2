"""Every operation, every case of its table: see operation_checks.py for what each check demands."""

import operation_checks as checks
import pytest

from ttr_kernels.operations import OPERATIONS

CASES = [
    pytest.param(operation, case, id=f"{operation.name}-{case.name}")
    for operation in OPERATIONS
    for case in operation.cases
    if not case.timed
]
WITH_BACKWARD = [case for case in CASES if case.values[0].backward is not None]
# Where one ordinary case per operation says enough: its last untimed one, which has the most inputs.
LAST_CASE = [
    pytest.param(operation, [case for case in operation.cases if not case.timed][-1], id=operation.name)
    for operation in OPERATIONS
]


@pytest.mark.parametrize(("operation", "case"), WITH_BACKWARD)
def test_backward_of_reference_agrees_with_differences(operation, case):
    checks.check_reference(operation, case)


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_agrees_with_reference(operation, case, dtype):
    checks.check_against_reference(operation, case, checks.DTYPES[dtype])


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_preallocated_results(operation, case):
    checks.check_preallocated(operation, case)


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_strided_input(operation, case):
    checks.check_layout(operation, case)


@pytest.mark.parametrize(("operation", "case"), LAST_CASE)
def test_bad_input_is_named(operation, case):
    checks.check_bad_input(operation, case)


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_result_does_not_depend_on_threads(operation, case):
    checks.check_threads(operation, case)
