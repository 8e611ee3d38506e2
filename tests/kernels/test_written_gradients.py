"""Gradients of weights that a backward writes instead of adding to: whatever the array holds, as if it held zeros."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from ttr_kernels.cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from ttr_kernels.matmul import linear_backward, linear_forward

ROWS, INNER, CLASSES = 37, 24, 70


def of_linear(x, weight, bias, **gradients):
    y, saved = linear_forward(x, weight, bias)
    return linear_backward(y, saved, **gradients)


def of_loss(x, weight, bias, **gradients):
    _, saved = linear_cross_entropy_forward(x, weight, np.arange(len(x)), bias=bias)
    return linear_cross_entropy_backward(0.5, saved, **gradients)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("rows", [ROWS, 0])
@pytest.mark.parametrize("backward", [of_linear, of_loss])
def test_written_as_if_added_to_zeros(backward, rows, dtype):
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((rows, INNER), (CLASSES, INNER), (CLASSES,)))
    _, added, added_bias = backward(x, weight, bias)
    written, written_bias = np.full_like(added, np.nan), np.full_like(added_bias, np.nan)
    given = {"dweight": written, "dbias": written_bias}
    _, dweight, dbias = backward(x, weight, bias, **given, accumulate=False)
    assert dweight is written and dbias is written_bias  # noqa: PT018
    np.testing.assert_allclose(written, added, rtol=1e-6)
    np.testing.assert_allclose(written_bias, added_bias, rtol=1e-6)
    backward(x, weight, bias, **given)
    np.testing.assert_allclose(written, 2 * added, rtol=1e-5)
    np.testing.assert_allclose(written_bias, 2 * added_bias, rtol=1e-5)
