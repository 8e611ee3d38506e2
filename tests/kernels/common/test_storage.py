"""bfloat16 and float16 in compiled kernels: every bit pattern read, every rounding decision written."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32, kernel_view
from ttr_kernels.common.compilation import jit
from ttr_kernels.common.conversion import copy_converted, in_float32, set_to_zero
from ttr_kernels.common.storage import load, store

HALVES = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
PATTERNS = np.arange(65536, dtype=np.uint16)


@jit
def _load_all(x, y):
    for i in range(x.shape[0]):
        y[np.uintp(i)] = load(x, i)


@jit
def _store_all(x, y):
    for i in range(x.shape[0]):
        store(y, i, x[np.uintp(i)])


def stored(values, dtype):
    result = np.empty(values.shape, dtype)
    _store_all(values, kernel_view(result))
    return result


def assert_same_numbers(got, want):
    """Equal bits; any NaN equals any NaN."""
    nan = np.isnan(want.astype(FLOAT32))
    np.testing.assert_array_equal(np.isnan(got.astype(FLOAT32)), nan)
    bits = np.uint16 if got.itemsize == 2 else np.uint32
    np.testing.assert_array_equal(got.view(bits)[~nan], want.view(bits)[~nan])


@HALVES
def test_every_pattern_is_read(dtype):
    x = PATTERNS.view(dtype)
    y = np.empty(65536, FLOAT32)
    _load_all(kernel_view(x), y)
    assert_same_numbers(y, x.astype(FLOAT32))


@HALVES
def test_every_pattern_comes_back(dtype):
    x = PATTERNS.view(dtype)
    assert_same_numbers(stored(x.astype(FLOAT32), dtype), x)


def test_bfloat16_rounds_to_nearest_even():
    # Behind each of the 65536 upper halves, the lower halves that decide: exact, just above, just below the tie, the
    # tie, just above it, just below the next number.
    low = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((PATTERNS.astype(np.uint32) << 16)[:, None] | low).reshape(-1).view(FLOAT32)
    with np.errstate(invalid="ignore"):
        assert_same_numbers(stored(values, BFLOAT16), values.astype(BFLOAT16))


def test_float16_rounds_to_nearest_even():
    numbers = np.arange(0x7C00, dtype=np.uint16).view(FLOAT16).astype(np.float64)
    after = np.append(numbers[1:], 65536.0)
    ties = ((numbers + after) / 2).astype(FLOAT32)
    values = np.concatenate([ties, np.nextafter(ties, f32(0)), np.nextafter(ties, f32(np.inf))])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        assert_same_numbers(stored(values, FLOAT16), values.astype(FLOAT16))


def f32(value):
    return np.float32(value)


@HALVES
def test_beyond_the_largest_number(dtype):
    largest = np.array(0x7F7F if dtype == BFLOAT16 else 0x7BFF, np.uint16).view(dtype).astype(np.float64)
    half_step = {BFLOAT16: 2.0**119, FLOAT16: 16.0}[dtype]
    below, tie = np.nextafter(f32(largest + half_step), f32(0)), f32(largest + half_step)
    got = stored(np.array([below, tie, np.inf, -tie, -np.inf, np.nan], FLOAT32), dtype).astype(np.float64)
    np.testing.assert_array_equal(got, [largest, np.inf, np.inf, -np.inf, -np.inf, np.nan])


@HALVES
def test_whole_arrays(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((37, 50)).astype(FLOAT32)
    wide = np.full((37, 60), np.nan, dtype)
    copy_converted(x, wide[:, 3:53])
    assert_same_numbers(np.ascontiguousarray(wide[:, 3:53]), x.astype(dtype))
    assert np.isnan(wide[:, :3].astype(FLOAT32)).all()
    assert np.isnan(wide[:, 53:].astype(FLOAT32)).all()
    back = np.empty_like(x)
    copy_converted(wide[:, 3:53], back)
    np.testing.assert_array_equal(back, x.astype(dtype).astype(FLOAT32))
    copy_converted(np.empty((0, 5), FLOAT32), np.empty((0, 5), dtype))


@HALVES
def test_in_float32_whatever_the_layout(dtype):
    base = np.random.default_rng(0).standard_normal((12, 14)).astype(dtype)
    windows = np.lib.stride_tricks.sliding_window_view(base[0], 5)
    views = [base, base.T, base[:, 2:9], base[::2], base[::-1], base[:, ::-1], base[:, ::3], base[:1], windows]
    views += [np.broadcast_to(base[0], (3, 14)), base[:0], base[:, :0]]
    for view in views:
        np.testing.assert_array_equal(in_float32(view, "test"), view.astype(FLOAT32))
    # BLAS is to see the layout that it was given.
    assert in_float32(base.T, "test").strides == base.T.astype(FLOAT32).strides


def test_float32_is_not_copied():
    x = np.ones((3, 4), FLOAT32)
    assert in_float32(x, "test") is x


def test_python_code_is_told_where_load_and_store_work():
    with pytest.raises(TypeError, match="compiled kernels"):
        load(np.ones(3), 0)
    with pytest.raises(TypeError, match="compiled kernels"):
        store(np.ones(3), 0, 1.0)


@pytest.mark.parametrize("size", [0, 1, 300_001])
def test_set_to_zero(size):
    around = np.ones(size + 2, np.float32)
    set_to_zero(around[1:-1])
    assert not around[1:-1].any()
    assert around[0] == around[-1] == 1
    matrix = np.full((7, 5), 2.0)
    set_to_zero(matrix)
    assert not matrix.any()
