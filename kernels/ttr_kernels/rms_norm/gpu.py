"""RMS normalisation on a GPU: one pass over memory forward, one backward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, result_rows
from ..common.cuda.launch import scratch
from ..common.cuda.reductions import add_partials
from ..common.cuda.rows import as_float32, row_kernel, row_layout, usual_kernels

if TYPE_CHECKING:
    from . import RmsNormSaved

_SOURCE = Path(__file__).with_name("rms_norm.cu")


def forward(x: Array, weight: Array, residual: Array | None, eps: float, out: Array, sum_out: Array | None) -> Array:
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    w, width = as_float32(weight), x.shape[-1]
    inverse_rms = empty(rows, FLOAT32, x)
    if residual is None or sum_out is None:
        layout = row_layout(x.dtype, width, (stride, y_stride), (flat, w, y))
        row_kernel(_SOURCE, "rms_norm_forward", x.dtype, layout).launch(
            x, layout.grid(rows), layout.block, (flat, stride, w, eps, y, y_stride, inverse_rms, rows, width)
        )
        return inverse_rms
    r, _, r_stride = contiguous_rows(residual)
    s, _, s_stride = result_rows("sum_out", sum_out)
    layout = row_layout(x.dtype, width, (stride, r_stride, y_stride, s_stride), (flat, r, w, y, s))
    row_kernel(_SOURCE, "rms_norm_forward_residual", x.dtype, layout).launch(
        x, layout.grid(rows), layout.block,
        (flat, stride, r, r_stride, w, eps, y, y_stride, s, s_stride, inverse_rms, rows, width),
    )  # fmt: skip
    return inverse_rms


def backward(dy: Array, saved: RmsNormSaved, dsum: Array | None, dx: Array, dweight: Array) -> None:
    g, rows, g_stride = contiguous_rows(dy)
    x, _, x_stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    # Without a residual path dy stands in for dsum and is not read.
    extra, _, extra_stride = (g, rows, 0) if dsum is None else contiguous_rows(dsum)
    w, width = as_float32(saved.weight), dy.shape[-1]
    layout = row_layout(dy.dtype, width, (g_stride, x_stride, extra_stride, d_stride), (g, x, w, extra, d))
    grid = layout.resident_grid(rows, dy)
    partials = scratch(dy, (*grid, width), FLOAT32, "partial sums")
    row_kernel(_SOURCE, "rms_norm_backward", dy.dtype, layout).launch(
        dy, grid, layout.block,
        (g, g_stride, x, x_stride, w, saved.inverse_rms, extra, extra_stride, d, d_stride, partials, rows, width),
    )  # fmt: skip
    add_partials(partials, dweight)


INSTANTIATIONS = usual_kernels(_SOURCE, "rms_norm_forward", "rms_norm_forward_residual", "rms_norm_backward")
