"""Layer normalisation on CPU cores: one pass over memory each way, several over a row while it is in cache.

Rows are copied into the kernel's own memory where a result may take the place of an input: see rms_norm/cpu.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, kernel_view, result_rows, zeros
from ..common.compilation import jit
from ..common.parallel import parallel_for
from ..common.reductions import ROWS_PER_PARTIAL, add_partials, partial_sums
from ..common.storage import load, store

if TYPE_CHECKING:
    from . import LayerNormSaved

_GRAIN = 64
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def forward(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, eps: float, out: Array, sum_out: Array | None
) -> tuple[Array, Array]:
    if residual is not None and sum_out is not None:
        flat, rows, stride = contiguous_rows(x)
        r, _, r_stride = contiguous_rows(residual)
        s, _, s_stride = result_rows("sum_out", sum_out)
        parallel_for(_add, rows, flat, stride, r, r_stride, s, s_stride, x.shape[-1], grain=_GRAIN)
        x = sum_out
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    mean, inverse = empty(rows, FLOAT32), empty(rows, FLOAT32)
    b = kernel_view(zeros(x.shape[-1], FLOAT32) if bias is None else bias)
    parallel_for(
        _forward, rows, flat, stride, kernel_view(weight), b, np.float32(eps), y, y_stride, mean, inverse, grain=_GRAIN
    )
    return mean, inverse


def backward(
    dy: Array, saved: LayerNormSaved, dsum: Array | None, dx: Array, dweight: Array, dbias: Array | None
) -> None:
    g, rows, g_stride = contiguous_rows(dy)
    x, _, x_stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    extra, _, extra_stride = (g, rows, 0) if dsum is None else contiguous_rows(dsum)
    weights, biases = partial_sums(rows, dweight.size), partial_sums(rows, dweight.size)
    parallel_for(
        _backward, len(weights),
        g, g_stride, x, x_stride, kernel_view(saved.weight), saved.mean, saved.inverse_deviation, extra, extra_stride,
        d, d_stride, weights, biases, rows,
    )  # fmt: skip
    add_partials(weights, dweight)
    if dbias is not None:
        add_partials(biases, dbias)


@jit
def _add(
    x: Any, stride: int, residual: Any, residual_stride: int, total: Any, total_stride: int, width: int,
    begin: int, end: int,
) -> None:  # fmt: skip
    values = np.empty(width, np.float32)
    for row in range(begin, end):
        for j in range(width):
            values[np.uintp(j)] = load(x, row * stride + j) + load(residual, row * residual_stride + j)
        for j in range(width):
            store(total, row * total_stride + j, values[np.uintp(j)])


@jit
def _forward(
    x: Any, stride: int, weight: Any, bias: Any, eps: Any, y: Any, y_stride: int, means: Any, inverses: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    width = weight.shape[0]
    share = _ONE / np.float32(width)
    for row in range(begin, end):
        total = _ZERO
        for j in range(width):
            total += load(x, row * stride + j)
        mean = total * share
        # A second look at the row, not E[x²] − E[x]², which cancels where the mean is large.
        squares = _ZERO
        for j in range(width):
            difference = load(x, row * stride + j) - mean
            squares += difference * difference
        r = _ONE / np.sqrt(squares * share + eps)
        means[row] = mean
        inverses[row] = r
        for j in range(width):
            store(y, row * y_stride + j, (load(x, row * stride + j) - mean) * r * load(weight, j) + load(bias, j))


@jit
def _backward(
    dy: Any, dy_stride: int, x: Any, x_stride: int, weight: Any, means: Any, inverses: Any, dsum: Any, dsum_stride: int,
    dx: Any, dx_stride: int, weights: Any, biases: Any, rows: int, begin: int, end: int,
) -> None:  # fmt: skip
    width = weight.shape[0]
    share = _ONE / np.float32(width)
    gradient, extra = np.empty(width, np.float32), np.zeros(width, np.float32)
    for part in range(begin, end):
        dweight, dbias = weights[part], biases[part]
        for row in range(part * ROWS_PER_PARTIAL, min((part + 1) * ROWS_PER_PARTIAL, rows)):
            mean, r = means[row], inverses[row]
            total, dot = _ZERO, _ZERO
            for j in range(width):
                given = load(dy, row * dy_stride + j)
                gradient[np.uintp(j)] = given
                g = given * load(weight, j)
                total += g
                dot += g * (load(x, row * x_stride + j) - mean)
            if dsum_stride > 0:
                for j in range(width):
                    extra[np.uintp(j)] = load(dsum, row * dsum_stride + j)
            total *= share
            dot *= r * share
            for j in range(width):
                given = gradient[np.uintp(j)]
                n = (load(x, row * x_stride + j) - mean) * r
                dweight[j] += given * n
                dbias[j] += given
                d = r * (given * load(weight, j) - total - n * dot)
                store(dx, row * dx_stride + j, d + extra[np.uintp(j)])
