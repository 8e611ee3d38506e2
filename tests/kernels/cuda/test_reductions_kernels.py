"""Sums over columns on the emulator: several parts, vectors and single elements, a total that is strided."""

import emulator
import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.common.cuda.reductions import add_column_sums

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (200, 64), (333, 37)])
def test_column_sums_are_added(rows, width, dtype):
    x = np.random.default_rng(0).standard_normal((rows, width)).astype(dtype)
    total = np.full((width, 2), 3.0, np.float32)
    with use_executor(emulator.EmulatorExecutor("check")):
        add_column_sums(x, total[:, 0])
    np.testing.assert_allclose(total[:, 0], 3 + x.astype(np.float64).sum(axis=0), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(total[:, 1], 3)
