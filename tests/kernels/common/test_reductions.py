"""Column sums that do not depend on threads, and the scratch memory of each thread."""

import threading

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32
from ttr_kernels.common.parallel import get_threads, set_threads
from ttr_kernels.common.reductions import ROWS_PER_PARTIAL, add_column_sums, add_partials, partial_sums
from ttr_kernels.common.scratch import thread_scratch


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, ROWS_PER_PARTIAL, ROWS_PER_PARTIAL + 1, 1000])
def test_column_sums_are_added(rows, dtype):
    x = np.random.default_rng(rows).standard_normal((rows, 21)).astype(dtype)
    total = np.full(21, 3.0, np.float32)
    add_column_sums(x, total)
    exact = x.astype(np.float64)
    bound = 1e-6 * (3 + np.abs(exact).sum(axis=0))
    assert (np.abs(total - (3 + exact.sum(axis=0))) <= bound).all()


def test_any_layout():
    x = np.random.default_rng(0).standard_normal((4, 50, 9)).astype(np.float32)
    plain = np.zeros(9, np.float32)
    add_column_sums(x, plain)
    wide = np.zeros(18, np.float32)
    add_column_sums(np.asfortranarray(x), wide[::2])
    np.testing.assert_array_equal(wide[::2], plain)
    assert (wide[1::2] == 0).all()


def test_the_same_bits_on_any_number_of_threads():
    x = np.random.default_rng(0).standard_normal((3000, 5)).astype(np.float32)
    before, results = get_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            set_threads(threads)
            results.append(np.zeros(5, np.float32))
            add_column_sums(x, results[-1])
    finally:
        set_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_partial_sums():
    parts = partial_sums(2 * ROWS_PER_PARTIAL + 1, 4)
    assert parts.shape == (3, 4)
    assert not parts.any()
    parts[:] = [[1], [2], [4]]
    total = np.ones(4, np.float32)
    add_partials(parts, total)
    np.testing.assert_array_equal(total, 8)


def test_scratch_is_kept_aligned_and_grows():
    small = thread_scratch(100, "test scratch")
    assert small.size >= 100
    assert small.dtype == np.float32
    assert small.ctypes.data % 64 == 0
    assert thread_scratch(50, "test scratch") is small
    large = thread_scratch(1000, "test scratch")
    assert large.size >= 1000
    assert large.ctypes.data % 64 == 0
    assert thread_scratch(1000, "test scratch") is large


def test_scratch_of_two_purposes_and_two_threads_is_apart():
    mine, other = thread_scratch(64, "test one"), thread_scratch(64, "test two")
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(thread_scratch(64, "test one")))
    thread.start()
    thread.join()
    assert not np.shares_memory(mine, other)
    assert not np.shares_memory(mine, theirs[0])
