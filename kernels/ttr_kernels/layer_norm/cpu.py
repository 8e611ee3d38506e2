"""Layer normalisation on CPU cores: one pass over memory each way, several over a row while it is in cache. Results may
take the place of inputs: kernels read an element before they write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, kernel_view, result_rows, zeros
from ..common.compilation import jit_within
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.reductions import ROWS_PER_PARTIAL, add_partials, partial_sums
from ..common.storage import load, store
from ..common.vectors import fetch_row

if TYPE_CHECKING:
    from . import LayerNormSaved

_GRAIN = 64
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def forward(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, eps: float, out: Array, sum_out: Array | None
) -> tuple[Array, Array]:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    mean, inverse = empty(rows, FLOAT32), empty(rows, FLOAT32)
    w, b = kernel_view(weight), kernel_view(zeros(x.shape[-1], FLOAT32) if bias is None else bias)
    rest = w, b, np.float32(eps), y, y_stride, mean, inverse
    if residual is None or sum_out is None:
        parallel_for(_forward, rows, flat, stride, *rest, grain=_GRAIN)
    else:
        r, _, r_stride = contiguous_rows(residual)
        s, _, s_stride = result_rows("sum_out", sum_out)
        parallel_for(_forward_residual, rows, flat, stride, r, r_stride, s, s_stride, *rest, grain=_GRAIN)
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


@jit_within
def _normalize(
    x: Any, at: int, total: Any, weight: Any, bias: Any, eps: Any, y: Any, y_at: int, means: Any, inverses: Any,
    row: int,
) -> None:  # fmt: skip
    """A row of which the sum is known."""
    width = weight.shape[0]
    share = _ONE / np.float32(width)
    mean = total * share
    # A second look at the row, not E[x²] − E[x]², which cancels where the mean is large.
    squares = _ZERO
    for j in range(width):
        difference = load(x, at + j) - mean
        squares += difference * difference
    r = _ONE / np.sqrt(squares * share + eps)
    means[row] = mean
    inverses[row] = r
    for j in range(width):
        store(y, y_at + j, (load(x, at + j) - mean) * r * load(weight, j) + load(bias, j))


@jit_ranges
def _forward(
    x: Any, stride: int, weight: Any, bias: Any, eps: Any, y: Any, y_stride: int, means: Any, inverses: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        total = _ZERO
        for j in range(weight.shape[0]):
            total += load(x, row * stride + j)
        # While this row is in the cache for two passes more.
        fetch_row(x, (row + 1) * stride, weight.shape[0])
        _normalize(x, row * stride, total, weight, bias, eps, y, row * y_stride, means, inverses, row)


@jit_ranges
def _forward_residual(
    x: Any, stride: int, residual: Any, residual_stride: int, sums: Any, sums_stride: int, weight: Any, bias: Any,
    eps: Any, y: Any, y_stride: int, means: Any, inverses: Any, begin: int, end: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        at, total = row * sums_stride, _ZERO
        for j in range(weight.shape[0]):
            store(sums, at + j, load(x, row * stride + j) + load(residual, row * residual_stride + j))
            # Read back: what is normalised is the sum as it is stored.
            total += load(sums, at + j)
        _normalize(sums, at, total, weight, bias, eps, y, row * y_stride, means, inverses, row)


@jit_ranges
def _backward(
    dy: Any, dy_stride: int, x: Any, x_stride: int, weight: Any, means: Any, inverses: Any, dsum: Any, dsum_stride: int,
    dx: Any, dx_stride: int, weights: Any, biases: Any, rows: int, begin: int, end: int,
) -> None:  # fmt: skip
    width = weight.shape[0]
    share = _ONE / np.float32(width)
    for part in range(begin, end):
        dweight, dbias = weights[part], biases[part]
        for row in range(part * ROWS_PER_PARTIAL, min((part + 1) * ROWS_PER_PARTIAL, rows)):
            mean, r, at = means[row], inverses[row], row * dx_stride
            total, dot = _ZERO, _ZERO
            for j in range(width):
                g = load(dy, row * dy_stride + j) * load(weight, j)
                total += g
                dot += g * (load(x, row * x_stride + j) - mean)
            total *= share
            dot *= r * share
            if dsum_stride > 0:
                for j in range(width):
                    given, n = load(dy, row * dy_stride + j), (load(x, row * x_stride + j) - mean) * r
                    dweight[j] += given * n
                    dbias[j] += given
                    d = r * (given * load(weight, j) - total - n * dot)
                    store(dx, at + j, d + load(dsum, row * dsum_stride + j))
            else:
                for j in range(width):
                    given, n = load(dy, row * dy_stride + j), (load(x, row * x_stride + j) - mean) * r
                    dweight[j] += given * n
                    dbias[j] += given
                    store(dx, at + j, r * (given * load(weight, j) - total - n * dot))
