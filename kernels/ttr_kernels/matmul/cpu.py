"""Matrix products on CPU cores: NumPy's BLAS with one thread per block of the result (see common.parallel for why)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous, empty, flat_rows, kernel_view
from ..common.compilation import jit
from ..common.conversion import copy_converted, in_float32
from ..common.parallel import parallel_for, single_threaded_blas
from ..common.reductions import add_column_sums
from ..common.scratch import thread_scratch
from ..common.storage import load, store

if TYPE_CHECKING:
    from . import LinearSaved

# Multiplications that make it worth waking a second thread.
_MULTIPLICATIONS = 1 << 20


def product(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    if out.size == 0:
        return
    if a.shape[1] == 0:
        if not accumulate:
            out[...] = 0
        return
    _float32_product(in_float32(a, "matmul a"), in_float32(b, "matmul b"), out, accumulate)


def _float32_product(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    rows, columns = out.shape
    # NumPy calls BLAS only on a result whose rows are contiguous, and never adds to one.
    direct = not accumulate and out.dtype == FLOAT32 and out.strides[1] == 4 and out.strides[0] >= 4 * columns
    result = out if direct else thread_scratch(out.size, "matmul out")[: out.size].reshape(out.shape)
    with single_threaded_blas():
        if rows >= columns or rows >= 256:
            grain = max(1, _MULTIPLICATIONS // (columns * a.shape[1]))
            parallel_for(_row_block, rows, a, b, result, grain=grain)
        else:
            grain = max(16, _MULTIPLICATIONS // (rows * a.shape[1]))
            parallel_for(_column_block, columns, a, b, result, grain=grain)
    if accumulate:
        _accumulate(result, out)
    elif not direct:
        _write(result, out)


def _row_block(a: Array, b: Array, out: Array, begin: int, end: int) -> None:
    # Infinities and NaN are results like any other; who trains looks at the loss.
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(a[begin:end], b, out=out[begin:end])


def _column_block(a: Array, b: Array, out: Array, begin: int, end: int) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(a, b[:, begin:end], out=out[:, begin:end])


def _accumulate(result: Array, out: Array) -> None:
    try:
        flat, rows, stride = flat_rows(out)
    except ValueError:
        out[...] = out + result
        return
    parallel_for(_add, rows, result.reshape(-1), flat, stride, out.shape[1], grain=max(1, 32768 // out.shape[1]))


def _write(result: Array, out: Array) -> None:
    try:
        copy_converted(result, out)
    except ValueError:
        # A layout without evenly spaced rows: NumPy copies it, slowly.
        out[...] = result


def forward(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    rows = _matrix(x)
    y = out.reshape(-1, out.shape[-1]) if out.flags.c_contiguous else empty((len(rows), out.shape[-1]), out.dtype)
    product(rows, _like(weight, rows).T, y, False)
    if bias is not None:
        flat, count, stride = flat_rows(y)
        grain = max(1, 32768 // max(y.shape[1], 1))
        parallel_for(_add_bias, count, flat, stride, kernel_view(bias), grain=grain)
    if not np.shares_memory(y, out):
        out[...] = y.reshape(out.shape)


def backward(dy: Array, saved: LinearSaved, dx: Array, dweight: Array, dbias: Array | None) -> None:
    g, x = _matrix(dy), _matrix(saved.x)
    target = dx.reshape(-1, dx.shape[-1]) if dx.flags.c_contiguous else empty(x.shape, x.dtype)
    product(g, _like(saved.weight, g), target, False)
    if not np.shares_memory(target, dx):
        dx[...] = target.reshape(dx.shape)
    product(g.T, x, dweight, True)
    if dbias is not None:
        add_column_sums(g, dbias)


def _matrix(array: Array) -> Array:
    """Rows as a matrix that BLAS reads as it is; a copy only where the rows are not evenly spaced."""
    if array.ndim == 2 and array.strides[1] == array.itemsize and array.strides[0] >= array.itemsize * array.shape[1]:
        return array
    return contiguous(array).reshape(-1, array.shape[-1])


def _like(weight: Array, x: Array) -> Array:
    # float32 weights beside 16-bit activations enter the product as they are.
    return weight if weight.dtype == x.dtype or weight.dtype == FLOAT32 else contiguous(weight, x.dtype)


@jit
def _add(x: Any, y: Any, stride: int, width: int, begin: int, end: int) -> None:
    for row in range(begin, end):
        for j in range(width):
            store(y, row * stride + j, load(y, row * stride + j) + x[np.uintp(row * width + j)])


@jit
def _add_bias(y: Any, stride: int, bias: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        for j in range(bias.shape[0]):
            store(y, row * stride + j, load(y, row * stride + j) + load(bias, j))
