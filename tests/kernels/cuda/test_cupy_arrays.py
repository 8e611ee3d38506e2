"""Every operation on CuPy arrays, from its checks to its kernels: the same results as on NumPy arrays, nothing mixed,
and no moment at which the host waits for the GPU. With `-m gpu` on a device, else on a stand-in for CuPy."""

import dataclasses
import importlib.util

import cupy_stand_in
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.operations import OPERATIONS

# The last cases have the most inputs.
CASES = [
    pytest.param(operation, case, id=f"{operation.name}-{case.name}")
    for operation in OPERATIONS
    if importlib.util.find_spec(f"{operation.forward.__module__.removesuffix('.cases')}.gpu")
    for case in [case for case in operation.cases if not case.timed][-3:]
]
# What says how much work there is.
ON_THE_HOST = ("cu_seqlens", "lengths", "rings")


def placed(cupy, name, value):
    if isinstance(value, np.ndarray):
        return value if name in ON_THE_HOST else cupy.asarray(value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: placed(cupy, f.name, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_as_on_numpy_arrays_without_waiting(operation, case, cupy):
    inputs, _ = checks.rounded_inputs(operation, case, checks.FLOAT32)
    y, saved = operation.forward(**inputs)
    dy = checks.gradient_of_output(y).astype(np.asarray(y).dtype)
    expected = checks.gradients_of(operation, dy.copy(), saved)

    on_gpu = {name: placed(cupy, name, value) for name, value in inputs.items()}
    upstream = cupy.asarray(dy) if dy.ndim else float(dy)
    before = cupy_stand_in.waits
    result, kept = operation.forward(**on_gpu)
    gradients = checks.gradients_of(operation, upstream, kept)
    assert cupy_stand_in.waits == before, "the host waited for the GPU"

    allowed = 2 * checks.ERROR[checks.FLOAT32] * operation.tolerance
    assert isinstance(result, cupy.ndarray)
    checks.assert_close("output", result.get(), y, allowed)
    for name, got, want in zip(operation.gradients, gradients, expected, strict=True):
        if inputs.get(name) is not None:
            assert isinstance(got, cupy.ndarray)
            checks.assert_close(f"gradient of {name}", got.get(), want, 2 * allowed)


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_numpy_beside_cupy_is_refused(operation, case, cupy):
    inputs, _ = checks.rounded_inputs(operation, case, checks.FLOAT32)
    arrays = [name for name, value in inputs.items() if isinstance(value, np.ndarray) and name not in ON_THE_HOST]
    for name in arrays[1:]:
        mixed = {other: value if other == name else placed(cupy, other, value) for other, value in inputs.items()}
        with pytest.raises(TypeError, match="cupy"):
            operation.forward(**mixed)
