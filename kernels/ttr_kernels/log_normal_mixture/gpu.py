"""Log-normal mixture on a GPU: one pass over memory forward, one backward, in log space."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Array,
    DType,
    contiguous,
    contiguous_rows,
    result_rows,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, vector_elements
from ..common.cuda.reductions import element_stride
from ..common.cuda.rows import as_float32

if TYPE_CHECKING:
    from . import LogNormalMixtureSaved

_SOURCE = Path(__file__).with_name("log_normal_mixture.cu")
_THREADS = 256


def forward(log_gaps: Array, weight_logits: Array, means: Array, log_scales: Array, out: Array) -> None:
    rows, width = means.shape
    w, _, w_stride = contiguous_rows(weight_logits)
    m, _, m_stride = contiguous_rows(means)
    s, _, s_stride = contiguous_rows(log_scales)
    vector = vector_elements(means.itemsize, (width, w_stride, m_stride, s_stride), (w, m, s))
    lanes = _lanes(width, vector)
    _kernel("log_normal_mixture_forward", means.dtype, vector, lanes).launch(
        means, (-(-rows * lanes // _THREADS),), (_THREADS,),
        (contiguous(log_gaps), w, w_stride, m, m_stride, s, s_stride, out,
         element_stride(out), rows, width),
    )  # fmt: skip


def backward(
    dnll: Array, saved: LogNormalMixtureSaved, dweight_logits: Array, dmeans: Array, dlog_scales: Array
) -> None:
    rows, width = saved.means.shape
    if not width:
        return
    operands = [
        *(contiguous_rows(array) for array in (saved.weight_logits, saved.means, saved.log_scales)),
        result_rows("dweight_logits", dweight_logits),
        result_rows("dmeans", dmeans),
        result_rows("dlog_scales", dlog_scales),
    ]
    arrays, strides = [array for array, _, _ in operands], [stride for _, _, stride in operands]
    vector = vector_elements(dmeans.itemsize, (width, *strides), arrays)
    lanes = _lanes(width, vector)
    pairs = [argument for pair in zip(arrays, strides, strict=True) for argument in pair]
    _kernel("log_normal_mixture_backward", dmeans.dtype, vector, lanes).launch(
        dmeans, (-(-rows * lanes // _THREADS),), (_THREADS,),
        (as_float32(dnll), contiguous(saved.log_gaps), *pairs, rows, width),
    )  # fmt: skip


def _lanes(width: int, vector: int) -> int:
    """How many threads share a row: a power of two, one step over the components where a warp suffices."""
    return min(32, 1 << max(-(-width // vector) - 1, 0).bit_length())


@functools.cache
def _kernel(name: str, dtype: DType, vector: int, lanes: int) -> Kernel:
    return Kernel(_SOURCE, name, {"TTR_T": CXX_TYPES[dtype], "TTR_VECTOR": vector, "TTR_LANES": lanes})


# For 16 and 64 components.
INSTANTIATIONS = [
    _kernel(f"log_normal_mixture_{direction}", dtype, vector, _lanes(components, vector))
    for dtype, vector in ((FLOAT32, 4), (BFLOAT16, 8), (FLOAT16, 8))
    for components in (16, 64)
    for direction in ("forward", "backward")
]
