"""Rotary embedding on a GPU, in Python: a thread turns one pair of each head of a row (see common/cuda/choice.py)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from ..common.arrays import Array, DType, contiguous_rows, result_rows
from ..common.cuda.numba_kernels import elements, launch, load_and_store
from ..common.cuda.rows import as_float32


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, backwards: bool, out: Array) -> None:
    flat, rows, stride = contiguous_rows(x, inner=2)
    y, _, y_stride = result_rows("out", out, inner=2)
    (heads, dim), half = x.shape[-2:], cos.shape[1]
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]
    width = heads * dim
    launch(
        _rotation(x.dtype, interleaved), rows * half,
        (elements(flat, x.dtype, rows, stride, width), stride, as_float32(cos), as_float32(sin),
         np.float32(-1 if backwards else 1), rows, heads, dim, y_stride, elements(y, x.dtype, rows, y_stride, width)),
    )  # fmt: skip


@functools.cache
def _rotation(dtype: DType, interleaved: bool) -> Any:
    load, store = load_and_store(dtype)

    @cuda.jit
    def rotate_pairs(
        x: Any, x_stride: int, cos: Any, sin: Any, sign: Any, rows: int, heads: int, dim: int, y_stride: int, y: Any
    ) -> None:
        i, half = cuda.grid(1), cos.shape[1]
        row, j = i // half, i % half
        if row < rows:
            first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
            entry = row % cos.shape[0]
            c, s = cos[entry, j], sign * sin[entry, j]
            for head in range(heads):
                at, to = row * x_stride + head * dim, row * y_stride + head * dim
                a, b = load(x, at + first), load(x, at + second)
                store(y, to + first, a * c - b * s)
                store(y, to + second, a * s + b * c)

    return rotate_pairs
