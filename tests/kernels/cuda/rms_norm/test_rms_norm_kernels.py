"""The RMS normalisation kernels on the emulator, beyond the table of cases: the gradient along the residual path, and
results that overwrite inputs. (Mutants of the kernel survived the table alone: tests/emulator/mutate.py.)"""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.rms_norm import rms_norm_backward, rms_norm_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))


def gapped(array):
    """The same rows with a gap after each, of NaN that nothing may read."""
    wide = np.full((len(array), array.shape[1] + 8), np.nan, array.dtype)
    wide[:, : array.shape[1]] = array
    return wide[:, : array.shape[1]]


@pytest.mark.parametrize("dx_is", [None, "dy", "dsum"])
@pytest.mark.parametrize("shape", [(9, 33), (11, 40), (3, 1200)])
@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize("mode", ["plain", "check"])
def test_the_gradient_along_the_residual_path_is_added(mode, dtype, shape, dx_is):
    dtype = checks.DTYPES[dtype]
    rng = np.random.default_rng(2)
    x, dy, dsum = (gapped(rng.standard_normal(shape).astype(dtype)) for _ in range(3))
    weight = rng.standard_normal(shape[1]).astype(np.float32)
    arrays = {"dy": dy, "dsum": dsum}
    exact = [array.astype(np.float64) for array in (x, weight, dy, dsum)]
    want, want_weight = rms_norm_backward(exact[2], rms_norm_forward(*exact[:2])[1], dsum=exact[3])
    with use_executor(emulator.EmulatorExecutor(mode, 1)), emulator.poisoned_empty():
        _, saved = rms_norm_forward(x, weight)
        dx, dweight = rms_norm_backward(dy, saved, dsum=dsum, dx=arrays.get(dx_is))
    assert dx_is is None or dx is arrays[dx_is]
    checks.assert_close("dx", dx, want, 2 * checks.ERROR[dtype])
    checks.assert_close("dweight", dweight, want_weight, 2 * checks.ERROR[dtype])
