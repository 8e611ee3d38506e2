"""Products of few rows with a matrix as it lies in memory."""

import ml_dtypes
import numpy as np
import pytest

from ttr_kernels.common.arrays import kernel_view
from ttr_kernels.common.dot_products import dot_products

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def multiply(x, w, dtype=np.float32):
    out = np.full((len(x), len(w) + 3), np.nan, np.float32)
    weights = kernel_view(np.concatenate([np.full(5, np.nan), w.reshape(-1)]).astype(dtype))
    padded = np.concatenate([x, np.full((len(x), 2), np.nan)], axis=1).astype(np.float32)
    dot_products(
        out.reshape(-1), 1, w.shape[0] + 3, weights, 5, w.shape[0], w.shape[1], padded.reshape(-1), 0,
        x.shape[1] + 2, len(x),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(("batch", "rows", "inner"), [
    (1, 1, 1), (1, 8, 16), (1, 21, 100), (3, 9, 7), (4, 4, 32), (5, 13, 67), (8, 16, 64), (2, 3, 0), (0, 4, 4),
])  # fmt: skip
def test_it_is_the_product_and_writes_nothing_else(dtype, batch, rows, inner):
    rng = np.random.default_rng(batch + rows + inner)
    x = rng.standard_normal((batch, inner)).astype(np.float32)
    w = rng.standard_normal((rows, inner)).astype(dtype).astype(np.float32)
    out = multiply(x, w, dtype)
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    bound = 1e-6 * (np.abs(x) @ np.abs(w).T) + 1e-30
    assert (np.abs(out[:, 1 : rows + 1] - expected) <= bound).all()
    assert np.isnan(out[:, 0]).all()
    assert np.isnan(out[:, rows + 1 :]).all()


def test_a_row_does_not_depend_on_its_company():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((11, 83)).astype(np.float32), rng.standard_normal((23, 83)).astype(np.float32)
    whole = multiply(x, w)
    for chosen in ([0], [10, 3], [4, 5, 6, 7], [9, 8, 7, 6, 5]):
        np.testing.assert_array_equal(multiply(x[chosen], w), whole[chosen])
    for rows in (1, 7, 8, 20):
        np.testing.assert_array_equal(multiply(x, w[:rows])[:, 1 : rows + 1], whole[:, 1 : rows + 1])
