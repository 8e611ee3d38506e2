"""Dropout with residual addition: in place, what is dropped, and masks from a position, a seed and an offset."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT16
from ttr_kernels.dropout_add import dropout_add_backward, dropout_add_forward, dropout_mask

DTYPES = pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, FLOAT16])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@DTYPES
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("out_is", ["x", "residual"])
def test_in_place(out_is, rate, dtype):
    arrays = {"x": normal(50, 33).astype(dtype), "residual": normal(50, 33, seed=1).astype(dtype)}
    options = {"rate": rate, "seed": 5, "offset": 6}
    want, _ = dropout_add_forward(arrays["x"].copy(), arrays["residual"].copy(), **options)
    y, saved = dropout_add_forward(**arrays, **options, out=arrays[out_is])
    assert y is arrays[out_is]
    np.testing.assert_array_equal(y, want)
    dy = normal(50, 33, seed=2).astype(dtype)
    want = dropout_add_backward(dy.copy(), saved)
    assert dropout_add_backward(dy, saved, dx=dy) is dy
    np.testing.assert_array_equal(dy, want)


def test_in_place_of_a_strided_array():
    wide = normal(20, 64)
    before, x = wide.copy(), wide[:, ::2]
    dropout_add_forward(x, rate=0.3, seed=1, out=x)
    np.testing.assert_array_equal(wide[:, 1::2], before[:, 1::2])
    np.testing.assert_array_equal(x, dropout_add_forward(np.ascontiguousarray(before[:, ::2]), rate=0.3, seed=1)[0])


@DTYPES
def test_follows_the_mask(dtype):
    x, residual = normal(7, 11, 13).astype(dtype), normal(7, 11, 13, seed=1).astype(dtype)
    mask = dropout_mask(x.shape, rate=0.25, seed=3, offset=4)
    y, saved = dropout_add_forward(x, residual, rate=0.25, seed=3, offset=4)
    exact = mask * x.astype(np.float64) / 0.75 + residual.astype(np.float64)
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=0.01, atol=0.01)
    np.testing.assert_array_equal(y[~mask], residual[~mask])
    dx = dropout_add_backward(np.ones_like(x), saved)
    np.testing.assert_array_equal(dx != 0, mask)


def test_the_expectation_is_kept():
    x = np.ones((1000, 1000), np.float32)
    for rate in (0.1, 0.5, 0.9):
        y, _ = dropout_add_forward(x, rate=rate, seed=7)
        deviation = np.sqrt(rate / (1 - rate) / x.size)
        assert abs(y.mean(dtype=np.float64) - 1) < 5 * deviation


def test_what_is_dropped_is_gone_even_if_it_is_no_number():
    mask = dropout_mask((1000,), rate=0.5, seed=2)
    x = np.where(mask, 1.0, np.nan).astype(np.float32)
    y, _ = dropout_add_forward(x, rate=0.5, seed=2)
    np.testing.assert_array_equal(y, np.where(mask, 2.0, 0.0))
    x[~mask] = np.inf
    np.testing.assert_array_equal(dropout_add_forward(x, rate=0.5, seed=2)[0], y)


def test_the_shape_does_not_matter_the_order_does():
    x = normal(24, 35)
    flat, _ = dropout_add_forward(x.reshape(-1), rate=0.5, seed=1)
    np.testing.assert_array_equal(dropout_add_forward(x, rate=0.5, seed=1)[0].reshape(-1), flat)
    np.testing.assert_array_equal(dropout_mask((24, 35), rate=0.5).reshape(-1), dropout_mask((840,), rate=0.5))
    # A longer array begins with the mask of a shorter one.
    np.testing.assert_array_equal(dropout_mask((1001,), rate=0.5)[:840], dropout_mask((840,), rate=0.5))


@DTYPES
@pytest.mark.parametrize("width", [32, 33, 34, 1])
def test_rows_computed_apart_have_the_mask_of_the_whole(width, dtype):
    x, residual = normal(60, width).astype(dtype), normal(60, width, seed=1).astype(dtype)
    options = {"rate": 0.5, "seed": 1, "offset": 2}
    whole, saved = dropout_add_forward(x, residual, **options)
    dx = dropout_add_backward(x, saved)
    mask = dropout_mask(x.shape, **options)
    for part in (slice(0, 7), slice(7, 9), slice(9, 60), slice(60, 60)):
        y, saved = dropout_add_forward(x[part], residual[part], **options, first_row=part.start)
        np.testing.assert_array_equal(y, whole[part])
        np.testing.assert_array_equal(dropout_add_backward(x[part], saved), dx[part])
        np.testing.assert_array_equal(dropout_mask(y.shape, **options, first_row=part.start), mask[part])


def test_rate_zero_drops_nothing():
    x, residual = normal(30, 40), normal(30, 40, seed=1)
    np.testing.assert_array_equal(dropout_add_forward(x, rate=0.0)[0], x)
    np.testing.assert_array_equal(dropout_add_forward(x, residual, rate=0.0)[0], x + residual)
    assert dropout_mask((100,), rate=0.0).all()


def test_bad_input_is_named():
    x = normal(4, 8)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"rate: got .*, expected a probability in \[0, 1\)"):
            dropout_add_forward(x, rate=rate)
    with pytest.raises(ValueError, match="first_row: got -1, expected the number of a row, from 0"):
        dropout_add_forward(x, rate=0.1, first_row=-1)
    with pytest.raises(ValueError, match=r"residual: got shape \(3, 8\), expected \(4, 8\) like x"):
        dropout_add_forward(x, x[:3], rate=0.1)
    with pytest.raises(TypeError, match="residual: got dtype bfloat16, expected float32 like x"):
        dropout_add_forward(x, x.astype(BFLOAT16), rate=0.1)
