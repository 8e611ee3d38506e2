"""Time2Vec on a GPU: phases in float64, their sine and cosine in float32, one pass over memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Array,
    DType,
    contiguous,
    contiguous_rows,
    result_rows,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, multiprocessors, scratch, vector_elements
from ..common.cuda.reductions import add_partials
from ..common.cuda.rows import as_float32

if TYPE_CHECKING:
    from . import Time2VecSaved

_SOURCE = Path(__file__).with_name("time2vec.cu")
_THREADS = 256


def forward(times: Array, frequency: Array, phase: Array, out: Array) -> None:
    if not out.size:
        return
    y, rows, stride = result_rows("out", out)
    width = len(frequency)
    layout = _layout(width, vector_elements(out.itemsize, (width, stride), (y,)))
    _kernel("time2vec_forward", out.dtype, layout).launch(
        out, layout.grid(rows, out), (_THREADS,),
        (contiguous(times), as_float32(frequency), as_float32(phase), y, stride, rows,
         width),
    )  # fmt: skip


def backward(dy: Array, saved: Time2VecSaved, dfrequency: Array, dphase: Array) -> None:
    if not dy.size:
        return
    if dy.dtype == FLOAT64:
        dy = dy.astype(FLOAT32)
    g, rows, stride = contiguous_rows(dy)
    width = len(saved.frequency)
    # Of 16-bit gradients four at a time: the sums of eight features would take twice the registers.
    layout = _layout(width, min(4, vector_elements(dy.itemsize, (width, stride), (g,))))
    grid = layout.grid(rows, dy)
    partials = scratch(dy, (2, grid[0], width), FLOAT64, "partial sums")
    _kernel("time2vec_backward", dy.dtype, layout).launch(
        dy, grid, (_THREADS,),
        (g, stride, contiguous(saved.times), as_float32(saved.frequency),
         as_float32(saved.phase), partials[0], partials[1], rows, width),
    )  # fmt: skip
    add_partials(partials[0], dfrequency)
    add_partials(partials[1], dphase)


class _Layout(NamedTuple):
    """A thread's features, the threads of a row, and how many blocks lie beside each other across it."""

    vector: int
    lanes: int
    blocks: int

    def grid(self, rows: int, like: Array) -> tuple[int, int]:
        """As many blocks as the device holds at once; they go on to further rows."""
        resident = max(1, 4 * multiprocessors(like) // self.blocks)
        return min(-(-rows // (_THREADS // self.lanes)), resident), self.blocks


@functools.cache
def _layout(width: int, vector: int) -> _Layout:
    threads = -(-width // vector)
    lanes = min(32, 1 << (threads - 1).bit_length())
    return _Layout(vector, lanes, -(-threads // lanes))


@functools.cache
def _kernel(name: str, dtype: DType, layout: _Layout) -> Kernel:
    return Kernel(_SOURCE, name, {"TTR_T": CXX_TYPES[dtype], "TTR_VECTOR": layout.vector, "TTR_LANES": layout.lanes})


# For the presets' 32 features.
INSTANTIATIONS = [
    _kernel(name, dtype, _layout(32, vector))
    for dtype in (FLOAT32, BFLOAT16, FLOAT16)
    for name, vector in (("time2vec_forward", 16 // dtype.itemsize), ("time2vec_backward", 4))
]
