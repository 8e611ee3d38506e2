"""LayerNorm's kernels on the emulator, beyond the table of cases that test_emulated.py runs."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.layer_norm import layer_norm_backward, layer_norm_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))


def gapped(array):
    """The same rows with a gap after each, of NaN that nothing may read."""
    wide = np.full((len(array), array.shape[1] + 8), np.nan, array.dtype)
    wide[:, : array.shape[1]] = array
    return wide[:, : array.shape[1]]


@pytest.mark.parametrize("shape", [(9, 33), (3, 1200)])
@pytest.mark.parametrize("mode", ["plain", "check"])
def test_the_gradient_along_the_residual_path_is_added(mode, shape):
    rng = np.random.default_rng(2)
    x, dy, dsum = (gapped(rng.standard_normal(shape).astype(np.float32)) for _ in range(3))
    weight, bias = (rng.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
    exact = [array.astype(np.float64) for array in (x, weight, bias, dy, dsum)]
    want, want_weight, want_bias = layer_norm_backward(exact[3], layer_norm_forward(*exact[:3])[1], dsum=exact[4])
    with use_executor(emulator.EmulatorExecutor(mode, 1)), emulator.poisoned_empty():
        _, saved = layer_norm_forward(x, weight, bias)
        dx, dweight, dbias = layer_norm_backward(dy, saved, dsum=dsum)
    error = 2 * checks.ERROR[np.dtype(np.float32)]
    checks.assert_close("dx", dx, want, error)
    checks.assert_close("dweight", dweight, want_weight, error)
    checks.assert_close("dbias", dbias, want_bias, error)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    rng = np.random.default_rng(3)
    x = (1000.0 + rng.standard_normal((4, 256))).astype(np.float32)
    weight = np.ones(256, np.float32)
    want, _ = layer_norm_forward(x.astype(np.float64), weight.astype(np.float64))
    with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
        y, _ = layer_norm_forward(x, weight)
    # The mean itself is rounded to 6e-5.
    np.testing.assert_allclose(y, want, atol=3e-4)
