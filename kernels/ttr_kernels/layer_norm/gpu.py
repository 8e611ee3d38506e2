"""Layer normalisation on a GPU: one pass over memory forward, one backward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, result_rows
from ..common.cuda.launch import scratch
from ..common.cuda.reductions import add_partials
from ..common.cuda.rows import as_float32, row_kernel, row_layout, usual_kernels

if TYPE_CHECKING:
    from . import LayerNormSaved

_SOURCE = Path(__file__).with_name("layer_norm.cu")


def forward(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, eps: float, out: Array, sum_out: Array | None
) -> tuple[Array, Array]:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    w, width = as_float32(weight), x.shape[-1]
    # A null pointer where there is none.
    b = 0 if bias is None else as_float32(bias)
    parameters = (w,) if isinstance(b, int) else (w, b)
    mean, inverse = empty(rows, FLOAT32, x), empty(rows, FLOAT32, x)
    if residual is None or sum_out is None:
        layout = row_layout(x.dtype, width, (stride, y_stride), (flat, *parameters, y))
        row_kernel(_SOURCE, "layer_norm_forward", x.dtype, layout).launch(
            x, layout.grid(rows), layout.block, (flat, stride, w, b, eps, y, y_stride, mean, inverse, rows, width)
        )
        return mean, inverse
    r, _, r_stride = contiguous_rows(residual)
    s, _, s_stride = result_rows("sum_out", sum_out)
    layout = row_layout(x.dtype, width, (stride, r_stride, y_stride, s_stride), (flat, r, *parameters, y, s))
    row_kernel(_SOURCE, "layer_norm_forward_residual", x.dtype, layout).launch(
        x, layout.grid(rows), layout.block,
        (flat, stride, r, r_stride, w, b, eps, y, y_stride, s, s_stride, mean, inverse, rows, width),
    )  # fmt: skip
    return mean, inverse


def backward(
    dy: Array, saved: LayerNormSaved, dsum: Array | None, dx: Array, dweight: Array, dbias: Array | None
) -> None:
    g, rows, g_stride = contiguous_rows(dy)
    x, _, x_stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    # Without a residual path dy stands in for dsum and is not read.
    extra, _, extra_stride = (g, rows, 0) if dsum is None else contiguous_rows(dsum)
    w, width = as_float32(saved.weight), dy.shape[-1]
    layout = row_layout(dy.dtype, width, (g_stride, x_stride, extra_stride, d_stride), (g, x, w, extra, d))
    grid = layout.resident_grid(rows, dy)
    weights = scratch(dy, (*grid, width), FLOAT32, "partial sums")
    biases = scratch(dy, (*grid, width), FLOAT32, "partial sums of a bias")
    row_kernel(_SOURCE, "layer_norm_backward", dy.dtype, layout).launch(
        dy, grid, layout.block,
        (g, g_stride, x, x_stride, w, saved.mean, saved.inverse_deviation, extra, extra_stride, d, d_stride, weights,
         biases, rows, width),
    )  # fmt: skip
    add_partials(weights, dweight)
    if dbias is not None:
        add_partials(biases, dbias)


INSTANTIATIONS = usual_kernels(_SOURCE, "layer_norm_forward", "layer_norm_forward_residual", "layer_norm_backward")
