"""GeGLU on CPU cores: one pass over memory each way, one exponential for a value and its slope."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, kernel_view, result_rows, zeros
from ..common.compilation import jit_inline
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.reductions import add_column_sums
from ..common.storage import load, store
from ..common.vector_math import exp_of_nonpositive

if TYPE_CHECKING:
    from . import GegluSaved

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_ROOT_2_OVER_PI = np.float32(0.7978845608028654)
_CUBE = np.float32(0.044715)
_SATURATED = np.float32(1e4)
_TWO = np.float32(2.0)
_FAR = np.float32(6.0)
_INVERSE_ROOT_2PI = np.float32(0.3989422804014327)


def forward(x: Array, bias: Array | None, approximate: str, out: Array) -> None:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    parallel_for(
        _forward, rows, flat, stride, _bias(bias, x), approximate == "none", y, y_stride,
        out.shape[-1], grain=_grain(x),
    )  # fmt: skip


def backward(dy: Array, saved: GegluSaved, dx: Array, dbias: Array | None) -> None:
    x, rows, stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    g, _, g_stride = contiguous_rows(dy)
    parallel_for(
        _backward, rows, g, g_stride, x, stride, _bias(saved.bias, dx), saved.approximate == "none", d, d_stride,
        dy.shape[-1], grain=_grain(dx),
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
    """The tanh formula's Φ(x), which is 1 / (1 + e^(−2u)) for tanh u, and its derivative."""
    square = x * x
    # From |x| = 10 on tanh is 1 and its slope 0; an infinite square would make that 0 · ∞.
    square = _SATURATED if square > _SATURATED else square
    u = _ROOT_2_OVER_PI * (x + _CUBE * square * x)
    e = exp_of_nonpositive(-_TWO * abs(u))
    r = _ONE / (_ONE + e)
    slope = _TWO * e * r * r * _ROOT_2_OVER_PI * (_ONE + np.float32(3.0) * _CUBE * square)
    return r if u > _ZERO else e * r, slope


@jit_inline
def _phi_erf(x: Any) -> Any:
    """Φ(x) and its derivative, the normal density: Φ(−z) = e^(−z²/2) g(z), g fitted so that Φ is within 6e-8."""
    z = abs(x)
    z = _FAR if z > _FAR else z
    g = np.float32(4.499807460e-08)
    g = g * z + np.float32(-1.295940251e-06)
    g = g * z + np.float32(1.688329212e-05)
    g = g * z + np.float32(-1.331716921e-04)
    g = g * z + np.float32(7.225120207e-04)
    g = g * z + np.float32(-2.927887253e-03)
    g = g * z + np.float32(9.473837912e-03)
    g = g * z + np.float32(-2.589415945e-02)
    g = g * z + np.float32(6.216015294e-02)
    g = g * z + np.float32(-1.328824162e-01)
    g = g * z + np.float32(2.499852329e-01)
    g = g * z + np.float32(-3.989413977e-01)
    g = g * z + _HALF
    e = exp_of_nonpositive(-_HALF * x * x)
    tail = e * g
    return _ONE - tail if x > _ZERO else tail, _INVERSE_ROOT_2PI * e


@jit_ranges
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


@jit_ranges
def _backward(
    dy: Any, dy_stride: int, x: Any, stride: int, bias: Any, exact: bool, dx: Any, dx_stride: int, width: int,
    begin: int, end: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        at, dy_at, dx_at = row * stride, row * dy_stride, row * dx_stride
        if exact:
            for j in range(width):
                gate = load(x, at + j) + load(bias, j)
                value = load(x, at + width + j) + load(bias, width + j)
                share, slope = _phi_erf(gate)
                g = load(dy, dy_at + j)
                store(dx, dx_at + j, g * value * (share + gate * slope))
                store(dx, dx_at + width + j, g * gate * share)
        else:
            for j in range(width):
                gate = load(x, at + j) + load(bias, j)
                value = load(x, at + width + j) + load(bias, width + j)
                share, slope = phi_tanh(gate)
                g = load(dy, dy_at + j)
                store(dx, dx_at + j, g * value * (share + gate * slope))
                store(dx, dx_at + width + j, g * gate * share)
