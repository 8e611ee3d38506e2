"""Products of tiles: every size a kernel uses, transposed operands, nothing written beside the result."""

import numpy as np
import pytest

from ttr_kernels.common.tile_multiply import LANES, PAD, ROWS, multiply, padded


def integers(rng, *shape):
    # Small integers: every product and sum is exact, so that results can be compared to the bit.
    return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("k", [0, 1, 7, 64, 200])
@pytest.mark.parametrize(("m", "n"), [(8, 16), (16, 16), (24, 32), (64, 48), (8, 128)])
def test_product(m, n, k, accumulate):
    rng = np.random.default_rng(k)
    a, b = integers(rng, m, k + 3), integers(rng, k, n + 5)
    ldc, c_at = n + 7, 11
    c = integers(rng, c_at + m * ldc + 9)
    before = c.copy()
    multiply(c, c_at, ldc, a.reshape(-1), 0, k + 3, 1, b.reshape(-1), 0, n + 5, m, n, k, accumulate)
    want = before.copy()
    tile = want[c_at : c_at + m * ldc].reshape(m, ldc)[:, :n]
    tile[...] = a[:, :k] @ b[:, :n] + (tile if accumulate else 0)
    np.testing.assert_array_equal(c, want)


def test_transposed_and_offset_operands():
    rng = np.random.default_rng(0)
    m, n, k = 16, 32, 24
    a, b = integers(rng, k, m), integers(rng, k, n)
    # One buffer for all three, as in the attention kernels.
    buffer = np.concatenate([np.zeros(5, np.float32), a.reshape(-1), b.reshape(-1), np.zeros(m * n, np.float32)])
    a_at, b_at = 5, 5 + a.size
    c_at = b_at + b.size
    multiply(buffer, c_at, n, buffer, a_at, 1, m, buffer, b_at, n, m, n, k, False)
    np.testing.assert_array_equal(buffer[c_at:].reshape(m, n), a.T @ b)


def test_sums_are_fused_or_better():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 500), (500, 16)))
    c = np.empty(8 * 16, np.float32)
    multiply(c, 0, 16, a.reshape(-1), 0, 500, 1, b.reshape(-1), 0, 16, 8, 16, 500, False)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = 500 * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b))
    assert (np.abs(c.reshape(8, 16) - exact) <= bound).all()


def test_infinity_and_nan_reach_the_result():
    a, b = np.zeros((8, 4), np.float32), np.ones((4, 16), np.float32)
    a[1, 2], a[2, 0] = np.inf, np.nan
    c = np.empty(8 * 16, np.float32)
    multiply(c, 0, 16, a.reshape(-1), 0, 4, 1, b.reshape(-1), 0, 16, 8, 16, 4, False)
    rows = c.reshape(8, 16)
    assert np.isposinf(rows[1]).all()
    assert np.isnan(rows[2]).all()
    assert (rows[3:] == 0).all()


def test_padding():
    assert PAD % ROWS == 0
    assert PAD % LANES == 0
    assert [padded(size) for size in (0, 1, PAD, PAD + 1)] == [0, PAD, PAD, 2 * PAD]
