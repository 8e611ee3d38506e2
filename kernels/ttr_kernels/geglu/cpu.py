"""GeGLU on CPU cores: one pass over memory each way. The backward works in place, on the input's own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, kernel_view, result_rows, zeros
from ..common.compilation import jit, jit_inline
from ..common.parallel import parallel_for
from ..common.reductions import add_column_sums
from ..common.storage import load, store
from ..common.vector_math import erf, exp_of_nonpositive, tanh

if TYPE_CHECKING:
    from . import GegluSaved

_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_ROOT_2_OVER_PI = np.float32(0.7978845608028654)
_CUBE = np.float32(0.044715)
_SATURATED = np.float32(1e4)
_SQRT_HALF = np.float32(0.7071067811865476)
_INVERSE_ROOT_2PI = np.float32(0.3989422804014327)


def forward(x: Array, bias: Array | None, approximate: str, out: Array) -> None:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    parallel_for(
        _forward, rows, flat, stride, _bias(bias, x), approximate == "none", y, y_stride,
        out.shape[-1], grain=_grain(x),
    )  # fmt: skip


def backward(dy: Array, saved: GegluSaved, dx: Array, dbias: Array | None) -> None:
    # A kernel that reads x and writes dx at the same place would not vectorise; one that sees a single array does.
    if dx.ctypes.data != saved.x.ctypes.data or dx.strides != saved.x.strides:
        dx[...] = saved.x
    flat, rows, stride = result_rows("dx", dx)
    g, _, g_stride = contiguous_rows(dy)
    parallel_for(
        _backward, rows, g, g_stride, flat, stride, _bias(saved.bias, dx),
        saved.approximate == "none", dy.shape[-1], grain=_grain(dx),
    )  # fmt: skip
    if dbias is not None:
        add_column_sums(dx, dbias)


def _bias(bias: Array | None, x: Array) -> Array:
    # Adding zeros costs less than a choice inside the loop.
    return kernel_view(zeros(x.shape[-1], FLOAT32) if bias is None else bias)


def _grain(x: Array) -> int:
    grain: int = max(1, 16384 // max(x.shape[-1], 1))
    return grain


@jit_inline
def phi_tanh(x: Any) -> Any:
    """The tanh formula's Φ(x) and its derivative."""
    square = x * x
    # From |x| = 10 on tanh is 1 and its slope 0; an infinite square would make that 0 · ∞.
    square = _SATURATED if square > _SATURATED else square
    t = tanh(_ROOT_2_OVER_PI * (x + _CUBE * square * x))
    slope = _HALF * (_ONE - t * t) * _ROOT_2_OVER_PI * (_ONE + np.float32(3.0) * _CUBE * square)
    return _HALF + _HALF * t, slope


@jit_inline
def _phi_erf(x: Any) -> Any:
    """Φ(x) and its derivative, the normal density."""
    return _HALF + _HALF * erf(x * _SQRT_HALF), _INVERSE_ROOT_2PI * exp_of_nonpositive(-_HALF * x * x)


@jit
def _forward(
    x: Any, stride: int, bias: Any, exact: bool, y: Any, y_stride: int, width: int,
    begin: int, end: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        at, y_at = row * stride, row * y_stride
        # Two loops: numba does not keep on disk a function that takes another as its constant.
        if exact:
            for j in range(width):
                gate = load(x, at + j) + load(bias, j)
                value = load(x, at + width + j) + load(bias, width + j)
                store(y, y_at + j, gate * _phi_erf(gate)[0] * value)
        else:
            for j in range(width):
                gate = load(x, at + j) + load(bias, j)
                value = load(x, at + width + j) + load(bias, width + j)
                store(y, y_at + j, gate * phi_tanh(gate)[0] * value)


@jit
def _backward(
    dy: Any, dy_stride: int, x: Any, stride: int, bias: Any, exact: bool, width: int,
    begin: int, end: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        at, dy_at = row * stride, row * dy_stride
        if exact:
            for j in range(width):
                gate = load(x, at + j) + load(bias, j)
                value = load(x, at + width + j) + load(bias, width + j)
                share, slope = _phi_erf(gate)
                g = load(dy, dy_at + j)
                store(x, at + j, g * value * (share + gate * slope))
                store(x, at + width + j, g * gate * share)
        else:
            for j in range(width):
                gate = load(x, at + j) + load(bias, j)
                value = load(x, at + width + j) + load(bias, width + j)
                share, slope = phi_tanh(gate)
                g = load(dy, dy_at + j)
                store(x, at + j, g * value * (share + gate * slope))
                store(x, at + width + j, g * gate * share)
