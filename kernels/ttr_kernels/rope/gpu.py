"""Rotary embedding on a GPU, in one pass over memory. The table of angles is made by `rope_cos_sin`, in float64."""

from __future__ import annotations

import functools
from pathlib import Path

from ..common.arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, contiguous_rows, result_rows
from ..common.cuda.choice import numba_kernels_chosen
from ..common.cuda.grids import grid_of_rows
from ..common.cuda.launch import CXX_TYPES, Kernel, address, vector_elements
from ..common.cuda.rows import as_float32

_SOURCE = Path(__file__).with_name("rope.cu")
_THREADS = 128


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, backwards: bool, out: Array) -> None:
    if not out.size:
        return
    if numba_kernels_chosen():
        from . import gpu_numba

        gpu_numba.rotate(x, cos, sin, interleaved, backwards, out)
        return
    flat, rows, stride = contiguous_rows(x, inner=2)
    y, _, y_stride = result_rows("out", out, inner=2)
    cos, sin = as_float32(cos), as_float32(sin)
    (heads, dim), (table_rows, half) = x.shape[-2:], cos.shape
    pairs_end = 2 * half if interleaved else half
    vector = vector_elements(x.itemsize, (dim, pairs_end, stride, y_stride), (flat, y, cos, sin))
    kernel = _kernel(x.dtype, vector, interleaved)
    # In place, the features that do not turn are where they belong.
    in_place = address(flat) == address(y) and stride == y_stride
    places = half // _pairs(vector, interleaved) + (0 if in_place else (dim - 2 * half) // vector)
    groups = -(-heads // _heads(interleaved))
    grid, block = grid_of_rows(rows, places * groups, _THREADS)
    kernel.launch(
        x, grid, block,
        (flat, stride, cos, sin, table_rows, half, -1.0 if backwards else 1.0, y, y_stride, rows, heads, dim, places,
         groups),
    )  # fmt: skip


def _pairs(vector: int, interleaved: bool) -> int:
    """Pairs at one place: 16 bytes of each half, or 16 bytes of both."""
    return max(1, vector // 2) if interleaved else vector


def _heads(interleaved: bool) -> int:
    """How many heads a thread serves at most: 128 bytes' worth."""
    return 8 if interleaved else 4


@functools.cache
def _kernel(dtype: DType, vector: int, interleaved: bool) -> Kernel:
    defines: dict[str, int | str] = {
        "TTR_T": CXX_TYPES[dtype],
        "TTR_VECTOR": vector,
        "TTR_PAIRS": _pairs(vector, interleaved),
        "TTR_HEADS": _heads(interleaved),
        "TTR_INTERLEAVED": int(interleaved),
    }
    return Kernel(_SOURCE, "rope", defines)


INSTANTIATIONS = [
    _kernel(dtype, 16 // dtype.itemsize, interleaved)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16)
    for interleaved in (False, True)
]
