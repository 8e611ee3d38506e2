"""Dropout and residual addition on a GPU, in one pass over memory."""

from __future__ import annotations

import functools
from pathlib import Path

from ..common.arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, contiguous, empty
from ..common.cuda.launch import CXX_TYPES, Kernel, vector_elements
from ..common.philox import keep_threshold, key_and_offset

_SOURCE = Path(__file__).with_name("dropout_add.cu")
_THREADS = 256


def apply(
    x: Array, residual: Array | None, rate: float, seed: int, offset: int, first: int, out: Array,
    offset_at: Array | None = None,
) -> None:  # fmt: skip
    result = out if out.flags.c_contiguous else empty(out.shape, out.dtype, out)
    inputs = [contiguous(array) for array in (x, residual) if array is not None]
    group = 16 // x.itemsize
    # Groups begin with an element on which a call of Philox decides first.
    skipped = first % 4
    aligned = int(vector_elements(x.itemsize, (), (*inputs, result)) > 1 and not skipped)
    # A null pointer where there is no residual.
    pointers = (*inputs, 0)[:2]
    _kernel(x.dtype).launch(
        x, (-(-(x.size + skipped) // (group * _THREADS)),), (_THREADS,),
        (*pointers, result, x.size, first, aligned, keep_threshold(rate), 1.0 / (1.0 - rate),
         *key_and_offset(seed, offset), 0 if offset_at is None else offset_at),
    )  # fmt: skip
    if result is not out:
        out[...] = result


@functools.cache
def _kernel(dtype: DType) -> Kernel:
    return Kernel(_SOURCE, "dropout_add", {"TTR_T": CXX_TYPES[dtype]})


INSTANTIATIONS = [_kernel(dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16)]
