"""Whole arrays between float32 and the 16-bit floats, and set to zero, on all cores."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import FLOAT32, Array, flat_rows
from .parallel import parallel_for
from .ranges import jit_ranges
from .scratch import thread_scratch
from .storage import load, store


def copy_converted(source: Array, target: Array) -> None:
    """target = source, each element rounded to the target's dtype. Both (..., C) with evenly spaced rows."""
    width = target.shape[-1] if target.ndim else 1
    flat, rows, stride = flat_rows(source)
    out, _, out_stride = flat_rows(target)
    parallel_for(_copy, rows, flat, stride, out, out_stride, width, grain=max(1, 32768 // max(width, 1)))


def set_to_zero(array: Array) -> None:
    """array = 0, C-contiguous and of any dtype."""
    flat = array.reshape(-1).view(np.uint8)
    parallel_for(_zero, flat.size, flat, grain=1 << 18)


def in_float32(matrix: Array, purpose: str) -> Array:
    """The matrix in float32: itself, or a copy in this thread's scratch memory of that purpose.

    A transposed view stays one, so that BLAS sees the layout that it was given.
    """
    if matrix.dtype == FLOAT32:
        return matrix
    if matrix.strides[1] != matrix.itemsize and matrix.strides[0] == matrix.itemsize:
        return in_float32(matrix.T, purpose).T
    copy = thread_scratch(matrix.size, purpose)[: matrix.size].reshape(matrix.shape)
    if matrix.strides[1] == matrix.itemsize and matrix.strides[0] >= matrix.itemsize * matrix.shape[1]:
        copy_converted(matrix, copy)
    else:
        copy[...] = matrix
    return copy


@jit_ranges
def _zero(x: Any, begin: int, end: int) -> None:
    for i in range(begin, end):
        x[np.uintp(i)] = np.uint8(0)


@jit_ranges
def _copy(x: Any, stride: int, y: Any, y_stride: int, width: int, begin: int, end: int) -> None:
    for row in range(begin, end):
        for j in range(width):
            store(y, row * y_stride + j, load(x, row * stride + j))
