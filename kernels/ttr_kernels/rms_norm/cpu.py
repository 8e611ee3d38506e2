"""RMS normalisation on CPU cores: one pass over the rows forward, one backward. Results may take the place of inputs:
kernels read an element before they write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, kernel_view, result_rows
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.reductions import ROWS_PER_PARTIAL, add_partials, partial_sums
from ..common.storage import load, store

if TYPE_CHECKING:
    from . import RmsNormSaved

# Rows that are worth a thread of their own, for a row of 256 floats.
_GRAIN = 64


def forward(x: Array, weight: Array, residual: Array | None, eps: float, out: Array, sum_out: Array | None) -> Array:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    inverse_rms = empty(rows, FLOAT32)
    w = kernel_view(weight)
    if residual is None or sum_out is None:
        parallel_for(_forward, rows, flat, stride, w, np.float32(eps), y, y_stride, inverse_rms, grain=_GRAIN)
    else:
        r, _, r_stride = contiguous_rows(residual)
        s, _, s_stride = result_rows("sum_out", sum_out)
        parallel_for(
            _forward_residual, rows,
            flat, stride, r, r_stride, w, np.float32(eps), y, y_stride, s, s_stride, inverse_rms,
            grain=_GRAIN,
        )  # fmt: skip
    return inverse_rms


def backward(dy: Array, saved: RmsNormSaved, dsum: Array | None, dx: Array, dweight: Array) -> None:
    g, rows, g_stride = contiguous_rows(dy)
    x, _, x_stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    # Without a residual path dy stands in for dsum and is not read: the kernel tests the stride.
    extra, _, extra_stride = (g, rows, 0) if dsum is None else contiguous_rows(dsum)
    partials = partial_sums(rows, dweight.size)
    parallel_for(
        _backward, len(partials),
        g, g_stride, x, x_stride, kernel_view(saved.weight), saved.inverse_rms, extra, extra_stride, d, d_stride,
        partials, rows,
    )  # fmt: skip
    add_partials(partials, dweight)


@jit_ranges
def _forward(
    x: Any, stride: int, weight: Any, eps: Any, y: Any, y_stride: int, inverse_rms: Any, begin: int, end: int
) -> None:
    width = weight.shape[0]
    for row in range(begin, end):
        squares = np.float32(0.0)
        for j in range(width):
            value = load(x, row * stride + j)
            squares += value * value
        r = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        inverse_rms[row] = r
        for j in range(width):
            store(y, row * y_stride + j, load(x, row * stride + j) * r * load(weight, j))


@jit_ranges
def _forward_residual(
    x: Any, stride: int, residual: Any, residual_stride: int, weight: Any, eps: Any,
    y: Any, y_stride: int, total: Any, total_stride: int, inverse_rms: Any, begin: int, end: int,
) -> None:  # fmt: skip
    width = weight.shape[0]
    for row in range(begin, end):
        squares = np.float32(0.0)
        for j in range(width):
            store(total, row * total_stride + j, load(x, row * stride + j) + load(residual, row * residual_stride + j))
            # Read back: what is normalised is the sum as it is stored.
            value = load(total, row * total_stride + j)
            squares += value * value
        r = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        inverse_rms[row] = r
        for j in range(width):
            store(y, row * y_stride + j, load(total, row * total_stride + j) * r * load(weight, j))


@jit_ranges
def _backward(
    dy: Any, dy_stride: int, x: Any, x_stride: int, weight: Any, inverse_rms: Any, dsum: Any, dsum_stride: int,
    dx: Any, dx_stride: int, partials: Any, rows: int, begin: int, end: int,
) -> None:  # fmt: skip
    width = weight.shape[0]
    for part in range(begin, end):
        dweight = partials[part]
        for row in range(part * ROWS_PER_PARTIAL, min((part + 1) * ROWS_PER_PARTIAL, rows)):
            r = inverse_rms[row]
            dot = np.float32(0.0)
            for j in range(width):
                dot += load(dy, row * dy_stride + j) * load(weight, j) * load(x, row * x_stride + j)
            pull = dot * r * r * r / np.float32(width)
            at = row * dx_stride
            if dsum_stride > 0:
                for j in range(width):
                    g, value = load(dy, row * dy_stride + j), load(x, row * x_stride + j)
                    dweight[j] += g * value * r
                    d = g * load(weight, j) * r - value * pull
                    store(dx, at + j, d + load(dsum, row * dsum_stride + j))
            else:
                for j in range(width):
                    g, value = load(dy, row * dy_stride + j), load(x, row * x_stride + j)
                    dweight[j] += g * value * r
                    store(dx, at + j, g * load(weight, j) * r - value * pull)
