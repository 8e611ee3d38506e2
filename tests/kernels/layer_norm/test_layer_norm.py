"""Layer normalisation: results that overwrite inputs, as its docstring allows, and means that dwarf the deviations."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward

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
    weight, bias = normal(33, seed=2), normal(33, seed=3)
    want, saved = layer_norm_forward(arrays["x"].copy(), weight, bias, residual=arrays["residual"].copy())
    y, got = layer_norm_forward(**arrays, weight=weight, bias=bias, out=arrays.get(out_is), sum_out=arrays.get(sum_is))
    assert out_is is None or y is arrays[out_is]
    assert sum_is is None or got.x is arrays[sum_is]
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(got.x, saved.x)


@DTYPES
@pytest.mark.parametrize("dx_is", ["dy", "dsum"])
def test_backward_in_place(dx_is, dtype):
    x, weight = normal(150, 33).astype(dtype), normal(33, seed=1)
    arrays = {"dy": normal(150, 33, seed=2).astype(dtype), "dsum": normal(150, 33, seed=3).astype(dtype)}
    _, saved = layer_norm_forward(x, weight, weight)
    want, *parameters = layer_norm_backward(arrays["dy"].copy(), saved, dsum=arrays["dsum"].copy())
    dx, *got = layer_norm_backward(arrays["dy"], saved, dsum=arrays["dsum"], dx=arrays[dx_is])
    assert dx is arrays[dx_is]
    np.testing.assert_array_equal(dx, want)
    np.testing.assert_array_equal(got, parameters)


def test_a_mean_that_dwarfs_the_deviations():
    # E[x²] − E[x]² in float32 would leave nothing of a deviation of 1 at 10 000.
    small = normal(20, 256)
    x = small + np.float32(1e4)
    exact = x.astype(np.float64)
    want = (exact - exact.mean(axis=1, keepdims=True)) / np.sqrt(exact.var(axis=1, keepdims=True) + 1e-5)
    # The mean itself is float32: half a step of it, 5e-4.
    np.testing.assert_allclose(layer_norm(x, np.ones(256, np.float32)), want, atol=1e-3)


def test_rows_have_mean_zero_and_deviation_one():
    y = layer_norm(5 * normal(20, 64) + 3, np.ones(64, np.float32))
    np.testing.assert_allclose(y.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(axis=1), 1, rtol=1e-5)


def test_a_constant_row_gives_the_bias():
    bias = normal(16)
    y, saved = layer_norm_forward(np.full((3, 16), 7.0, np.float32), np.ones(16, np.float32), bias)
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=1e-4)
    dx, _, _ = layer_norm_backward(normal(3, 16, seed=1), saved)
    assert np.isfinite(dx).all()
    np.testing.assert_allclose(dx.sum(axis=1), 0, atol=1e-2)


def test_without_a_bias_there_is_no_gradient_of_one():
    _, saved = layer_norm_forward(normal(3, 16), np.ones(16, np.float32))
    assert layer_norm_backward(normal(3, 16, seed=1), saved)[2] is None
