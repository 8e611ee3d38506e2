"""Linear layers on a GPU: cuBLAS products, and one kernel that adds the bias."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, contiguous, empty, flat_rows
from ..common.cuda.gemm import product
from ..common.cuda.launch import CXX_TYPES, Kernel, vector_elements
from ..common.cuda.reductions import add_column_sums
from ..common.cuda.rows import as_float32

if TYPE_CHECKING:
    from . import LinearSaved

__all__ = ["INSTANTIATIONS", "backward", "forward", "product"]

_SOURCE = Path(__file__).with_name("bias.cu")
_THREADS = 256


def forward(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    rows, y = _matrix(x), _result(out)
    product(rows, _like(weight, rows).T, y, False)
    if bias is not None:
        _add_bias(y, as_float32(bias))
    _copy_back(y, out)


def backward(dy: Array, saved: LinearSaved, dx: Array, dweight: Array, dbias: Array | None, accumulate: bool) -> None:
    g, x, target = _matrix(dy), _matrix(saved.x), _result(dx)
    product(g, _like(saved.weight, g), target, False)
    _copy_back(target, dx)
    product(g.T, x, dweight, accumulate)
    if dbias is not None:
        if not accumulate:
            dbias[...] = 0
        add_column_sums(g, dbias)


def _matrix(array: Array) -> Array:
    """Rows as a matrix that cuBLAS reads as it is; a copy only where the rows are not evenly spaced."""
    if _has_even_rows(array):
        return array
    return contiguous(array).reshape(-1, array.shape[-1])


def _result(out: Array) -> Array:
    """The matrix that a product is written to: `out` itself where it can be, else one to copy back."""
    if _has_even_rows(out):
        return out
    if out.flags.c_contiguous:
        return out.reshape(-1, out.shape[-1])
    return empty((out.size // max(out.shape[-1], 1), out.shape[-1]), out.dtype, out)


def _copy_back(result: Array, out: Array) -> None:
    if not (_has_even_rows(out) or out.flags.c_contiguous):
        out[...] = result.reshape(out.shape)


def _has_even_rows(array: Array) -> bool:
    return (
        array.ndim == 2 and array.strides[1] == array.itemsize and array.strides[0] >= array.itemsize * array.shape[1]
    )


def _like(weight: Array, x: Array) -> Array:
    # cuBLAS multiplies operands of one type.
    return weight if weight.dtype == x.dtype else contiguous(weight, x.dtype)


def _add_bias(y: Array, bias: Array) -> None:
    flat, rows, stride = flat_rows(y)
    width = y.shape[1]
    vector = vector_elements(y.itemsize, (width, stride), (flat, bias))
    grid = -(-width // (_THREADS * vector)), min(rows, 65535)
    _kernel(y.dtype, vector).launch(y, grid, (_THREADS,), (flat, rows, stride, bias, width))


@functools.cache
def _kernel(dtype: DType, vector: int) -> Kernel:
    return Kernel(_SOURCE, "add_bias", {"TTR_T": CXX_TYPES[dtype], "TTR_VECTOR": vector})


INSTANTIATIONS = [_kernel(dtype, 16 // dtype.itemsize) for dtype in (FLOAT32, BFLOAT16, FLOAT16)]
