"""Run by test_numba_kernels.py with NUMBA_ENABLE_CUDASIM=1: the cases of the CPU tests, in three dtypes, with the
kernels written with numba.cuda. The simulator holds all three: bfloat16 travels as its bits, float16 is NumPy's."""

import emulator
import numpy as np
import operation_checks as checks
import pytest
from numba import cuda
from numba.core import config

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.cuda.choice import use_numba_kernels
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.common.cuda.numba_kernels import launch, load_and_store
from ttr_kernels.geglu import geglu_backward, geglu_forward
from ttr_kernels.geglu.cases import OPERATION as GEGLU
from ttr_kernels.rope import rope_cos_sin, rope_forward
from ttr_kernels.rope.cases import OPERATION as ROPE

CASES = [
    pytest.param(operation, case, id=f"{operation.name}-{case.name}")
    for operation in (ROPE, GEGLU)
    for case in operation.cases
    if not case.timed
]


class OnlySums(emulator.EmulatorExecutor):
    """Executes the CUDA C++ kernels that add up gradients, and no others."""

    def function(self, kernel):
        assert kernel.source.name == "reductions.cu", f"{kernel} ran in place of a kernel written with numba.cuda"
        return super().function(kernel)


@pytest.fixture(autouse=True)
def in_simulator():
    assert config.ENABLE_CUDASIM, "run this through test_numba_kernels.py"
    with use_numba_kernels(), use_executor(OnlySums("plain")), emulator.poisoned_empty():
        yield


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_agrees_with_reference(operation, case, dtype):
    checks.check_against_reference(operation, case, checks.DTYPES[dtype])


# A part of the features; a bias.
@pytest.mark.parametrize(("operation", "case"), [CASES[3], CASES[-1]])
def test_preallocated_results(operation, case):
    checks.check_preallocated(operation, case)


@pytest.mark.parametrize(("operation", "case"), [CASES[4], CASES[-1]])
def test_strided_input(operation, case):
    checks.check_layout(operation, case)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_in_place_of_a_part(interleaved):
    fused = np.random.default_rng(0).standard_normal((9, 6, 8)).astype(BFLOAT16)
    before, table = fused.copy(), rope_cos_sin(np.arange(9) + 10**6, 6)
    part = fused[:, 1:3]
    assert rope_forward(part, table, interleaved=interleaved, out=part)[0] is part
    want = rope_forward(np.ascontiguousarray(before[:, 1:3]), table, interleaved=interleaved)[0]
    np.testing.assert_array_equal(part, want)
    np.testing.assert_array_equal(np.delete(fused, [1, 2], axis=1), np.delete(before, [1, 2], axis=1))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_geglu_tails_and_in_place(approximate):
    gate = np.array([-1e30, -100, -20, -0.0, 0.0, 20, 100, 1e30], np.float32)
    x = np.concatenate([gate, np.ones(8, np.float32)])[None]
    y, saved = geglu_forward(x, np.zeros(16, np.float32), approximate=approximate)
    np.testing.assert_array_equal(y[0], np.array([0, 0, 0, 0, 0, 20, 100, 1e30], np.float32))
    dbias = np.full(16, 2.0, np.float32)
    dx, _ = geglu_backward(np.ones((1, 8), np.float32), saved, dx=x, dbias=dbias)
    assert dx is x
    np.testing.assert_array_equal(dx[0, [0, 1, 2, 5, 6, 7]], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dbias, 2 + dx[0])


def test_bfloat16_is_read_and_rounded_as_ml_dtypes_does():
    load, store = load_and_store(BFLOAT16)

    @cuda.jit
    def copy(bits, values, read, written):
        i = cuda.grid(1)
        if i < len(values):
            read[i] = load(bits, i)
            store(written, i, values[i])

    rng = np.random.default_rng(0)
    bits = np.array([0, 0x8000, 1, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, *rng.integers(0, 0x7F80, 300)], np.uint16)
    # Numbers, halfway between neighbours and just beside that; the largest, which rounds to infinity; NaN.
    middle = (bits[7:].astype(np.uint32) << 16) + 0x8000
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(np.float32).max, 1e-40], np.float32)
    values = np.concatenate([special, (middle - 1).view(np.float32)[:100], middle.view(np.float32)[100:200],
                             (middle + 1).view(np.float32)[200:]])  # fmt: skip
    read, written = np.empty(len(values), np.float32), np.empty(len(values), np.uint16)
    launch(copy, len(values), (bits, values, read, written))
    np.testing.assert_array_equal(read, bits.view(BFLOAT16).astype(np.float32))
    want = values.astype(BFLOAT16)
    np.testing.assert_array_equal(written.view(BFLOAT16).astype(np.float32), want.astype(np.float32))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(written[number], want.view(np.uint16)[number])
