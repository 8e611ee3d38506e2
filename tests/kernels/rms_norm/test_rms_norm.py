"""RMS normalisation: results that overwrite inputs, as its docstring allows, and rows at the edge of the range."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward

DTYPES = pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@DTYPES
@pytest.mark.parametrize("out_is", [None, "x"])
@pytest.mark.parametrize("sum_is", [None, "x", "residual"])
def test_forward_with_residual_in_place(sum_is, out_is, dtype):
    if out_is == sum_is == "x":
        pytest.skip("two results cannot share one array")
    arrays = {"x": normal(150, 33).astype(dtype), "residual": normal(150, 33, seed=1).astype(dtype)}
    weight = normal(33, seed=2)
    want, saved = rms_norm_forward(arrays["x"].copy(), weight, residual=arrays["residual"].copy())
    y, got = rms_norm_forward(**arrays, weight=weight, out=arrays.get(out_is), sum_out=arrays.get(sum_is))
    assert out_is is None or y is arrays[out_is]
    assert sum_is is None or got.x is arrays[sum_is]
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(got.x, saved.x)
    np.testing.assert_array_equal(got.inverse_rms, saved.inverse_rms)


@DTYPES
@pytest.mark.parametrize("dx_is", ["dy", "dsum"])
def test_backward_in_place(dx_is, dtype):
    x, weight = normal(150, 33).astype(dtype), normal(33, seed=1)
    arrays = {"dy": normal(150, 33, seed=2).astype(dtype), "dsum": normal(150, 33, seed=3).astype(dtype)}
    _, saved = rms_norm_forward(x, weight)
    want, dweight = rms_norm_backward(arrays["dy"].copy(), saved, dsum=arrays["dsum"].copy())
    dx, got = rms_norm_backward(arrays["dy"], saved, dsum=arrays["dsum"], dx=arrays[dx_is])
    assert dx is arrays[dx_is]
    np.testing.assert_array_equal(dx, want)
    np.testing.assert_array_equal(got, dweight)


def test_the_gradient_along_the_residual_path_is_added():
    x, dy, dsum = normal(20, 16), normal(20, 16, seed=1), normal(20, 16, seed=2)
    _, saved = rms_norm_forward(x, normal(16, seed=3))
    plain, dweight = rms_norm_backward(dy, saved)
    both, same = rms_norm_backward(dy, saved, dsum=dsum)
    np.testing.assert_allclose(both, plain + dsum, atol=1e-6)
    np.testing.assert_array_equal(same, dweight)


def test_what_is_normalised_is_the_sum_as_it_is_stored():
    x, residual = normal(40, 64).astype(BFLOAT16), normal(40, 64, seed=1).astype(BFLOAT16)
    y, saved = rms_norm_forward(x, np.ones(64, np.float32), residual=residual)
    np.testing.assert_array_equal(saved.x, (x.astype(np.float32) + residual.astype(np.float32)).astype(BFLOAT16))
    np.testing.assert_array_equal(y, rms_norm(saved.x, np.ones(64, np.float32)))


def test_the_scale_of_a_row_does_not_matter():
    x, weight = normal(10, 64), normal(64, seed=1)
    want = rms_norm(x, weight, eps=0.0)
    for scale in (1e-15, 1e15):
        np.testing.assert_allclose(rms_norm(np.float32(scale) * x, weight, eps=0.0), want, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((rms_norm(x, np.ones(64, np.float32)) ** 2).mean(axis=1)), 1, rtol=1e-5)


def test_a_row_of_zeros_gives_zeros():
    y, saved = rms_norm_forward(np.zeros((3, 16), np.float32), np.ones(16, np.float32))
    dx, dweight = rms_norm_backward(np.ones((3, 16), np.float32), saved)
    assert (y == 0).all()
    assert (dweight == 0).all()
    np.testing.assert_allclose(dx, 1e3, rtol=1e-5)


def test_nan_stays_in_its_row():
    x = normal(5, 16)
    x[2, 7] = np.nan
    y = rms_norm(x, np.ones(16, np.float32))
    assert np.isnan(y[2]).all()
    assert np.isfinite(y[[0, 1, 3, 4]]).all()


def test_bad_input_is_named():
    x, weight = normal(4, 8), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"residual: got shape \(3, 8\), expected \(4, 8\) like x"):
        rms_norm_forward(x, weight, residual=x[:3])
    with pytest.raises(ValueError, match=r"weight: got shape \(7,\), expected \(C\) with C=8"):
        rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"dsum: got shape \(3, 8\), expected \(4, 8\) like x"):
        rms_norm_backward(x, rms_norm_forward(x, weight)[1], dsum=x[:3])
    with pytest.raises(ValueError, match=r"sum_out: got shape \(3, 8\)"):
        rms_norm_forward(x, weight, residual=x, sum_out=x[:3])
