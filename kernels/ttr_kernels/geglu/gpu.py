"""GeGLU on a GPU: one pass over memory each way, the sums for the gradient of the bias included."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, contiguous_rows, result_rows
from ..common.cuda.choice import numba_kernels_chosen
from ..common.cuda.grids import grid_of_rows
from ..common.cuda.launch import CXX_TYPES, Kernel, multiprocessors, scratch, vector_elements
from ..common.cuda.reductions import add_partials
from ..common.cuda.rows import as_float32

if TYPE_CHECKING:
    from . import GegluSaved

_SOURCE = Path(__file__).with_name("geglu.cu")
_THREADS = 256
# With a bias: blocks that a multiprocessor holds at once (by registers, see tests/kernels/cuda/budget.json), and the
# least number of rows for a thread, so that the partial sums of the gradient are few.
_RESIDENT, _ROWS = 3, 16


def forward(x: Array, bias: Array | None, approximate: str, out: Array) -> None:
    if not out.size:
        return
    if numba_kernels_chosen():
        from . import gpu_numba

        gpu_numba.forward(x, bias, approximate, out)
        return
    flat, rows, stride = contiguous_rows(x)
    y, _, y_stride = result_rows("out", out)
    b, width = None if bias is None else as_float32(bias), out.shape[-1]
    vector = vector_elements(x.itemsize, (width, stride, y_stride), (flat, y) if b is None else (flat, y, b))
    grid, block = _grid(x, rows, width // vector, b is not None)
    _kernel("geglu_forward", x.dtype, vector, approximate, b is not None).launch(
        x, grid, block, (flat, stride, 0 if b is None else b, y, y_stride, rows, width)
    )


def backward(dy: Array, saved: GegluSaved, dx: Array, dbias: Array | None) -> None:
    if not dy.size:
        return
    if numba_kernels_chosen():
        from . import gpu_numba

        gpu_numba.backward(dy, saved, dx, dbias)
        return
    g, rows, g_stride = contiguous_rows(dy)
    flat, _, stride = contiguous_rows(saved.x)
    d, _, d_stride = result_rows("dx", dx)
    b, width = None if saved.bias is None else as_float32(saved.bias), dy.shape[-1]
    vector = vector_elements(
        dy.itemsize, (width, g_stride, stride, d_stride), (g, flat, d) if b is None else (g, flat, d, b)
    )
    grid, block = _grid(dy, rows, width // vector, b is not None)
    kernel = _kernel("geglu_backward", dy.dtype, vector, saved.approximate, b is not None)
    if b is None or dbias is None:  # there are both or neither
        kernel.launch(dy, grid, block, (g, g_stride, flat, stride, 0, d, d_stride, 0, rows, width))
        return
    partials = scratch(dy, (grid[0], 2 * width), FLOAT32, "partial sums")
    kernel.launch(dy, grid, block, (g, g_stride, flat, stride, b, d, d_stride, partials, rows, width))
    add_partials(partials, dbias)


def _grid(like: Array, rows: int, places: int, bias: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Blocks for every row; with a bias as many as the device holds at once, of threads that go on to further rows."""
    (down, across), block = grid_of_rows(rows, places, _THREADS)
    if bias:
        resident = max(1, multiprocessors(like) * _RESIDENT // across)
        down = min(down, resident, -(-rows // (_ROWS * block[1])))
    return (down, across), block


@functools.cache
def _kernel(name: str, dtype: DType, vector: int, approximate: str, bias: bool) -> Kernel:
    defines: dict[str, int | str] = {
        "TTR_T": CXX_TYPES[dtype],
        "TTR_VECTOR": vector,
        "TTR_EXACT": int(approximate == "none"),
        "TTR_BIAS": int(bias),
    }
    return Kernel(_SOURCE, name, defines)


INSTANTIATIONS = [
    _kernel(name, dtype, 16 // dtype.itemsize, approximate, bias)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16)
    for approximate in ("tanh", "none")
    for bias in (False, True)
    for name in ("geglu_forward", "geglu_backward")
]
