"""Matrix products on CPU cores, one thread per block of the result (see common.parallel for why).

float32 is multiplied on the matrix unit where there is one (see split_sgemm), by own blocks where those are ahead (see
sgemm), else by the BLAS that NumPy ships; bfloat16 by oneDNN where that is there (see onednn). Else 16-bit floats are
multiplied as float32: by own blocks, which read and write them as they are, or from and into float32 copies.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import BFLOAT16, FLOAT32, Array, contiguous, empty, flat_rows, kernel_view
from ..common.conversion import copy_converted, in_float32
from ..common.parallel import parallel_for, single_threaded_blas
from ..common.ranges import jit_ranges
from ..common.reductions import add_column_sums
from ..common.scratch import thread_scratch
from ..common.storage import load, store
from . import blas, onednn, sgemm, split_sgemm
from .micro_kernel import COLUMNS, ROWS
from .split_kernel import BLOCK

if TYPE_CHECKING:
    from . import LinearSaved

# Multiplications that are worth a thread of their own.
_MULTIPLICATIONS = 1 << 20


@functools.cache
def float32_products() -> str:
    """Who multiplies float32, if the product is large enough: "split", "own" or "blas", the first that is ahead
    here, or what TTR_FLOAT32_GEMM says, if that is possible here."""
    wish = os.environ.get("TTR_FLOAT32_GEMM", "auto")
    if wish in ("auto", "split") and split_sgemm.is_possible():
        return "split"
    if sgemm.is_ahead() if wish == "auto" else wish != "blas" and sgemm.is_possible():
        return "own"
    return "blas"


def reads_16_bit_floats() -> bool:
    """Whether own blocks multiply 16-bit floats as they lie, wherever oneDNN does not: not beside the matrix unit, for
    which a float32 copy pays."""
    return float32_products() != "split" and sgemm.is_possible()


def _direct(a: Array, b: Array, out: Array, accumulate: bool) -> tuple[Any, int, int] | None:
    """Whose function writes this product where it belongs, and the rows and columns of a unit of it."""
    if not a.dtype == b.dtype == out.dtype == FLOAT32:
        own = reads_16_bit_floats() and sgemm.takes(a, b, out, accumulate)
        return (sgemm.multiply, ROWS, COLUMNS) if own else None
    who = float32_products()
    if who == "split" and split_sgemm.takes(a, b, out):
        return split_sgemm.multiply, BLOCK, BLOCK
    if who != "blas" and sgemm.takes(a, b, out, accumulate):
        return sgemm.multiply, ROWS, COLUMNS
    return (blas.multiply, 1, 1) if blas.takes(a, b, out) else None


def product(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    if out.size == 0:
        return
    if a.shape[1] == 0:
        if not accumulate:
            out[...] = 0
        return
    if a.dtype == BFLOAT16 and b.dtype == BFLOAT16 and onednn.takes(a, b, out):
        _on_all_threads(onednn.multiply, a, b, out, accumulate)
    elif (found := _direct(a, b, out, accumulate)) is not None:
        _multiply(found, a, b, out, accumulate)
    else:
        _multiply_in_float32(in_float32(a, "matmul a"), in_float32(b, "matmul b"), out, accumulate)


def _multiply(found: tuple[Any, int, int], a: Array, b: Array, out: Array, accumulate: bool) -> None:
    multiply, *unit = found
    by_rows, grain = _division(out.shape[0], out.shape[1], a.shape[1], *unit)
    multiply(a, b, out, accumulate, by_rows, grain)


def _multiply_in_float32(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    """a and b are float32; the result goes through a float32 copy, unless it can be written as it lies."""
    found, result = _direct(a, b, out, accumulate), out
    # NumPy calls BLAS only on a result whose rows are contiguous.
    direct = found is not None or (
        out.dtype == FLOAT32 and not accumulate and out.strides[1] == 4 and out.strides[0] > 0
    )
    if not direct:
        result = thread_scratch(out.size, "matmul out")[: out.size].reshape(out.shape)
        found = _direct(a, b, result, False)
    if found is not None:
        _multiply(found, a, b, result, accumulate and direct)
    else:
        with single_threaded_blas():
            _on_all_threads(blas.multiply_with_numpy, a, b, result, accumulate and direct)
    if direct:
        return
    if accumulate:
        _accumulate(result, out)
    else:
        _write(result, out)


def _on_all_threads(multiply: Callable[..., None], a: Array, b: Array, out: Array, accumulate: bool) -> None:
    """`multiply`, a function of Python, on blocks of rows or columns of the result."""
    by_rows, grain = _division(out.shape[0], out.shape[1], a.shape[1])
    block, units = (_row_block, out.shape[0]) if by_rows else (_column_block, out.shape[1])
    parallel_for(block, units, multiply, a, b, out, accumulate, grain=grain)


def _division(rows: int, columns: int, inner: int, tall: int = 1, wide: int = 1) -> tuple[bool, int]:
    """Whether threads divide rows of the result, or else columns, and the least units of them for one."""
    # Each thread packs the other operand for itself, so the larger side is divided; BLAS and oneDNN prefer rows.
    if rows >= columns or (tall == 1 and rows >= 256):
        return True, max(1, _MULTIPLICATIONS // (tall * columns * inner))
    return False, max(-(-16 // wide), _MULTIPLICATIONS // (wide * rows * inner))


def _row_block(multiply: Any, a: Array, b: Array, out: Array, accumulate: bool, begin: int, end: int) -> None:
    multiply(a[begin:end], b, out[begin:end], accumulate)


def _column_block(multiply: Any, a: Array, b: Array, out: Array, accumulate: bool, begin: int, end: int) -> None:
    multiply(a, b[:, begin:end], out[:, begin:end], accumulate)


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


def backward(dy: Array, saved: LinearSaved, dx: Array, dweight: Array, dbias: Array | None, accumulate: bool) -> None:
    g, x = _matrix(dy), _matrix(saved.x)
    target = dx.reshape(-1, dx.shape[-1]) if dx.flags.c_contiguous else empty(x.shape, x.dtype)
    product(g, _like(saved.weight, g), target, False)
    if not np.shares_memory(target, dx):
        dx[...] = target.reshape(dx.shape)
    product(g.T, x, dweight, accumulate)
    if dbias is not None:
        if not accumulate:
            dbias[...] = 0
        add_column_sums(g, dbias)


def _matrix(array: Array) -> Array:
    """Rows as a matrix that BLAS reads as it is; a copy only where the rows are not evenly spaced."""
    if array.ndim == 2 and array.strides[1] == array.itemsize and array.strides[0] >= array.itemsize * array.shape[1]:
        return array
    return contiguous(array).reshape(-1, array.shape[-1])


def _like(weight: Array, x: Array) -> Array:
    # float32 weights beside 16-bit activations enter the product as they are.
    return weight if weight.dtype == x.dtype or weight.dtype == FLOAT32 else contiguous(weight, x.dtype)


@jit_ranges
def _add(x: Any, y: Any, stride: int, width: int, begin: int, end: int) -> None:
    for row in range(begin, end):
        for j in range(width):
            store(y, row * stride + j, load(y, row * stride + j) + x[np.uintp(row * width + j)])


@jit_ranges
def _add_bias(y: Any, stride: int, bias: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        for j in range(bias.shape[0]):
            store(y, row * stride + j, load(y, row * stride + j) + load(bias, j))
