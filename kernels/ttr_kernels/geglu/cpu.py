"""GeGLU on CPU cores: one pass over memory each way. The backward works in place, on the input's own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import Array, contiguous_rows, flat_rows, kernel_view
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
_SQRT_HALF = np.float32(0.7071067811865476)
_INVERSE_ROOT_2PI = np.float32(0.3989422804014327)


def forward(x: Array, bias: Array | None, approximate: str, out: Array) -> None:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = flat_rows(out)
    parallel_for(
        _forward_tanh if approximate == "tanh" else _forward_erf, rows,
        flat, stride, _bias(bias, x), bias is not None, y, y_stride, out.shape[-1], grain=_grain(x),
    )  # fmt: skip


def backward(dy: Array, saved: GegluSaved, dx: Array, dbias: Array | None) -> None:
    # A kernel that reads x and writes dx at the same place would not vectorise; one that sees a single array does.
    if dx.ctypes.data != saved.x.ctypes.data or dx.strides != saved.x.strides:
        dx[...] = saved.x
    flat, rows, stride = flat_rows(dx)
    g, _, g_stride = contiguous_rows(dy)
    parallel_for(
        _backward_tanh if saved.approximate == "tanh" else _backward_erf, rows,
        g, g_stride, flat, stride, _bias(saved.bias, dx), saved.bias is not None, dy.shape[-1], grain=_grain(dx),
    )  # fmt: skip
    if dbias is not None:
        add_column_sums(dx, dbias)


def _bias(bias: Array | None, x: Array) -> Array:
    return kernel_view(np.zeros(x.shape[-1], np.float32) if bias is None else bias)


def _grain(x: Array) -> int:
    grain: int = max(1, 16384 // max(x.shape[-1], 1))
    return grain


@jit_inline
def _phi_tanh(x: Any) -> Any:
    """The tanh formula's Φ(x) and its derivative."""
    square = x * x
    t = tanh(_ROOT_2_OVER_PI * (x + _CUBE * square * x))
    slope = _HALF * (_ONE - t * t) * _ROOT_2_OVER_PI * (_ONE + np.float32(3.0) * _CUBE * square)
    return _HALF + _HALF * t, slope


@jit_inline
def _phi_erf(x: Any) -> Any:
    """Φ(x) and its derivative, the normal density."""
    return _HALF + _HALF * erf(x * _SQRT_HALF), _INVERSE_ROOT_2PI * exp_of_nonpositive(-_HALF * x * x)


def _make_forward(phi: Any) -> Any:
    def forward(
        x: Any, stride: int, bias: Any, has_bias: bool, y: Any, y_stride: int, width: int, begin: int, end: int
    ) -> None:
        for row in range(begin, end):
            at = row * stride
            for j in range(width):
                gate, value = load(x, at + j), load(x, at + width + j)
                if has_bias:
                    gate += load(bias, j)
                    value += load(bias, width + j)
                share, _ = phi(gate)
                store(y, row * y_stride + j, gate * share * value)

    return forward


def _make_backward(phi: Any) -> Any:
    def backward(
        dy: Any, dy_stride: int, x: Any, stride: int, bias: Any, has_bias: bool, width: int, begin: int, end: int
    ) -> None:
        for row in range(begin, end):
            at = row * stride
            for j in range(width):
                gate, value = load(x, at + j), load(x, at + width + j)
                if has_bias:
                    gate += load(bias, j)
                    value += load(bias, width + j)
                g = load(dy, row * dy_stride + j)
                share, slope = phi(gate)
                store(x, at + j, g * value * (share + gate * slope))
                store(x, at + width + j, g * gate * share)

    return backward


_forward_tanh, _forward_erf = jit(_make_forward(_phi_tanh)), jit(_make_forward(_phi_erf))
_backward_tanh, _backward_erf = jit(_make_backward(_phi_tanh)), jit(_make_backward(_phi_erf))
