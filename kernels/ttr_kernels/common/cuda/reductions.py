"""Sums over rows (gradients of weights and biases) on a GPU, without atomics: partial sums first, then their sum."""

from __future__ import annotations

import functools
from pathlib import Path

from ..arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, contiguous_rows
from .launch import CXX_TYPES, Kernel, multiprocessors, scratch, vector_elements

_SOURCE = Path(__file__).with_name("reductions.cu")


def add_partials(partials: Array, total: Array) -> None:
    """total += Σ partials over their first dimension, in a fixed order.

    partials (parts, width) float32 or float64, contiguous; total (width,) float32, of any stride.
    """
    parts, width = partials.shape
    if parts:
        kernel = _kernel("add_partials" if partials.dtype == FLOAT32 else "add_partials_double", FLOAT32, 1)
        kernel.launch(total, (-(-width // 32),), (1024,), (partials, parts, width, total, element_stride(total)))


def add_column_sums(array: Array, total: Array) -> None:
    """total += Σ_rows array: the gradient of a bias. array (..., C), total (C,) float32, of any stride."""
    flat, rows, stride = contiguous_rows(array)
    width = array.shape[-1]
    if not rows or not width:
        return
    vector = vector_elements(array.itemsize, (width, stride), (flat,))
    columns = -(-width // (32 * vector))
    # Enough blocks to fill the device, each with at least 64 rows.
    parts = max(1, min(-(-rows // 64), 8 * multiprocessors(array) // columns))
    rows_per_part = -(-rows // parts)
    parts = -(-rows // rows_per_part)
    partials = scratch(array, (parts, width), FLOAT32, "partial sums")
    _kernel("column_sums", array.dtype, vector).launch(
        array, (columns, parts), (256,), (flat, stride, rows, rows_per_part, width, partials)
    )
    add_partials(partials, total)


def element_stride(vector: Array) -> int:
    """The distance of a vector's elements, in elements."""
    return vector.strides[0] // vector.itemsize


@functools.cache
def _kernel(name: str, dtype: DType, vector: int) -> Kernel:
    return Kernel(_SOURCE, name, {"TTR_T": CXX_TYPES[dtype], "TTR_VECTOR": vector})


INSTANTIATIONS = [
    _kernel("add_partials", FLOAT32, 1),
    _kernel("add_partials_double", FLOAT32, 1),
    *(_kernel("column_sums", dtype, 16 // dtype.itemsize) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
]
