"""GeGLU on a GPU, in Python: a thread takes one gate and its value (see common/cuda/choice.py)."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda

from ..common.arrays import FLOAT32, Array, DType, array_module, contiguous_rows, result_rows
from ..common.cuda.numba_kernels import elements, launch, load_and_store
from ..common.cuda.reductions import add_column_sums
from ..common.cuda.rows import as_float32

if TYPE_CHECKING:
    from . import GegluSaved

_HALF, _ONE, _FARTHEST = np.float32(0.5), np.float32(1), np.float32(100)
_SQRT_HALF, _INVERSE_ROOT_2PI = np.float32(math.sqrt(0.5)), np.float32(1 / math.sqrt(2 * math.pi))
_TWICE_ROOT, _CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
_THRICE_CUBE = np.float32(3 * 0.044715)


def forward(x: Array, bias: Array | None, approximate: str, out: Array) -> None:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    width = out.shape[-1]
    launch(
        _kernels(x.dtype, approximate)[0], rows * width,
        (elements(flat, x.dtype, rows, stride, 2 * width), stride, _bias(bias, width, x), rows, width, y_stride,
         elements(y, x.dtype, rows, y_stride, width)),
    )  # fmt: skip


def backward(dy: Array, saved: GegluSaved, dx: Array, dbias: Array | None) -> None:
    g, rows, g_stride = contiguous_rows(dy)
    x, _, stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    width, dtype = dy.shape[-1], dy.dtype
    launch(
        _kernels(dtype, saved.approximate)[1], rows * width,
        (elements(g, dtype, rows, g_stride, width), g_stride, elements(x, dtype, rows, stride, 2 * width), stride,
         _bias(saved.bias, width, dy), rows, width, d_stride, elements(d, dtype, rows, d_stride, 2 * width)),
    )  # fmt: skip
    if dbias is not None:
        add_column_sums(dx, dbias)


def _bias(bias: Array | None, width: int, like: Array) -> Array:
    """A bias of zeros costs a read that the cache serves; without one there would be twice as many kernels."""
    if bias is not None:
        return as_float32(bias)
    zeros: Array = array_module(like).zeros(2 * width, FLOAT32)
    return zeros


@cuda.jit(device=True)
def _phi_tanh(x: Any) -> Any:
    """Φ(x) = ½ (1 + tanh u) = 1 / (1 + e^(−2u)) and its derivative, with u = √(2/π) (x + 0.044715 x³)."""
    # From |x| = 10 on Φ is 0 or 1 and its slope 0; an infinite square would make that 0 · ∞.
    limited = min(abs(x), _FARTHEST)
    square = limited * limited
    exponent = _TWICE_ROOT * x * (_ONE + _CUBE * square)
    # Of e^(2u) and e^(−2u) the one that does not overflow.
    power = np.float32(math.exp(-abs(exponent)))
    r = _ONE / (_ONE + power)
    slope = _TWICE_ROOT * power * r * r * (_ONE + _THRICE_CUBE * square)
    return (power * r if exponent < 0 else r), slope


@cuda.jit(device=True)
def _phi_erf(x: Any) -> Any:
    """Φ(x) and its derivative, the normal density."""
    limited = min(abs(x), _FARTHEST)
    density = _INVERSE_ROOT_2PI * np.float32(math.exp(-_HALF * limited * limited))
    return _HALF + _HALF * np.float32(math.erf(x * _SQRT_HALF)), density


@functools.cache
def _kernels(dtype: DType, approximate: str) -> tuple[Any, Any]:
    """(forward, backward)"""
    load, store = load_and_store(dtype)
    phi = _phi_erf if approximate == "none" else _phi_tanh

    @cuda.jit
    def geglu(x: Any, x_stride: int, bias: Any, rows: int, width: int, y_stride: int, y: Any) -> None:
        i = cuda.grid(1)
        row, j = i // width, i % width
        if row < rows:
            gate = load(x, row * x_stride + j) + bias[j]
            value = load(x, row * x_stride + width + j) + bias[width + j]
            store(y, row * y_stride + j, gate * phi(gate)[0] * value)

    @cuda.jit
    def geglu_backward(
        dy: Any, dy_stride: int, x: Any, x_stride: int, bias: Any, rows: int, width: int, dx_stride: int, dx: Any
    ) -> None:
        i = cuda.grid(1)
        row, j = i // width, i % width
        if row < rows:
            gate = load(x, row * x_stride + j) + bias[j]
            value = load(x, row * x_stride + width + j) + bias[width + j]
            g = load(dy, row * dy_stride + j)
            share, slope = phi(gate)
            store(dx, row * dx_stride + j, g * value * (share + gate * slope))
            store(dx, row * dx_stride + width + j, g * gate * share)

    return geglu, geglu_backward
